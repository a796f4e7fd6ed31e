"""Checkpoints of a run. The only file that knows Orbax.

A checkpoint has four items: `params` (the trained ones), `memory` (M₀ and log σ_W²), `optimizer` and
`meta` (JSON: config, versions, the place in the data, and checksums of all, itself too). It is written
to a temporary folder and renamed, so that a run killed at any moment leaves whole checkpoints only;
the checksums detect later damage on the disk. One checkpoint is written at a time, while steps go on:
a kill loses the one that is being written, and none before it.

    runs/NAME/checkpoints/STEP/{params,memory,optimizer,meta}
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import re
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

from larimar_jax import scope
from larimar_jax.config import StartConfig
from larimar_jax.train.logging import environment
from larimar_jax.train.step import TrainState
from larimar_jax.weights import model_file

ITEMS = ("params", "memory", "optimizer")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or several of which none can be restored."""


class Checkpoints:
    """The checkpoints of one run, in `directory`: the newest `keep` of them, and the best.

    best: the evaluation's term whose least value makes a checkpoint the best; None keeps none for
    that. Only a checkpoint that was saved with an evaluation can be the best.
    """

    def __init__(self, directory: str | Path, keep: int, best: str | None = None):
        # Orbax fills its log with every file it opens.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.directory = Path(directory).absolute()
        self._policy = _NewestAndBest(keep, best, {})
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )
        for step in self.steps():
            with contextlib.suppress(
                OSError, ValueError, KeyError
            ):  # A restore reports the damage.
                self._policy.judge(step, read_meta(self.directory / str(step))["evaluation"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            # What ended the run is reported last, and not hidden by this.
            print(f"larimar: {error}", file=sys.stderr)

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
            meta: what JSON can hold; step, evaluation, place in the data, environment, shapes and
                checksums are added.
            evaluation: the held-out terms of this step, where there was an evaluation.
        Raises:
            CheckpointError: this one, or the one before it, could not be written.
        """
        items = _items(state)
        meta = {
            **meta,
            "step": step,
            "evaluation": None if evaluation is None else dict(evaluation),
            # Each process takes its share of every batch, so one's count of batches holds for all.
            "data": batches.get_state(),
            "environment": environment(),
        }
        with self._reported():
            # Here and not in Orbax's own `save`, so that the step that failed is the one named.
            self._manager.wait_until_finished()
            self._policy.judge(step, evaluation)
            self._saving = step
            if not self._manager.save(step, args=save_args(items, meta)):
                raise RuntimeError(f"Orbax skipped it: there are {self.steps()[-3:]} already")

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
        failures = []
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
            self._set_aside(failures, f"went back to the checkpoint of step {step}")
            return state, meta
        if failures:
            reasons = "\n  ".join(f"step {step}: {brief(error)}" for step, error in failures)
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} can be restored:\n  {reasons}\n"
                "They may be damaged, or of another version. Move the folder away to start anew."
            )
        return None

    def _set_aside(self, failures: list[tuple[int, Exception]], outcome: str) -> None:
        for step, error in failures:
            # On stderr whatever logging is set to: work was lost.
            text = f"DAMAGED checkpoint of step {step} in {self.directory}: {outcome}"
            print(f"larimar: {text} ({brief(error)})", file=sys.stderr, flush=True)
            if jax.process_index() == 0:
                aside, number = self.directory / f"damaged-{step}", 1
                while aside.exists():
                    number += 1
                    aside = self.directory / f"damaged-{step}-{number}"
                (self.directory / str(step)).rename(aside)
        if failures:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are put aside")
            self._manager.reload()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Return when the last save is on the disk.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        with self._reported():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as `wait`, and end Orbax's threads."""
        with self._reported():
            self._manager.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # Another process is gone; nothing is wrong with the disk.
        except Exception as error:
            # A full disk shows as ValueError, OSError or RuntimeError, by which code was writing.
            whole = ", ".join(map(str, _steps(self.directory))) or "none"
            raise CheckpointError(
                f"the checkpoint of step {self._saving} could not be written to {self.directory}: "
                f"{brief(error)}\nWhole ones there: {whole}. Is the disk or a "
                "quota full, or the folder gone or read-only? Make room; the same command then goes "
                "on from the last of them."
            ) from error


@dataclasses.dataclass
class _NewestAndBest:
    """Orbax's policy on what to keep: the newest, and the one with the least value of a term.

    Orbax's own BestN stores evaluations only for `best_fn`, which a policy excludes, so that a
    resumed run would delete the best. Here they come from each checkpoint's meta.
    """

    keep: int
    term: str | None
    values: dict[int, float]

    def judge(self, step: int, evaluation: Mapping[str, float] | None) -> None:
        """Remember the term; a NaN, or no evaluation, cannot be the best."""
        value = (evaluation or {}).get(self.term, math.nan)
        self.values[step] = math.inf if math.isnan(value) else value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Answer Orbax, which asks once a save has begun and deletes the others when it is whole."""
        steps = [info.step for info in checkpoints]
        best = min(steps, key=lambda step: self.values.get(step, math.inf))
        preserved = {*sorted(steps)[-self.keep :]}
        if self.values.get(best, math.inf) < math.inf:
            preserved.add(best)
        return [step in preserved for step in steps]


# Items and their checksums ------------------------------------------------------------------------


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """Return a state's items by name; M₀ and log σ_W² are one of their own."""
    remembered = named((state.optimizer, state.average, state.loss))
    items = {"params": {}, "memory": {}, "optimizer": remembered}
    for name, leaf in state.params.items():
        items["memory" if name.startswith("memory/") else "params"][name] = leaf
    return items


def _read_state(folder: Path, meta: Mapping[str, Any], like: TrainState) -> TrainState:
    arrays = {item: read_item(folder, item, leaves, meta) for item, leaves in _items(like).items()}
    params = {**arrays["params"], **arrays["memory"]}
    rest = unnamed((like.optimizer, like.average, like.loss), arrays["optimizer"])
    step = jax.device_put(np.int32(meta["step"]), like.step.sharding)
    return TrainState(step, {name: params[name] for name in like.params}, *rest)


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves of any pytree by readable names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def unnamed(like: Any, leaves: Mapping[str, Any]) -> Any:
    """Return the leaves of `named` as a pytree again, of the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])


@jax.jit
def _bit_sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(array: jax.Array) -> jax.Array:
        if array.dtype != jnp.bool_:
            bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
            array = jax.lax.bitcast_convert_type(array, bits)
        return array.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return {name: total(array) for name, array in arrays.items()}


def array_checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return each array's bits summed modulo 2³²: on the device, and the same on every mesh."""
    return {name: int(value) for name, value in jax.device_get(_bit_sums(dict(arrays))).items()}


def _json_checksum(value: Any) -> int:
    """Return a CRC-32 of what JSON can hold, whatever the order and the spacing of its file."""
    # There and back first: JSON has no tuples, and its keys are texts.
    plain = json.loads(json.dumps(value))
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def save_args(items: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> Any:
    """Return Orbax's arguments to save items of arrays by name, and a meta with shapes and checksums."""
    shapes = {i: {n: list(a.shape) for n, a in arrays.items()} for i, arrays in items.items()}
    sums = {item: array_checksums(arrays) for item, arrays in items.items()}
    meta = {**meta, "shapes": shapes, "checksums": sums}
    meta["checksum"] = _json_checksum(meta)
    saved = {item: ocp.args.StandardSave(dict(arrays)) for item, arrays in items.items()}
    return ocp.args.Composite(**saved, meta=ocp.args.JsonSave(meta))


def write(path: Path, items: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write items of arrays by name to a new folder, whole or not at all."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(path, args=save_args(items, meta))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the meta that `save_args` described.

    Raises:
        OSError, ValueError, KeyError: it is missing or damaged.
    """
    meta = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    if meta.pop("checksum") != _json_checksum(meta):
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
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = {
        name: ocp.ArrayRestoreArgs(
            sharding=getattr(leaf, "sharding", None) or device,
            global_shape=leaf.shape,
            dtype=leaf.dtype,
        )
        for name, leaf in like.items()
    }
    args = ocp.args.PyTreeRestore(item=dict(like), restore_args=where, partial_restore=True)
    arrays = _reader().restore(folder / item, args=args)
    sums, saved = array_checksums(arrays), meta["checksums"][item]
    wrong = sorted(name for name in like if sums[name] != saved.get(name))
    if wrong:
        raise ValueError(f"checksum of {item} differs: {', '.join(wrong)}")
    return arrays


@functools.cache
def _reader() -> ocp.Checkpointer:
    # Built when it is needed: it asks JAX for its devices, and several processes join before that.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def agreed(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return (what was read, None) or (None, why not), the same of the two on all processes."""
    result, damage = None, None
    try:
        result = read()
    except Exception as error:  # Damage shows as nearly any type; the caller reports it.
        damage = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(damage is not None)).reshape(-1)
        if damage is None and failed.any():
            damage = ValueError(f"process {int(failed.argmax())} could not read it")
    return (result, None) if damage is None else (None, damage)


def brief(error: Exception) -> str:
    """Return an exception in one line of at most about 400 characters."""
    text = " ".join(str(error).split())
    if len(text) > 400:  # The system's own words come last.
        text = f"{text[:200]} … {text[-200:]}"
    return f"{type(error).__name__}: {text}"


def _steps(folder: Path) -> list[int]:
    """Return the checkpoints in a folder, ascending; one that is being written has another name."""
    return sorted(int(child.name) for child in folder.glob("*") if child.name.isdigit())


# Parameters for a run that starts from another one -------------------------------------------------


class StartError(ValueError):
    """A `train.start_from` that does not fit the model."""


def start_from(
    parameters: Mapping[str, jax.Array], start: StartConfig | None
) -> dict[str, jax.Array]:
    """Return the parameters with those that `start` names read from its path, each where it was.

    Args:
        start: path of an exported file, of a finished run's folder, or of a folder with checkpoints
            or one of these; regexes on parameter paths. Of no other parameter is anything read.
    Raises:
        FileNotFoundError: nothing of these is there.
        StartError: a regex that matches nothing there, or arrays of other shapes; names all.
        CheckpointError: the checkpoint is damaged.
    """
    if start is None:
        return dict(parameters)
    path = Path(start.path).absolute()
    exported, meta = path / "model.safetensors" if path.is_dir() else path, {}
    if exported.is_file():
        arrays, _ = model_file.load_exported(exported)
        arrays.pop(scope.PROJECTION, None)  # Fitted to the encodings of the model that it is in.
        shapes = {name: array.shape for name, array in arrays.items()}
    else:
        path = _checkpoint_folder(path)
        meta = _undamaged(path, lambda: read_meta(path))
        shapes = {n: tuple(s) for i in ITEMS[:2] for n, s in meta["shapes"][i].items()}
    names = {n for n in shapes if any(re.search(regex, n) for regex in start.parameters)}
    problems = [
        f"{regex!r} matches no parameter there"
        for regex in start.parameters
        if not any(re.search(regex, name) for name in shapes)
    ]
    problems += [f"{n}: this model has no such parameter" for n in names - parameters.keys()]
    problems += [
        f"{n}: {shapes[n]} there, {parameters[n].shape} in this model"
        for n in names & parameters.keys()
        if tuple(shapes[n]) != parameters[n].shape
    ]
    if problems:
        raise StartError(
            f"train.start_from {start.path} does not fit:\n  "
            + "\n  ".join(sorted(problems))
            + "\nThere are:\n  "
            + "\n  ".join(sorted(shapes))
        )
    if exported.is_file():
        read = {n: jax.device_put(arrays[n], parameters[n].sharding) for n in names}
        return {**parameters, **read}
    read = {}
    for item in ITEMS[:2]:
        like = {name: parameters[name] for name in names & meta["shapes"][item].keys()}
        read |= _undamaged(path, lambda item=item, like=like: read_item(path, item, like, meta))
    return {**parameters, **read}


def _checkpoint_folder(path: Path) -> Path:
    """Return the folder itself, or that of the newest checkpoint in it."""
    if (path / "params").is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not _steps(folder):
        raise FileNotFoundError(
            f"there is no checkpoint in {path}; name the folder of a run, or of one checkpoint"
        )
    return folder / str(_steps(folder)[-1])


def _undamaged(folder: Path, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read()
    except Exception as error:  # Damage shows as nearly any type.
        raise CheckpointError(
            f"{folder} cannot be read: {brief(error)}\nIt may be damaged; name the folder of another "
            "checkpoint."
        ) from error
