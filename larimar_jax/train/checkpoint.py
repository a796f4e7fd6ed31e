"""Checkpoints of a run. The only file that knows Orbax.

A checkpoint has four items: `params` (the trained ones), `memory` (M₀ and log σ_W²), `optimizer` and
`meta` (JSON: config, versions, the place in the data, and checksums of all, itself too). It is written
to a temporary folder and renamed, so that a run killed at any moment leaves whole checkpoints only;
the checksums detect later damage on the disk. One checkpoint is written at a time, while steps go on:
a kill loses the one that is being written, and none before it.

    runs/NAME/checkpoints/STEP/{params,memory,optimizer,meta}
"""

import contextlib
import functools
import json
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from larimar_jax.train.logging import environment
from larimar_jax.train.step import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or several of which none can be restored."""


class Checkpoints:
    """The checkpoints of one run, in `directory`: the newest `keep` of them, and the best.

    As a context. best: the evaluation's term whose least value makes a checkpoint the best; only one
    that was saved with an evaluation can be it. None keeps none for that.
    """

    def __init__(self, directory: str | Path, keep: int, best: str | None = None):
        # Orbax fills its log with every file it opens.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.directory = Path(directory).absolute()
        self._policy = _NewestAndBest(keep, best)
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        for step in self.steps():  # A restore reports damage.
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._policy.judge(step, read_meta(self.directory / str(step))["evaluation"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            with self._reported():
                self._manager.close()  # Waits for the last save, and ends Orbax's threads.
        except CheckpointError as error:
            if kind is None:
                raise
            # What ended the run is reported last, and not hidden by this.
            print(f"larimar: {error}", file=sys.stderr)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        batches: grain.DatasetIterator,
        meta: Mapping[str, Any],
        evaluation: Mapping[str, float] | None = None,
    ) -> None:
        """Start to write the checkpoint of `step`; arrays may be donated once this returns.

        Args:
            batches: the iterator that yields the batch of `step` next.
            meta: what JSON can hold; step, evaluation, environment, shapes and checksums are added.
            evaluation: the held-out terms of this step, where there was an evaluation.
        Raises:
            CheckpointError: this one, or the one before it, could not be written.
        """
        # Each process takes its share of every batch, so the place in one's data holds for all.
        meta = {**meta, "step": step, "evaluation": evaluation, "data": batches.get_state()}
        args = _save_args(_items(state), meta | {"environment": environment()})
        with self._reported():
            # Here and not in Orbax's own `save`, so that the step that failed is the one named.
            self._manager.wait_until_finished()
            self._policy.judge(step, evaluation)
            self._saving = step
            if not self._manager.save(step, args=args):
                raise RuntimeError(f"Orbax skipped it: there are {self.steps()[-3:]} already")

    def wait(self) -> None:
        """Return when the last save is on the disk; CheckpointError where it cannot be written."""
        with self._reported():
            self._manager.wait_until_finished()

    def restore(
        self,
        like: TrainState,
        batches: grain.DatasetIterator,
        check: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Return (state, meta) of the newest whole checkpoint; None where the run has none yet.

        A damaged one is reported on stderr, moved aside as `damaged-STEP` and never deleted; the one
        before it is taken. What one process cannot read is damaged for all.

        Args:
            like: of ShapeDtypeStructs whose `sharding` is where each array goes: any mesh, not only
                the one that saved.
            batches: the iterator to move to its place.
            check: called with the meta; what it raises is passed on and is no damage.
        Raises:
            CheckpointError: there are checkpoints and none is whole; names why for each.
        """
        failures: list[tuple[int, Exception]] = []
        for step in self.steps()[::-1]:
            folder = self.directory / str(step)
            meta, damage = agreed(functools.partial(read_meta, folder))
            if damage is None:
                check(meta)
                state, damage = agreed(functools.partial(_read_state, folder, meta, like))
            if damage is not None:
                failures.append((step, damage))
                continue
            batches.set_state(meta["data"])
            self._set_aside(failures, step)
            return state, meta
        if failures:
            reasons = "\n  ".join(f"step {step}: {brief(error)}" for step, error in failures)
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be restored:\n  {reasons}\n"
                "They may be damaged, or of another version. Move the folder away to start anew."
            )
        return None

    def _set_aside(self, failures: list[tuple[int, Exception]], restored: int) -> None:
        for step, error in failures:
            # On stderr whatever logging is set to: work was lost.
            print(
                f"larimar: DAMAGED checkpoint of step {step} in {self.directory}: went back to the "
                f"checkpoint of step {restored} ({brief(error)})",
                file=sys.stderr,
                flush=True,
            )
            if jax.process_index() == 0:
                aside, number = self.directory / f"damaged-{step}", 1
                while aside.exists():
                    number += 1
                    aside = self.directory / f"damaged-{step}-{number}"
                (self.directory / str(step)).rename(aside)
        if failures:
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
            self._manager.reload()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # Another process is gone; nothing is wrong with the disk.
        except Exception as error:
            # A full disk shows as ValueError, OSError or RuntimeError, by which code was writing.
            raise CheckpointError(
                f"the checkpoint of step {self._saving} could not be written to {self.directory}: "
                f"{brief(error)}\nWhole ones there: "
                f"{', '.join(map(str, _steps(self.directory))) or 'none'}. Is the disk or a quota "
                "full, or the folder gone or read-only? Make room; the same command then goes on from "
                "the last of them."
            ) from error


