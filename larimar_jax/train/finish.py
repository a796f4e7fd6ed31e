"""The end of a run: what was trained as one file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from larimar_jax.config import Config
from larimar_jax.weights import model_file

# What an export holds in bfloat16: half the size for the largest map, whose products are summed over
# hundreds of terms.
_HALVED = {"^to_slots/kernel$": "bfloat16"}


def finish(
    path: Path,
    config: Config,
    parameters: Mapping[str, jax.Array],
    trained: list[str],
    meta: Mapping[str, Any],
) -> None:
    """Writes a trained model to `path`; every process calls it, and the first one writes.

    What a tower's source gives again is left out: frozen parameters of towers that are loaded.
    """
    towers = {"encoder": config.model.encoder, "decoder": config.model.decoder}
    loaded = tuple(f"{name}/" for name, tower in towers.items() if tower.source is not None)
    kept = {
        name: _whole(leaf)
        for name, leaf in parameters.items()
        if name in trained or not name.startswith(loaded)
    }
    if jax.process_index() != 0:
        multihost_utils.sync_global_devices("a trained model is written")
        return
    model_file.save_exported(path, kept, meta, _HALVED)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("a trained model is written")


def _whole(leaf: jax.Array) -> np.ndarray | None:
    """The array on this host, leaf by leaf; on other processes than the first it is let go of."""
    if jax.process_count() == 1:
        return np.asarray(leaf)
    found = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(found) if jax.process_index() == 0 else None
