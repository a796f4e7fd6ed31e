"""Rotary positions: frequencies, their scalings for longer texts, and the two layouts of a head."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Turn = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its frequencies beyond the length it was first trained for.

    kind: 'linear' divides every frequency by `factor`; 'llama3' only slow ones; 'yarn' likewise,
    and multiplies cosines and sines by `magnitude`.
    original_length: tokens of the first training; unused by 'linear'.
    slow, fast: turns within original_length below which a frequency is divided and above which it
    is kept; it is blended between. Unused by 'linear'.

    Raises:
      ValueError: a number that its kind cannot be computed with.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_length: int
    slow: float
    fast: float
    magnitude: float

    def __post_init__(self):
        numbers = [self.factor, self.magnitude]
        if self.kind != "linear":
            numbers += [self.original_length, self.fast, self.fast - self.slow]
        if self.kind == "yarn":
            numbers.append(self.slow)
        if not all(0 < number < math.inf for number in numbers) or not 0 <= self.slow:
            raise ValueError(
                f"{self} cannot be computed: factor, magnitude and lengths are finite and above 0, and"
                " fast is above slow; the model's configuration is damaged"
            )


def from_huggingface(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """θ and the scaling that a config.json asks for, in its older or newer form.

    Raises:
      ValueError: a kind of scaling that is not computed here, one that lacks a number, or a number
        that it cannot be computed with.
    """
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise ValueError(f"rope_parameters are {said!r}, which is no table")
    theta = float(said.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if not 1 < theta < math.inf:
        raise ValueError(f"rope_theta is {theta}; a finite number above 1 belongs there")
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"rope scaling {kind!r} is not computed here; default, linear, llama3 and yarn are"
        )
    length = said.get("original_max_position_embeddings") or config["max_position_embeddings"]
    try:
        factor = float(said["factor"])
        slow, fast, magnitude = 0.0, 0.0, 1.0
        if kind == "llama3":
            slow, fast = float(said["low_freq_factor"]), float(said["high_freq_factor"])
        elif kind == "yarn":
            slow, fast = float(said.get("beta_slow") or 1), float(said.get("beta_fast") or 32)
            magnitude = _yarn_magnitude(said, factor)
            if said.get("truncate", True) is False:
                raise ValueError("yarn scaling with truncate=false is not computed here")
    except KeyError as error:
        raise ValueError(f"rope scaling {kind!r} does not say its {error}") from error
    return theta, RopeScaling(kind, factor, int(length), slow, fast, magnitude)


def to_huggingface(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The `rope_parameters` of a config.json."""
    said: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if scaling is None:
        return said
    said |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        said["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        said |= {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    if scaling.kind == "yarn":
        said |= {"beta_slow": scaling.slow, "beta_fast": scaling.fast}
        said["attention_factor"] = scaling.magnitude
    return said


def _yarn_magnitude(said: Mapping[str, Any], factor: float) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if said.get("attention_factor") is not None:
        return float(said["attention_factor"])
    if said.get("mscale") and said.get("mscale_all_dim"):
        return grown(said["mscale"]) / grown(said["mscale_all_dim"])
    return grown(1.0)


def frequencies(
    size: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "half"]:
    """Radians per token of each of the size / 2 pairs, float32."""
    pairs = np.arange(0, size, 2, dtype=np.float64) / size
    plain = theta**-pairs
    if scaling is None:
        return plain.astype(np.float32)
    slowed = plain / scaling.factor
    if scaling.kind == "linear":
        return slowed.astype(np.float32)
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * math.pi)
        kept = (turns - scaling.slow) / (scaling.fast - scaling.slow)
    else:
        # yarn blends along the index of the pair, between whole indices.
        def index(turns: float) -> float:
            ratio = scaling.original_length / (turns * 2 * math.pi)
            return size * math.log(ratio) / (2 * math.log(theta))

        first = max(math.floor(index(scaling.fast)), 0)
        last = min(math.ceil(index(scaling.slow)), size - 1)
        # Where both fall on one index, the step between them stays finite.
        kept = 1.0 - (np.arange(size // 2) - first) / max(last - first, 1e-3)
    kept = np.clip(kept, 0.0, 1.0)
    return (kept * plain + (1.0 - kept) * slowed).astype(np.float32)


def rotation(
    position: Int[Array, "B T"], size: int, theta: float, scaling: RopeScaling | None = None
) -> Turn:
    """Cosines and sines of positions for the first `size` numbers of a head, float32."""
    rates = jnp.asarray(frequencies(size, theta, scaling))
    angle = position.astype(jnp.float32)[:, :, None] * rates
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(
    x: Float[Array, "B T H d"], turn: Turn, *, interleaved: bool = False
) -> Float[Array, "B T H d"]:
    """Rotates pairs of every head's first 2·half numbers; what is beyond them stays.

    Pairs are (i, i + half), as Hugging Face lays out Llama, or with `interleaved` (2i, 2i + 1), as
    GPT-J has them.
    """
    cos, sin = (angle[:, :, None, :] for angle in turn)
    turned_size = 2 * cos.shape[-1]
    head = x[..., :turned_size].astype(jnp.float32)
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = jnp.split(head, 2, axis=-1)
    both = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack(both, axis=-1).reshape(head.shape)
    else:
        turned = jnp.concatenate(both, axis=-1)
    turned = turned.astype(x.dtype)
    if turned_size == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., turned_size:]], axis=-1)