class _NewestAndBest:
    """Orbax's policy on what to keep: the newest, and the one with the least value of a term.

    Orbax's own BestN stores evaluations only for `best_fn`, which a policy excludes, so that a
    resumed run would delete the best. Here they come from each checkpoint's meta.
    """

    def __init__(self, keep: int, term: str | None):
        self._keep, self._term, self._values = keep, term, {}

    def judge(self, step: int, evaluation: Mapping[str, float] | None) -> None:
        """Remember the term; a NaN, or no evaluation, cannot be the best."""
        value = (evaluation or {}).get(self._term, math.nan)
        self._values[step] = math.inf if math.isnan(value) else value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Answer Orbax, which asks once a save has begun and deletes the others when it is whole."""
        values = {info.step: self._values.get(info.step, math.inf) for info in checkpoints}
        newest, best = sorted(values)[-self._keep :], min(values, key=values.__getitem__)
        return [s in newest or (s == best and v < math.inf) for s, v in values.items()]


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """Return a state's items by name; M₀ and log σ_W² are one of their own."""
    memory = {name: leaf for name, leaf in state.params.items() if name.startswith("memory/")}
    params = {name: leaf for name, leaf in state.params.items() if name not in memory}
    rest = named((state.optimizer, state.average, state.loss))
    return dict(params=params, memory=memory, optimizer=rest)


def _read_state(folder: Path, meta: Mapping[str, Any], like: TrainState) -> TrainState:
    items = _items(like)
    if more := sorted(f"{i}/{n}" for i in items for n in meta["checksums"][i] if n not in items[i]):
        raise ValueError(f"arrays that this run does not have: {', '.join(more)}")
    arrays = {item: read_item(folder, item, leaves, meta) for item, leaves in items.items()}
    params = {**arrays["params"], **arrays["memory"]}
    rest = unnamed((like.optimizer, like.average, like.loss), arrays["optimizer"])
    step = jax.device_put(np.full(like.step.shape, meta["step"], np.int32), like.step.sharding)
    return TrainState(step, {name: params[name] for name in like.params}, *rest)


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves of any pytree by readable names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}
    assert len(names) == len(leaves), "two leaves have one name in a checkpoint"
    return names


