"""Random numbers of a benchmark's cases: each has its own, in whatever order it is computed."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Key

# For settings: a run that draws in another way is another run.
SCHEME = "case_id folded into the seed's key"


def keys(seed: int, case_ids: Sequence[int]) -> Key[Array, " n"]:
    """The key of each case: the seed's, with the case's id folded in."""
    folded = np.asarray([number % 2**32 for number in case_ids], np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), folded)
