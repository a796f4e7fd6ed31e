"""AlphaEdit: MEMIT where general text hardly has keys (Fang et al. 2025, arXiv 2410.02355).

P = U Uᵀ projects on the eigenvectors of C with the least eigenvalues. With C_p the sum of k kᵀ over all
earlier edits, each layer changes by (Eq. 14)

    ΔW = (P (K Kᵀ + C_p) + λ)⁻¹ P K R = U F (Fᵀ F + λ)⁻¹ E R,      F = Uᵀ [K, K_p],

E the first n columns of 1, R as MEMIT's. So what general text has as keys keeps its values: the mean of
‖k ΔW‖² over it is tr(ΔWᵀ C ΔW) ≤ the largest eigenvalue that P leaves · ‖ΔW‖².
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from larimar_jax.editors.memit import MEMIT
from larimar_jax.editors.moments import Moments
from larimar_jax.schema import Fraction, Positive


@dataclasses.dataclass(frozen=True)
class AlphaEdit(MEMIT):
    """MEMIT's values and layers, with updates in the null space of general keys."""

    # Share of the eigenvectors of C that an edit may use, those of the least eigenvalues; the paper's
    # threshold of 2e-2 depends on the scale of a model's keys.
    free: Fraction = 0.9
    ridge: Positive = 10.0  # λ

    def directions(
        self,
        moments: Moments,
        keys: Float[np.ndarray, "I n"],
        earlier: Float[np.ndarray, "I m"],
    ) -> Float[np.ndarray, "I n"]:
        """Return B with ΔW = B R, in float64."""
        basis = self.basis(moments)
        rows = basis.T @ np.hstack([keys, earlier])
        inverse = np.linalg.inv(rows.T @ rows + self.ridge * np.eye(rows.shape[1]))
        return basis @ rows @ inverse[:, : keys.shape[1]]

    def basis(self, moments: Moments) -> Float[np.ndarray, "I m"]:
        """Return U, the eigenvectors that an edit may use."""
        eigenvectors = moments.spectrum[1]
        return eigenvectors[:, : round(self.free * len(eigenvectors))]