def unnamed(like: Any, leaves: Mapping[str, Any]) -> Any:
    """Return the leaves of `named` as a pytree again, of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])


@jax.jit
def _bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def bit_sum(array: jax.Array) -> jax.Array:
        if array.dtype != jnp.bool_:
            bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
            array = jax.lax.bitcast_convert_type(array, bits)
        return array.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(bit_sum, arrays)


def array_checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return each array's bits summed modulo 2³²: on the device, and the same on every mesh."""
    return jax.tree.map(int, jax.device_get(_bit_sums(dict(arrays))))


def _json_checksum(value: Any) -> int:
    """Return a CRC-32 of what JSON can hold, whatever the order and the spacing of its file."""
    # There and back first: JSON has no tuples, and its keys are texts.
    return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())


def _save_args(items: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> Any:
    """Return Orbax's arguments to save items of arrays by name, and a meta with shapes and checksums."""
    shapes = {i: {n: list(a.shape) for n, a in arrays.items()} for i, arrays in items.items()}
    sums = {item: array_checksums(arrays) for item, arrays in items.items()}
    meta = {**meta, "shapes": shapes, "checksums": sums}
    meta["checksum"] = _json_checksum(meta)
    # Orbax refuses an item without arrays, such as the memory of a run that freezes all of it.
    saved = {item: ocp.args.StandardSave(dict(a)) for item, a in items.items() if a}
    return ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta))


def write(folder: Path, items: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write items of arrays by name, and a meta, to a new folder: whole or not at all."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder, args=_save_args(items, meta))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return a folder's meta; OSError, ValueError or KeyError where it is damaged."""
    meta = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or meta.pop("checksum") != _json_checksum(meta):
        raise ValueError("checksum of meta differs")
    return meta


def read_item(
    folder: Path, item: str, like: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Return arrays of one item by name, each with the shape, dtype and sharding of `like`.

    Raises:
        ValueError: a checksum differs. Other damage shows as nearly any exception.
    """
    if not like:
        return {}

    def place(leaf: Any) -> ocp.ArrayRestoreArgs:
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = getattr(leaf, "sharding", None) or alone
        return ocp.ArrayRestoreArgs(sharding=where, global_shape=leaf.shape, dtype=leaf.dtype)

    places = {name: place(leaf) for name, leaf in like.items()}
    args = ocp.args.PyTreeRestore(item=dict(like), restore_args=places, partial_restore=True)
    # Built here: a reader asks JAX for its devices, and several processes join before that.
    arrays = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(folder / item, args=args)
    sums, saved = array_checksums(arrays), meta["checksums"][item]
    if wrong := sorted(name for name in like if sums[name] != saved.get(name)):
        raise ValueError(f"checksum of {item} differs: {', '.join(wrong)}")
    return arrays


def agreed(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return (what was read, None) or (None, why not), the same of the two on all processes."""
    try:
        result, damage = read(), None
    except Exception as error:  # Damage shows as nearly any type; the caller reports it.
        result, damage = None, error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(damage is not None)).reshape(-1)
        if damage is None and failed.any():
            damage = ValueError(f"process {int(failed.argmax())} could not read it")
    return (result, None) if damage is None else (None, damage)


def brief(error: Exception) -> str:
    """Return an exception in one line of at most about 400 characters."""
    text = " ".join(str(error).split())  # The system's own words come last.
    text = text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}"
    return f"{type(error).__name__}: {text}"


def _steps(folder: Path) -> list[int]:
    """Return the checkpoints in a folder, ascending; one that is being written has another name."""
    return sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit())


def newest(path: Path) -> Path:
    """Return the folder of a checkpoint: `path` itself, or the newest in it or in its checkpoints/.

    Raises:
        FileNotFoundError: there is none.
    """
    if (path / "meta").is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not _steps(folder):
        raise FileNotFoundError(
            f"there is no checkpoint in {path}; name the folder of a run, or of one checkpoint"
        )
    return folder / str(_steps(folder)[-1])
