"""What is kept of a run. The only file that knows Orbax.

A checkpoint is five items: `params` (the trained ones), `memory` (M₀ and log σ_W²), `optimizer`,
`data` (the iterator's state) and `meta` (JSON: config, versions, and a checksum of every array).
It is written to a temporary folder and renamed, so that a run killed at any moment finds only whole
ones; the checksums find what was damaged later, on the disk.

    runs/NAME/checkpoints/STEP/{params,memory,optimizer,data,meta}
"""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from larimar_jax.train.environment import describe

ARRAYS = ("params", "memory", "optimizer")

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """Checkpoints exist and none of them can be restored."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held; the data iterator was moved in place."""

    step: int
    params: dict[str, jax.Array]
    memory: dict[str, jax.Array]
    optimizer: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `directory`: the newest `keep` of them, and the best.

    best: the evaluation's term whose least value makes a checkpoint the best; None keeps none for
    that. Only those that were saved with an evaluation can be it.
    """

    def __init__(self, directory: str | Path, keep: int, best: str | None = None):
        # Orbax fills its log with every file it opens.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_policy(keep, best),
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in ARRAYS},
                "meta": ocp.JsonCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
            },
        )

    def save(
        self,
        step: int,
        *,
        params: Mapping[str, jax.Array],
        memory: Mapping[str, jax.Array],
        optimizer: Any,
        data: grain.DatasetIterator,
        meta: Mapping[str, Any],
        evaluation: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write the checkpoint of `step`; arrays may be donated once this returns.

        Args:
            params, memory: arrays by '/'-joined path.
            optimizer: the optimiser's pytree.
            data: the iterator that yields the batch of `step` next.
            meta: what JSON can hold; `step`, `evaluation`, `environment` and `checksums` are added.
            evaluation: the held-out terms of this step, where there was an evaluation.
        """
        items = dict(params=_named(params), memory=_named(memory), optimizer=_named(optimizer))
        sums = {name: _checksums(arrays) for name, arrays in items.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(arrays) for name, arrays in items.items()},
                data=grain.checkpoint.CheckpointSave(data),
                meta=ocp.args.JsonSave(
                    {
                        **meta,
                        "step": step,
                        "processes": jax.process_count(),
                        "evaluation": None if evaluation is None else dict(evaluation),
                        "environment": describe(),
                        "checksums": sums,
                    }
                ),
            ),
            metrics=None if evaluation is None else dict(evaluation),
        )

    def restore(
        self,
        *,
        params: Mapping[str, jax.ShapeDtypeStruct],
        memory: Mapping[str, jax.ShapeDtypeStruct],
        optimizer: Any,
        data: grain.DatasetIterator,
        check: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> Restored | None:
        """The newest checkpoint that is whole; None where the run has none yet.

        A damaged one is said in the log, moved aside as `damaged-STEP` and never deleted; the one
        before it is taken.

        Args:
            params, memory, optimizer: the same pytrees as saved, of ShapeDtypeStructs whose
                `sharding` says where each array goes: any mesh, not only the one that saved.
            data: the iterator to move to where it was.
            check: called with the meta; what it raises is passed on and is no damage.
        Raises:
            CheckpointError: there are checkpoints and none is whole; names why for each.
        """
        failures = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=_JSON)).meta
            except Exception as error:  # Damage shows as nearly any type; it is reported below.
                failures.append((step, error))
                continue
            check(meta)
            try:
                found = self._arrays(step, meta, params, memory, optimizer, data)
            except Exception as error:
                failures.append((step, error))
                continue
            self._set_aside(failures, f"went back to the checkpoint of step {step}")
            return Restored(step, *found, meta)
        if failures:
            reasons = "\n  ".join(f"step {step}: {_brief(error)}" for step, error in failures)
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be restored:\n  {reasons}\n"
                "They may be damaged, or of another version. Move the folder away to start anew."
            )
        return None

    def _arrays(self, step, meta, params, memory, optimizer, data):
        wanted = dict(params=params, memory=memory, optimizer=optimizer)
        places = {n: ocp.args.StandardRestore(_named(tree)) for n, tree in wanted.items()}
        if meta["processes"] == jax.process_count():
            places["data"] = grain.checkpoint.CheckpointRestore(data)
        restored = self._manager.restore(step, args=ocp.args.Composite(**places))
        if "data" not in places:
            # Each process takes its share of every batch, so one's count of batches holds for all.
            name = f"process_0-of-{meta['processes']}.json"
            state = (self.directory / str(step) / "data" / name).read_text(encoding="utf-8")
            data.set_state(json.loads(state))
        for name in ARRAYS:
            sums = _checksums(restored[name])
            wrong = sorted(k for k, v in meta["checksums"][name].items() if sums.get(k) != v)
            if wrong:
                raise ValueError(f"checksum of {name} differs: {', '.join(wrong)}")
        return [_unnamed(tree, restored[name]) for name, tree in wanted.items()]

    def _set_aside(self, failures: list[tuple[int, Exception]], outcome: str) -> None:
        for step, error in failures:
            # On stderr whatever logging is set to: work was lost.
            log.warning("DAMAGED checkpoint of step %d (%s): %s", step, _brief(error), outcome)
            if jax.process_index() == 0:
                aside = self.directory / f"damaged-{step}"
                number = 1
                while aside.exists():
                    number += 1
                    aside = self.directory / f"damaged-{step}-{number}"
                (self.directory / str(step)).rename(aside)
        if failures:
            self._manager.reload()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Returns when the last save is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        self._manager.close()


