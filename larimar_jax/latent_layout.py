"""What the edited memory holds of a text: its encoding, features of it, and its answer's spelling.

    [ e(text) : C | s·φ(e(text)) : F | spelling : S ]

Linear keys of C dimensions tell at most C facts apart, whatever K is. With random features φ of the
encoding (`RandomFeatures`) the product of two keys becomes

    z·z' + s² exp(−‖z − z'‖² / (2ℓ²))

and the memory holds about C + F facts before it has to blend them, in max(K, C + F) slots: those of M₀
beyond C, which an M₀ of C columns cannot use, and as many more as that takes. M₀ is widened so that it
reads every text back as itself as before. Without features and spellings all of this is e(text) alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from larimar_jax import answer_code
from larimar_jax.config import Config, KeyFeaturesConfig
from larimar_jax.memory.addressing import RandomFeatures
from larimar_jax.memory.base import MemoryParams


@dataclasses.dataclass(frozen=True)
class LatentLayout:
    """How many numbers each part has: C, F and S."""

    encoding: int
    key_features: int
    answer_code: int

    @property
    def size(self) -> int:
        return self.encoding + self.key_features + self.answer_code


def layout(config: Config) -> LatentLayout:
    """Those of a model as it is edited."""
    told = config.editing.key_features
    features = 0 if told is None else told.count
    return LatentLayout(config.model.latent, features, answer_code.size(config.editing.answer_code))


def features(
    config: KeyFeaturesConfig | None, encodings: Float[Array, "n C"]
) -> Float[Array, "n F"]:
    """s·φ of encodings; F is 0 without a config. Saved memories depend on them: they never change."""
    if config is None:
        return jnp.zeros((len(encodings), 0), jnp.float32)
    key = jax.random.key(0, impl="threefry2x32")
    directions = jax.random.normal(key, (config.count, encodings.shape[1]), jnp.float32)
    return config.scale * RandomFeatures(config.length).weigh(directions, encodings)


@functools.partial(jax.jit, static_argnums=1)
def extend_prior(params: MemoryParams, sizes: LatentLayout) -> MemoryParams:
    """A model's memory for all parts: the last F slots of M₀ stand for the features, one each, and M₀
    has no spelling. M_ref is M₀.

    Raises:
        ValueError: σ_W is of slots or goes by M, and there are more slots than it was learned for.
    """

    def pad(part: Array | None, axis: int) -> Array | None:
        if part is None:
            return None
        more = sizes.size - sizes.encoding
        return jnp.pad(part, [(0, more * (at == axis)) for at in range(part.ndim)])

    prior_memory = pad(params.prior_memory, 1)
    more = max(0, sizes.encoding + sizes.key_features - len(prior_memory)) if sizes.key_features else 0
    if more and (params.log_variance.ndim or params.variance_by_query is not None):
        raise ValueError(
            f"the memory's σ_W was learned for {len(prior_memory)} slots, and editing.key_features needs "
            f"{len(prior_memory) + more}. Set editing.key_features.count to {sizes.key_features - more} at the most."
        )
    prior_memory = jnp.pad(prior_memory, ((0, more), (0, 0)))
    place = jnp.arange(sizes.key_features)
    prior_memory = prior_memory.at[len(prior_memory) - sizes.key_features + place, sizes.encoding + place].set(1.0)
    return dataclasses.replace(
        params,
        prior_memory=prior_memory,
        variance_by_query=pad(params.variance_by_query, 0),
        variance_by_memory=pad(params.variance_by_memory, 1),
    )
