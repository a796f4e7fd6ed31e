"""What is kept of a run. The only file that knows Orbax.

A checkpoint is five items: `params` (the trained ones), `memory` (M₀ and log σ_W²), `optimizer`,
`data` (the iterator's state) and `meta` (JSON: config, versions, and checksums of all, itself too).
It is written to a temporary folder and renamed, so that a run killed at any moment finds only whole
ones; the checksums find what was damaged later, on the disk. One is written at a time, while steps
go on: a kill loses the one that is being written, and none before it.

    runs/NAME/checkpoints/STEP/{params,memory,optimizer,data,meta}
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from larimar_jax.train.checksums import array_checksums, json_checksum, named, unnamed
from larimar_jax.train.environment import describe

ARRAYS = ("params", "memory", "optimizer")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or there are some and none of them can be restored."""


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
        self._kept = _Kept(keep, best, {})
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
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
        for step in self.steps():
            self._kept.judge(step, _evaluation(self.directory / str(step)))

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
        Raises:
            CheckpointError: this one, or the one before it, could not be written.
        """
        trees = dict(params=params, memory=memory, optimizer=optimizer)
        items = {name: named(tree) for name, tree in trees.items()}
        sums: dict[str, Any] = {n: array_checksums(arrays) for n, arrays in items.items()}
        meta = {
            **meta,
            "step": step,
            "processes": jax.process_count(),
            "evaluation": None if evaluation is None else dict(evaluation),
            "environment": describe(),
            "checksums": {**sums, "data": json_checksum(data.get_state())},
        }
        with self._written():
            # Here and not in Orbax's own `save`, so that the step that failed is the one named.
            self._manager.wait_until_finished()
            self._kept.judge(step, evaluation)
            self._saving = step
            begun = self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(arrays) for name, arrays in items.items()},
                    data=grain.checkpoint.CheckpointSave(data),
                    meta=ocp.args.JsonSave({**meta, "checksum": json_checksum(meta)}),
                ),
            )
            if not begun:
                raise RuntimeError(f"Orbax skipped it: there are {self.steps()[-3:]} already")

    def restore(
        self,
        *,
        params: Mapping[str, jax.ShapeDtypeStruct],
        memory: Mapping[str, jax.ShapeDtypeStruct],
        optimizer: Any,
        data: grain.DatasetIterator,
        check: Callable[[Mapping[str, Any]], None] = lambda meta: None,
        best: bool = False,
    ) -> Restored | None:
        """The newest checkpoint that is whole; None where the run has none yet.

        A damaged one is said on stderr, moved aside as `damaged-STEP` and never deleted; the one
        before it is taken. What one process cannot read is damaged for all.

        Args:
            params, memory, optimizer: the same pytrees as saved, of ShapeDtypeStructs whose
                `sharding` says where each array goes: any mesh, not only the one that saved.
            data: the iterator to move to where it was.
            check: called with the meta; what it raises is passed on and is no damage.
            best: take `self.best` where there is one, and the newest only where it is damaged.
        Raises:
            CheckpointError: there are checkpoints and none is whole; names why for each.
        """
        failures = []
        newest = self.steps()[::-1]
        first = [self.best] if best and self.best is not None else []
        for step in [*first, *(step for step in newest if step not in first)]:
            folder = self.directory / str(step)
            meta, damage = _tried(lambda folder=folder: _meta(folder))
            if damage is None:
                check(meta)
                found, damage = _tried(
                    lambda step=step, meta=meta: self._arrays(
                        step, meta, params, memory, optimizer, data
                    )
                )
            if damage is not None:
                failures.append((step, damage))
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
        # Each process takes its share of every batch, so one's count of batches holds for all.
        state = self.directory / str(step) / "data" / f"process_0-of-{meta['processes']}.json"
        place = json.loads(state.read_text(encoding="utf-8"))
        if meta["checksums"].get("data") not in (None, json_checksum(place)):
            raise ValueError("checksum of data differs")
        places = {n: ocp.args.StandardRestore(named(tree)) for n, tree in wanted.items()}
        if meta["processes"] == jax.process_count():
            places["data"] = grain.checkpoint.CheckpointRestore(data)
        restored = self._manager.restore(step, args=ocp.args.Composite(**places))
        if "data" not in places:
            data.set_state(place)
        for name in ARRAYS:
            sums = array_checksums(restored[name])
            wrong = sorted(k for k, v in meta["checksums"][name].items() if sums.get(k) != v)
            if wrong:
                raise ValueError(f"checksum of {name} differs: {', '.join(wrong)}")
        return [unnamed(tree, restored[name]) for name, tree in wanted.items()]

    def _set_aside(self, failures: list[tuple[int, Exception]], outcome: str) -> None:
        for step, error in failures:
            # On stderr whatever logging is set to: work was lost.
            said = f"DAMAGED checkpoint of step {step} in {self.directory}: {outcome}"
            print(f"larimar: {said} ({_brief(error)})", file=sys.stderr, flush=True)
            if jax.process_index() == 0:
                aside = self.directory / f"damaged-{step}"
                number = 1
                while aside.exists():
                    number += 1
                    aside = self.directory / f"damaged-{step}-{number}"
                (self.directory / str(step)).rename(aside)
        if failures:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are put aside")
            self._manager.reload()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint; None where none was judged."""
        return self._kept.best_of(self.steps())

    def wait(self) -> None:
        """Returns when the last save is on the disk.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait`, and ends Orbax's threads."""
        with self._written():
            self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # Another process is gone; nothing is wrong with the disk.
        except Exception as error:
            # A full disk shows as ValueError, OSError or RuntimeError, by who was writing.
            whole = ", ".join(map(str, _steps(self.directory))) or "none"
            raise CheckpointError(
                f"the checkpoint of step {self._saving} could not be written to {self.directory}: "
                f"{_brief(error)}\nWhole ones there: {whole}. Is the disk or a "
                "quota full, or the folder gone or read-only? Make room; the same command then goes "
                "on from the last of them."
            ) from error


