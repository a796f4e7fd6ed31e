"""How what was stored is known again: a name for each leaf, and a checksum for each array."""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def named(tree: Any) -> dict[str, Any]:
    """Any pytree as a flat dict of readable names that are also safe as names of files."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    names = [re.sub(r"[^A-Za-z0-9_]+", ".", path).strip(".") for path in paths]
    assert len(set(names)) == len(names), "two leaves have one name in a checkpoint"
    # An optimiser without state would leave an empty item, which Orbax refuses.
    found = dict(zip(names, (leaf for _, leaf in leaves), strict=True))
    return found or {"empty": np.zeros((), np.int32)}


def unnamed(like: Any, leaves: Mapping[str, Any]) -> Any:
    """The leaves of `named` as a pytree again, of the structure of `like`."""
    names = list(named(like))
    structure = jax.tree_util.tree_structure(like)
    return structure.unflatten([leaves[name] for name in names][: structure.num_leaves])


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(array: jax.Array) -> jax.Array:
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        if array.dtype == jnp.bool_:
            return array.astype(jnp.uint32).sum(dtype=jnp.uint32)
        whole = jax.lax.bitcast_convert_type(array, bits)
        return whole.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return {name: total(array) for name, array in arrays.items()}


def array_checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Each array's bits summed modulo 2³²: on the device, and the same on every mesh."""
    return {name: int(value) for name, value in jax.device_get(_sums(dict(arrays))).items()}


def json_checksum(value: Any) -> int:
    """A CRC-32 of what JSON can hold, whatever the order and the spacing of its file."""
    # There and back first: JSON has no tuples, and its keys are texts.
    plain = json.loads(json.dumps(value))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())
