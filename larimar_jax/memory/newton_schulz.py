"""Algorithm 1 as the released code runs it: every pseudo-inverse by 15 Newton–Schulz steps (§3).

For parity with models trained that way, and for measuring what the approximation costs.
"""

from typing import Any

from jaxtyping import Array, Float

from larimar_jax.linalg import dot
from larimar_jax.memory.addressing import PseudoInverse, newton_schulz_pinv
from larimar_jax.memory.direct import Direct
from larimar_jax.memory.pytrees import Latents, Weights, pytree, static


@pytree
class NewtonSchulz(Direct):
    """`Direct` with approximate pseudo-inverses of M_ref, of W₀, and of the K x C posterior memory.

    steps and log_start are the released code's number of steps and `ben_cohen_memory_init`. Nothing
    is exact here: singular values well under 0.25 are not inverted and those over 63 diverge (§3),
    so scale the latents (norm 1 to 60) and expect reads to shrink.
    """

    steps: int = static(default=15, kw_only=True)
    log_start: float = static(default=-5.0, kw_only=True)

    def _address(self, reference: Float[Array, "K C"], few_encodings: bool) -> Any:
        if type(self.addressing) is PseudoInverse:
            return self._inverse(reference)
        return super()._address(reference, few_encodings)

    def _factors(self, weights: Weights, values: Latents):
        inverse = self._inverse(weights)
        if self.query == "prior":
            return inverse, None, None
        return inverse, self._inverse(dot(inverse, values)), None

    def _inverse(self, matrix: Float[Array, "m n"]) -> Float[Array, "n m"]:
        return newton_schulz_pinv(matrix, self.steps, self.log_start)
