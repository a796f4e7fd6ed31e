"""σ_W of q(W), in the five parametrisations of the released code (§3, `w_logvar_setting`); samples of W.

    0 scalar   log σ_W² = b                      one number
    1 slot     log σ_W² = b                      one number per slot
    2 query    log σ_W² = b + z A                one number per query and slot
    3 memory   log σ_W² = b + vec(M) B           one number per memory and slot
    4 both     log σ_W² = b + z A + vec(M) B

z is the query, M the memory that is read. A and B start at zero, so that σ_W starts as the config
sets it in every one of them. B has K²C numbers: 805 MB in float32 at the paper's sizes.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from larimar_jax.linalg import dot

Setting = Literal["scalar", "slot", "query", "memory", "both"]
# By the number that the released code gives them.
SETTINGS: tuple[Setting, ...] = ("scalar", "slot", "query", "memory", "both")


def init(
    setting: Setting, slots: int, latent: int, start: float | Float[Array, ""]
) -> tuple[Float[Array, "*K"], Float[Array, "C K"] | None, Float[Array, "K C K"] | None]:
    """Return b (a scalar for 'scalar', else [K]), A and B, float32; None for what is not used."""
    constant = jnp.full(() if setting == "scalar" else (slots,), start, jnp.float32)
    by_query = jnp.zeros((latent, slots), jnp.float32)
    return (
        constant,
        by_query if setting in ("query", "both") else None,
        jnp.zeros((slots, latent, slots), jnp.float32) if setting in ("memory", "both") else None,
    )


def log_variance(
    params: Any, queries: Float[Array, "Q C"], memory: Float[Array, "K C"] | None
) -> Float[Array, "Q K"]:
    """Return log σ_W² of Q reads by `MemoryParams`, float32; M may be None where B is."""
    slots = len(params.prior_memory)
    total = jnp.broadcast_to(params.log_variance, (len(queries), slots))
    if params.variance_by_query is not None:
        total = total + dot(queries, params.variance_by_query)
    if params.variance_by_memory is not None:
        total = total + dot(memory.reshape(-1), params.variance_by_memory.reshape(-1, slots))
    return total


def sample(
    mean: Float[Array, "Q K"], log_variance: Float[Array, "Q K"], rng: PRNGKeyArray | None
) -> Float[Array, "Q K"]:
    """Sample W ~ N(W̄, σ_W²), elementwise (Algorithm 1); without a key return W̄ itself."""
    if rng is None:
        return mean
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(rng, mean.shape, mean.dtype)