@dataclasses.dataclass
class _Kept:
    """Orbax's policy on what to keep: the newest, and the one with the least value of a term.

    Its own BestN forgets: it stores evaluations only for `best_fn`, which a policy excludes, so
    that a run that goes on would delete the best. Here they come from each checkpoint's meta.
    """

    keep: int
    term: str | None
    values: dict[int, float]

    def judge(self, step: int, evaluation: Mapping[str, float] | None) -> None:
        """Remembers the term; a NaN, or no evaluation, cannot be the best."""
        value = math.nan if self.term is None else (evaluation or {}).get(self.term, math.nan)
        self.values.pop(step, None)
        if not math.isnan(value):
            self.values[step] = value

    def best_of(self, steps: Sequence[int]) -> int | None:
        judged = [step for step in steps if step in self.values]
        return min(judged, key=self.values.__getitem__, default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Orbax asks once a save has begun, and deletes the others when that one is whole."""
        steps = [info.step for info in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best_of(steps)}
        return [step in kept for step in steps]


def _tried(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """(what was read, None) or (None, why not), the same of the two on all processes."""
    found, damage = None, None
    try:
        found = read()
    except Exception as error:  # Damage shows as nearly any type; who calls reports it.
        damage = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(damage is not None)).reshape(-1)
        if damage is None and failed.any():
            damage = ValueError(f"process {int(failed.argmax())} could not read it")
    return (found, None) if damage is None else (None, damage)


def _evaluation(folder: Path) -> Mapping[str, float] | None:
    """What a checkpoint was judged by; None where its meta is damaged, which a restore reports."""
    try:
        return _meta(folder)["evaluation"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _meta(folder: Path) -> dict[str, Any]:
    meta = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    said = meta.pop("checksum", None)
    # The first checkpoints had no checksum of their meta, and none of the iterator's state.
    if said not in (None, json_checksum(meta)):
        raise ValueError("checksum of meta differs")
    return meta


def _steps(folder: Path) -> list[int]:
    """The checkpoints in it, ascending; one that is being written has another kind of name."""
    return sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit())


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every trained parameter of a checkpoint, M₀ among them, by '/'-joined path.

    Args:
        path: the folder of a run, or of one of its checkpoints.
    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: it is damaged.
    """
    folder, found = _step_folder(path), {}
    with _readable(folder):
        for item in ("params", "memory"):
            metadata = _reader().metadata(folder / item).item_metadata
            if metadata is None:
                raise ValueError(f"no metadata of {item}")
            found |= {n.replace(".", "/"): tuple(leaf.shape) for n, leaf in metadata.tree.items()}
    return found


def load_parts(path: Path, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Some parameters of a checkpoint, and of no other is anything read.

    Args:
        path: as `shapes`.
        like: arrays or ShapeDtypeStructs with a sharding, by path: what to read, and where to.
    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: they are damaged, or other than `like` says; names which.
    """
    folder = _step_folder(path)
    with _readable(folder):
        return _parts(folder, like)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Damage shows as nearly any type.
        raise CheckpointError(
            f"{folder} cannot be read: {_brief(error)}\nIt may be damaged; give the folder of "
            "another checkpoint."
        ) from error


def _parts(folder: Path, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    meta, found = _meta(folder), {}
    for item in ("params", "memory"):
        inside = item == "memory"
        mine = {name: leaf for name, leaf in like.items() if name.startswith("memory/") == inside}
        if not mine:
            continue
        leaves = {name.replace("/", "."): leaf for name, leaf in mine.items()}
        wanted = {
            name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
            for name, leaf in leaves.items()
        }
        read = _reader().restore(
            folder / item,
            args=ocp.args.PyTreeRestore(item=leaves, restore_args=wanted, partial_restore=True),
        )
        sums = array_checksums(read)
        wrong = sorted(n for n in leaves if sums[n] != meta["checksums"][item][n])
        if wrong:
            raise ValueError(f"checksum of {', '.join(wrong)} differs")
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
    steps = _steps(inside)
    if not steps:
        raise FileNotFoundError(
            f"there is no checkpoint in {path}; give the folder of a run, or that of one checkpoint"
        )
    return inside / str(steps[-1])


def _brief(error: Exception) -> str:
    said = " ".join(str(error).split())
    if len(said) > 400:  # What the system says comes last.
        said = f"{said[:200]} … {said[-200:]}"
    return f"{type(error).__name__}: {said}"
