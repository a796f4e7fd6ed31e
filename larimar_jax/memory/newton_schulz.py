"""Algorithm 1 as the released code runs it: every pseudo-inverse by 15 Newton–Schulz steps (§3).

For parity with models trained that way, and for measuring what the approximation costs.
"""

from typing import Any

from jaxtyping import Array, Float

from larimar_jax.linalg import dot, newton_schulz_pinv
from larimar_jax.memory.base import pytree, static
from larimar_jax.memory.direct import Direct


@pytree
class NewtonSchulz(Direct):
    """`Direct` with approximate pseudo-inverses of M_ref, of W₀, and of the K x C posterior memory.

    steps and log_start are the released code's number of steps and `ben_cohen_memory_init`. Nothing
    is exact here: singular values well under 0.25 are not inverted and those over 63 diverge (§3),
    so scale the latents (norm 1 to 60) and expect reads to shrink.
    """

    steps: int = static(default=15, kw_only=True)
    log_start: float = static(default=-5.0, kw_only=True)

    def _address(self, reference: Float[Array, "K C"], brief: bool) -> Any:
        if self.addressing == "pinv":
            return newton_schulz_pinv(reference, self.steps, self.log_start)
        return super()._address(reference, brief)

    def _factors(self, weights: Float[Array, "N K"], values: Float[Array, "N C"]):
        inverse = newton_schulz_pinv(weights, self.steps, self.log_start)
        if self.query == "prior":
            return inverse, None, None
        posterior = dot(inverse, values)
        return inverse, newton_schulz_pinv(posterior, self.steps, self.log_start), None
