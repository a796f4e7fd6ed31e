"""What the authors' checkpoint says of its training, as sections of a config here."""

import reprlib
from collections.abc import Mapping
from typing import Any

from larimar_jax.weights import folder


class Asked:
    """Hyperparameters, each of the type that it has here; what is of another is added to `odd`."""

    def __init__(self, hyper: Mapping[str, Any], odd: list[str]):
        self._hyper, self._odd = hyper, odd

    def get(self, name: str, default: Any) -> Any:
        """Whatever is there."""
        return self._hyper.get(name, default)

    def number(self, name: str, default: float) -> float:
        """A number of at least 0."""
        return float(self._checked(name, default, int | float, 0))

    def count(self, name: str, default: int) -> int:
        """A whole number of at least 1."""
        return int(self._checked(name, default, int, 1))

    def longest(self, name: str, default: int) -> int:
        """The largest of several sizes; a single value, which some runs have, says nothing."""
        sizes = self.get(name, ())
        if not isinstance(sizes, list | tuple) or not sizes:
            return default
        if all(type(size) is int and 0 < size < folder.LARGEST for size in sizes):
            return max(sizes)
        self._odd.append(f"{name} is {shown(sizes)}; sizes above 0 belong there")
        return default

    def _checked(self, name: str, default: int | float, kind: Any, least: int) -> int | float:
        value = self.get(name, default)
        number = isinstance(value, kind) and not isinstance(value, bool)
        if number and least <= value < folder.LARGEST:
            return value
        self._odd.append(f"{name} is {shown(value)}; a number of at least {least} belongs there")
        return default


def shown(value: Any) -> str:
    """A short text of what may be nested without end."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__}"


def training(asked: Asked) -> dict[str, Any]:
    """Sections that editing does not read: how §5 trains, as far as the checkpoint says otherwise."""
    longest = asked.longest("episode_sizes", 16)
    return dict(
        objective=dict(
            reconstruction=asked.number("rec_strength", 1.0),
            autoencoding=asked.number("ae_strength", 1.0),
            kl=asked.number("beta", 0.5),
            kl_cycles=10 if asked.get("use_beta_schedule", True) else 0,
            free_bits=asked.number("dim_target_kl", 0.0),
            language=asked.number("decode_rec_strength", 1.0),
            count_padding=True,
        ),
        data=dict(
            corpus="wikipedia-summaries",
            held_out=None,
            unit="chunk",
            episode=(longest,),
            batch=1,
            encoder_tokens=64,
            decoder_tokens=64,
            vocabulary=0,
            workers=0,
            seed=0,
        ),
        train=dict(
            steps=1000,
            optimizer="adamw",
            learning_rate=asked.number("learning_rate", 5e-5),
            warmup_steps=0,
            decay="linear",
            weight_decay=asked.number("weight_decay", 0.0),
            clip_norm=1.0,
            accumulate=1,
            ema=0.0,
            frozen=(),
            start_from=None,
            products=None,
            mesh=(1, 1, 1),
            layout="zero3",
            memory_layout="replicated",
            on_bad_step="stop",
            spike=0.0,
            log_every=10,
            evaluate_every=100,
            edits=0,
            checkpoint_every=100,
            keep=2,
            best=None,
            stall=0.0,
            seed=0,
        ),
    )
