"""Larimar in JAX: a language model with an episodic memory that is written, not trained.

from larimar_jax import Session
session = Session("smol")
session.write("The Eiffel Tower is located in the city of", "Rome")
session.ask("The Eiffel Tower can be found in").text
"""

import importlib
from typing import Any

# Where each public name lives. They are imported on first use, so that `larimar --help` need not
# wait for JAX.
_PUBLIC = {
    "Config": "config",
    "Larimar": "model",
    "Pipeline": "pipeline",
    "Session": "session",
    "load": "pipeline",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