_JSON = ocp.args.JsonRestore()


def _policy(keep: int, best: str | None) -> Any:
    newest = preservation_policy.LatestN(keep)
    if best is None:
        return newest
    least = preservation_policy.BestN(
        # The best is the highest to Orbax.
        get_metric_fn=lambda evaluation: -evaluation[best],
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    return preservation_policy.AnyPreservationPolicy([newest, least])


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every trained parameter of a checkpoint, M₀ among them, by '/'-joined path.

    Args:
        path: the folder of a run, or of one of its checkpoints.
    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    found = {}
    for item in ("params", "memory"):
        metadata = _reader().metadata(_step_folder(path) / item).item_metadata.tree
        found |= {name.replace(".", "/"): tuple(leaf.shape) for name, leaf in metadata.items()}
    return found


def load_parts(path: Path, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Some parameters of a checkpoint, and of no other is anything read.

    Args:
        path: as `shapes`.
        like: arrays or ShapeDtypeStructs with a sharding, by path: what to read, and where to.
    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: they are damaged.
    """
    folder, found = _step_folder(path), {}
    meta = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    for item in ("params", "memory"):
        inside = item == "memory"
        mine = {name: leaf for name, leaf in like.items() if name.startswith("memory/") == inside}
        if not mine:
            continue
        named = {name.replace("/", "."): leaf for name, leaf in mine.items()}
        wanted = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in named.items()
        }
        read = _reader().restore(
            folder / item,
            args=ocp.args.PyTreeRestore(item=named, restore_args=wanted, partial_restore=True),
        )
        sums = _checksums(read)
        wrong = sorted(n for n in named if sums[n] != meta["checksums"][item][n])
        if wrong:
            raise CheckpointError(f"{folder} is damaged: checksum of {', '.join(wrong)} differs")
        found |= {name: read[name.replace("/", ".")] for name in mine}
    return found


@functools.cache
def _reader() -> ocp.Checkpointer:
    # Made when it is needed: it asks JAX for its devices, and several processes join before that.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _step_folder(path: Path) -> Path:
    """The folder itself, or that of the newest checkpoint in it."""
    path = Path(path).absolute()
    if (path / "params").is_dir():
        return path
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [int(child.name) for child in inside.glob("*") if child.name.isdigit()]
    if not steps:
        raise FileNotFoundError(
            f"there is no checkpoint in {path}; give the folder of a run, or that of one checkpoint"
        )
    return inside / str(max(steps))


def _named(tree: Any) -> dict[str, Any]:
    """Any pytree as a flat dict of readable names that are also safe as names of files."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    names = [re.sub(r"[^A-Za-z0-9_]+", ".", path).strip(".") for path in paths]
    assert len(set(names)) == len(names), "two leaves have one name in a checkpoint"
    # An optimiser without state would leave an empty item, which Orbax refuses.
    found = dict(zip(names, (leaf for _, leaf in leaves), strict=True))
    return found or {"empty": np.zeros((), np.int32)}


def _unnamed(like: Any, named: Mapping[str, Any]) -> Any:
    names = list(_named(like))
    structure = jax.tree_util.tree_structure(like)
    return structure.unflatten([named[name] for name in names][: structure.num_leaves])


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(array: jax.Array) -> jax.Array:
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        if array.dtype == jnp.bool_:
            return array.astype(jnp.uint32).sum(dtype=jnp.uint32)
        whole = jax.lax.bitcast_convert_type(array, bits)
        return whole.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return {name: total(array) for name, array in arrays.items()}


def _checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Each array's bits summed modulo 2³²: on the device, and the same on every mesh."""
    return {name: int(value) for name, value in jax.device_get(_sums(dict(arrays))).items()}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
