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
    slow: float = 0.0
    fast: float = 0.0
    magnitude: float = 1.0

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


# The key of each number of a scaling in Hugging Face's rope_parameters.
_KEYS = {
    "linear": {"factor": "factor", "original_length": "original_max_position_embeddings"},
    "llama3": {"slow": "low_freq_factor", "fast": "high_freq_factor"},
    "yarn": {"slow": "beta_slow", "fast": "beta_fast", "magnitude": "attention_factor"},
}


def from_huggingface(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return θ and the scaling in the `rope_parameters` of a config.json, in transformers' form.

    Raises:
      ValueError: a kind of scaling that is not computed here, one that lacks a number, or a number
        that it cannot be computed with.
    """
    parameters = config["rope_parameters"]
    theta, kind = float(parameters["rope_theta"]), parameters["rope_type"]
    if not 1 < theta < math.inf:
        raise ValueError(f"rope_theta is {theta}; a finite number above 1 belongs there")
    if (part := parameters.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {part!r}; whole heads are rotated")
    if kind == "default":
        return theta, None
    if kind not in _KEYS:
        raise ValueError(
            f"rope scaling {kind!r} is not computed here; default, linear, llama3 and yarn are"
        )
    try:
        values = {"original_max_position_embeddings": config["max_position_embeddings"]}
        values |= {key: value for key, value in parameters.items() if value is not None}
        if kind == "yarn":
            values.setdefault("attention_factor", _yarn_magnitude(parameters))
            for key, default in (("beta_slow", 1), ("beta_fast", 32)):
                values[key] = values.get(key) or default
            if parameters.get("truncate", True) is False:
                raise ValueError("yarn scaling with truncate=false is not computed here")
        keys = _KEYS["linear"] | _KEYS[kind]
        numbers = {field: float(values[key]) for field, key in keys.items()}
    except KeyError as error:
        raise ValueError(f"rope scaling {kind!r} lacks its {error}") from error
    length = int(numbers.pop("original_length"))
    return theta, RopeScaling(kind, original_length=length, **numbers)


def to_huggingface(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the `rope_parameters` of a config.json."""
    if scaling is None:
        return {"rope_theta": theta, "rope_type": "default"}
    keys = _KEYS["linear"] | _KEYS[scaling.kind]
    numbers = {key: getattr(scaling, field) for field, key in keys.items()}
    return {"rope_theta": theta, "rope_type": scaling.kind, **numbers}


def _yarn_magnitude(parameters: Mapping[str, Any]) -> float:
    def magnitude(weight: float) -> float:
        factor = parameters["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(parameters["mscale"]) / magnitude(parameters["mscale_all_dim"])
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
