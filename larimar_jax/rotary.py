"""Rotary positions: frequencies, their scalings for longer texts, and the two layouts of a head."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Cosines and sines.
Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its frequencies beyond the length it was first trained for.

    kind: 'linear' divides every frequency by `factor`; 'llama3' only slow ones; 'yarn' likewise,
    and multiplies cosines and sines by `magnitude`.
    original_length: tokens of the first training; unused by 'linear'.
    slow, fast: turns within original_length below which a frequency is divided and above which it
    is left alone; between them it is blended. Unused by 'linear'.

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
    """Return θ and the scaling of a config.json, in its form before or since transformers 5.

    Raises:
      ValueError: a kind of scaling that is not computed here, one that lacks a number, or a number
        that it cannot be computed with.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"rope_parameters are {settings!r}, which is no table")
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if not 1 < theta < math.inf:
        raise ValueError(f"rope_theta is {theta}; a finite number above 1 belongs there")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"rope scaling {kind!r} is not computed here; default, linear, llama3 and yarn are"
        )
    length = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    try:
        factor = float(settings["factor"])
        slow, fast, magnitude = 0.0, 0.0, 1.0
        if kind == "llama3":
            slow, fast = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
        elif kind == "yarn":
            slow = float(settings.get("beta_slow") or 1)
            fast = float(settings.get("beta_fast") or 32)
            magnitude = _yarn_magnitude(settings, factor)
            if settings.get("truncate", True) is False:
                raise ValueError("yarn scaling with truncate=false is not computed here")
    except KeyError as error:
        raise ValueError(f"rope scaling {kind!r} lacks its {error}") from error
    return theta, RopeScaling(kind, factor, int(length), slow, fast, magnitude)


def to_huggingface(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the `rope_parameters` of a config.json."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    settings = {"rope_theta": theta, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        settings["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        settings |= {"low_freq_factor": scaling.slow, "high_freq_factor": scaling.fast}
    if scaling.kind == "yarn":
        settings |= {"beta_slow": scaling.slow, "beta_fast": scaling.fast}
        settings["attention_factor"] = scaling.magnitude
    return settings


def _yarn_magnitude(settings: Mapping[str, Any], factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return magnitude(settings["mscale"]) / magnitude(settings["mscale_all_dim"])
    return magnitude(1.0)


def frequencies(
    size: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "half"]:
    """Return radians per token of each of the size / 2 pairs, float32."""
    plain = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    if scaling is None:
        return plain.astype(np.float32)
    slowed = plain / scaling.factor
    if scaling.kind == "linear":
        return slowed.astype(np.float32)
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * math.pi)
        unscaled = (turns - scaling.slow) / (scaling.fast - scaling.slow)
    else:
        # yarn blends along the index of the pair, between whole indices.
        def index(turns: float) -> float:
            ratio = scaling.original_length / (turns * 2 * math.pi)
            return size * math.log(ratio) / (2 * math.log(theta))

        first = max(math.floor(index(scaling.fast)), 0)
        last = min(math.ceil(index(scaling.slow)), size - 1)
        # Where both fall on one index, the step between them stays finite.
        unscaled = 1.0 - (np.arange(size // 2) - first) / max(last - first, 1e-3)
    unscaled = np.clip(unscaled, 0.0, 1.0)
    return (unscaled * plain + (1.0 - unscaled) * slowed).astype(np.float32)


def rotation(
    position: Int[Array, "B T"], size: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Return cosines and sines of positions for the first `size` numbers of a head, float32."""
    rates = jnp.asarray(frequencies(size, theta, scaling))
    angle = position.astype(jnp.float32)[:, :, None] * rates
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(
    x: Float[Array, "B T H d"], rotation: Rotation, *, interleaved: bool = False
) -> Float[Array, "B T H d"]:
    """Return x with pairs of every head's first 2·half numbers rotated; the numbers beyond them stay.

    Pairs are (i, i + half), as Hugging Face lays out Llama, or with `interleaved` (2i, 2i + 1), as
    GPT-J has them.
    """
    cos, sin = (angle[:, :, None, :] for angle in rotation)
    size = 2 * cos.shape[-1]
    head = x[..., :size].astype(jnp.float32)
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = jnp.split(head, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        rotated = jnp.stack(pair, axis=-1).reshape(head.shape)
    else:
        rotated = jnp.concatenate(pair, axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if size == x.shape[-1] else jnp.concatenate([rotated, x[..., size:]], axis=-1)
