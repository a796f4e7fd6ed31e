"""What all requests of a server share."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from larimar_jax import session_file
from larimar_jax.pipeline import Pipeline
from larimar_jax.serve.access import Access
from larimar_jax.serve.batching import Batcher
from larimar_jax.serve.limits import Limits
from larimar_jax.serve.problems import Problem
from larimar_jax.serve.prometheus import Metrics
from larimar_jax.serve.tenants import DEFAULT, MemoryFolder


@dataclasses.dataclass
class Served:
    """A loaded model with its memories, and what is counted.

    is_ready: usual programs are compiled. failure: why they could not be; `stop` is called then.
    """

    model: Pipeline
    memories: MemoryFolder
    batcher: Batcher
    access: Access
    limits: Limits
    metrics: Metrics
    is_ready: bool = False
    failure: Exception | None = None
    stop: Callable[[], None] = lambda: None

    @property
    def model_name(self) -> str:
        """The model's name in the API: that of a shipped one, or of its file without the ending."""
        return Path(self.model.source).stem

    def memory_name(self, model: str) -> str:
        """Return which memory a request's `model` names, as MODEL or MODEL:MEMORY.

        Raises:
          Problem: 404, another model.
        """
        name, _, memory = model.partition(":")
        if name != self.model_name:
            message = f"there is no model {name!r} here; name {self.model_name}, or "
            message += f"{self.model_name}:MEMORY."
            raise Problem(404, "model_not_found", message)
        return memory if ":" in model else DEFAULT

    def require_text(self, name: str, text: str, empty: bool = False) -> None:
        """Raise a Problem or NotUnicode where a text is too long, empty, or none that can be encoded."""
        if len(text) > self.limits.prompt:
            message = (
                f"{name} has {len(text):,} characters; at most {self.limits.prompt:,} are read."
            )
            raise Problem(400, "text_too_long", message)
        if not (empty or text.strip()):
            raise Problem(400, "empty_text", f"{name} is empty.")
        session_file.require_text(name, text)
