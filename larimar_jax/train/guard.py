"""What happens to a step that is bad: not finite, or with a loss far above the usual."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from larimar_jax.config import TrainConfig

# Bad steps one after the other that no run recovers from.
MOST = 10


class BadStep(FloatingPointError):
    """A step's loss or gradient is not finite, or its loss a spike; the state before it is kept."""


class Guard:
    """Applies `train.on_bad_step`; the step itself has already left the state as it was."""

    def __init__(self, train: TrainConfig, trained: list[str]):
        self._train, self._trained, self._row = train, trained, 0

    def look(self, step: int, found: Mapping[str, Any], parameters: Mapping[str, Any]) -> str | None:
        """None for a good step; for a bad one that is skipped, what is wrong with it.

        Args:
            found: the step's metrics, on the host. parameters: that it began with, by path.
        Raises:
            BadStep: where the policy is to stop, or after too many in a row.
        """
        if found["sound"]:
            self._row = 0
            return None
        self._row += 1
        what = f"step {step}: {self._what(found, parameters)}"
        if self._train.on_bad_step == "skip" and self._row < MOST:
            return f"{what}; skipped, {self._row} in a row"
        causes = (
            "too high a learning rate (train.learning_rate, train.warmup_steps), too little clipping "
            "(train.clip_norm), or a compute dtype with too small a range (model.dtype)"
        )
        many = f" This was the {MOST}th in a row." if self._row >= MOST else ""
        raise BadStep(
            f"{what}.{many} The state before this step is untouched, and the last checkpoint is "
            f"sound. Likely causes: {causes}. train.on_bad_step=skip goes on without such steps."
        )

    def _what(self, found: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
        loss, norm = float(found["loss"]), float(found["gradient_norm"])
        if math.isfinite(loss) and math.isfinite(norm):
            return (
                f"the loss is {loss:.4g}, more than train.spike ({self._train.spike:g}) above the "
                f"usual {float(found['usual_loss']):.4g}; the largest gradient is that of "
                f"{self._largest(found)}"
            )
        bad = _bad((f"parameter {name}", leaf) for name, leaf in parameters.items())
        bad = bad or _bad((f"loss term {n}", term) for n, term in sorted(found["terms"].items()))
        squares = zip(self._trained, np.asarray(found["gradient_squares"]), strict=True)
        bad = bad or _bad((f"gradient of {name}", square) for name, square in squares)
        first = bad or "the norm of the gradients, though each of them is finite"
        return f"the loss is {loss}; the first that is not finite is {first}"

    def _largest(self, found: Mapping[str, Any]) -> str:
        return self._trained[int(np.argmax(np.asarray(found["gradient_squares"])))]


def _bad(named: Iterable[tuple[str, Any]]) -> str | None:
    """The name of the first that is not finite: a parameter causes a term, and a term a gradient."""
    return next((name for name, value in named if not bool(jnp.isfinite(value).all())), None)
