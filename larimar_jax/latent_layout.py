"""The layout of what an edited memory holds of a text: encoding, features of it, code of its answer.

    [ e(text) : C | s·φ(e(text)) : F | answer code : S ]

Linear keys of C dimensions tell at most C facts apart, whatever K is. With random features φ of the
encoding (`RandomFeatures`) the product of two keys becomes

    z·z' + s² exp(−‖z − z'‖² / (2ℓ²))

and the memory holds about C + F facts before it has to blend them, in max(K, C + F) slots: those of M₀
beyond C, which an M₀ of C columns cannot use, and as many more as that takes. M₀ is extended so that it
reads every text back as itself as before. Without features and answer codes all of this is e(text).
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
    """The sizes of the parts: C, F and S."""

    encoding: int
    key_features: int
    answer_code: int

    @property
    def size(self) -> int:
        """The size of a latent, C + F + S."""
        return self.encoding + self.key_features + self.answer_code


def layout(config: Config) -> LatentLayout:
    """Return the layout of a model as it is edited."""
    features = config.editing.key_features
    count = 0 if features is None else features.count
    return LatentLayout(config.model.latent, count, answer_code.size(config.editing.answer_code))


def features(
    config: KeyFeaturesConfig | None, encodings: Float[Array, "n C"]
) -> Float[Array, "n F"]:
    """Return s·φ of encodings; F is 0 without a config. Saved memories depend on them: they never
    change."""
    if config is None:
        return jnp.zeros((len(encodings), 0), jnp.float32)
    key = jax.random.key(0, impl="threefry2x32")
    directions = jax.random.normal(key, (config.count, encodings.shape[1]), jnp.float32)
    return config.scale * RandomFeatures(config.length).weigh(directions, encodings)


@functools.partial(jax.jit, static_argnums=1)
def extend_prior(params: MemoryParams, sizes: LatentLayout) -> MemoryParams:
    """Return a model's memory for all parts: the last F slots of M₀ stand for the features, one each,
    and M₀ is zero at the answer code. M_ref is M₀.

    Raises:
      ValueError: σ_W is of slots or depends on M, and there are more slots than it was learned for.
    """

    def pad(part: Array | None, axis: int) -> Array | None:
        if part is None:
            return None
        more = sizes.size - sizes.encoding
        return jnp.pad(part, [(0, more * (at == axis)) for at in range(part.ndim)])

    slots, count = len(params.prior_memory), sizes.key_features
    more = max(0, sizes.encoding + count - slots) if count else 0
    if more and (params.log_variance.ndim or params.variance_by_query is not None):
        raise ValueError(
            f"the memory's σ_W was learned for {slots} slots, and editing.key_features needs "
            f"{slots + more}. Set editing.key_features.count to {count - more} at the most."
        )
    prior_memory = jnp.pad(pad(params.prior_memory, 1), ((0, more), (0, 0)))
    place = jnp.arange(count)
    prior_memory = prior_memory.at[slots + more - count + place, sizes.encoding + place].set(1.0)
    return dataclasses.replace(
        params,
        prior_memory=prior_memory,
        variance_by_query=pad(params.variance_by_query, 0),
        variance_by_memory=pad(params.variance_by_memory, 1),
    )
