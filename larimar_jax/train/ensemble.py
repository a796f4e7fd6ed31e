"""Runs of one config that differ in their seeds alone, side by side in one compiled program.

Run i has the seeds train.seed + i, of its parameters and its noise, and data.seed + i, of the order of
its data. A step that is not finite, or spikes, leaves its own run as it was, and the others go on.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from larimar_jax import model
from larimar_jax.config import Config
from larimar_jax.data import episodes
from larimar_jax.data.pieces import TokenizedPieces
from larimar_jax.model import AbstractModel
from larimar_jax.train import checkpoint, distributed, loop, sharding
from larimar_jax.train.initial import start_from
from larimar_jax.train.logging import Bar
from larimar_jax.train.step import TrainStep


class SeedStep(TrainStep):
    """The compiled step of S runs: `init` and `step` take and return arrays with a leading axis S.

    A batch's rows are split over as many devices as divide them. `step` takes a random key for each run
    beside state, frozen parameters and batch.

    Attributes:
        axes: 0 for each parameter that is a run's own, None for those of a loaded tower that is frozen,
            which all share.
    """

    def __init__(self, config: Config, seeds: int):
        skipping = dataclasses.replace(config.train, on_bad_step="skip")
        config = dataclasses.replace(config, train=skipping)
        rows = config.data.batch // config.train.accumulate
        ways = max(n for n in range(1, jax.device_count() + 1) if rows % n == 0)
        mesh = sharding.make_mesh((ways, 1, 1))
        super().__init__(config, AbstractModel(model.abstract(config)), mesh)
        self.seeds = seeds
        towers = {"encoder/": config.model.encoder, "decoder/": config.model.decoder}
        self._loaded = tuple(name for name, tower in towers.items() if tower.source is not None)
        shared = {name for name in self.frozen if name.startswith(self._loaded)}
        self.axes = {name: None if name in shared else 0 for name in self.abstract.parameters}

        def stacked(places: Any) -> Any:
            return jax.tree.map(lambda p: NamedSharding(mesh, PartitionSpec(None, *p.spec)), places)

        self.state_shardings = stacked(self.state_shardings)
        self.batch_shardings = stacked(self.batch_shardings)
        own = stacked(self.frozen_shardings)
        self.frozen_shardings |= {name: own[name] for name in own if name not in shared}
        whole, axes = sharding.replicated(mesh), {name: self.axes[name] for name in self.frozen}
        self.init = jax.jit(jax.vmap(self._init), out_shardings=self.state_shardings)
        self.step = jax.jit(
            jax.vmap(self._step, in_axes=(0, axes, 0, 0)),
            in_shardings=(self.state_shardings, self.frozen_shardings, self.batch_shardings, whole),
            out_shardings=(self.state_shardings, whole),
            donate_argnums=0,
        )

    def keys(self) -> jax.Array:
        """Return the random key of each run, typed keys [S]."""
        return jnp.stack([jax.random.key(self.config.train.seed + i) for i in range(self.seeds)])

    def parameters(self) -> dict[str, jax.Array]:
        """Return every parameter before the first step: [S, …] where its axis is 0."""

        def create(key: jax.Array) -> dict[str, jax.Array]:
            return dict(model.parameters(model.build(self.config, key)))

        create, start = create if self._loaded else jax.jit(create), self.config.train.start_from
        runs = [start_from(create(key), start)[0] for key in self.keys()]
        return {
            name: runs[0][name] if axis is None else jnp.stack([run[name] for run in runs])
            for name, axis in self.axes.items()
        }


class Trained(NamedTuple):
    """S trained models. parameters: by path, on the host, as `SeedStep.parameters`. axes: as there.

    skipped: [S], the share of steps that changed nothing. seconds: of a step of all runs, the median;
    None where no step was run. compile_seconds: of the step.
    """

    parameters: dict[str, np.ndarray]
    axes: dict[str, int | None]
    skipped: np.ndarray
    seconds: float | None
    compile_seconds: float


def train(
    config: Config,
    seeds: int,
    pieces: TokenizedPieces,
    folder: Path,
    meta: Mapping[str, Any],
    *,
    title: str = "",
    progress: bool = True,
) -> Trained:
    """Train S runs of a config, or go on with them from the checkpoint in `folder`.

    SIGTERM saves and ends the process with code 75, which asks to be run again.

    Args:
        pieces: to train on. meta: "config" and "tokenizers", as in `loop.train`.
        title: what stands before the losses on the bar.
    Raises:
        OtherRun: the checkpoint is of another config or of other tokenizers.
        CheckpointError: there is a checkpoint, and it is damaged.
        ValueError: there are several processes.
    """
    if jax.process_count() > 1:
        raise ValueError("Seeds are trained side by side in one process; start one process alone.")
    data, settings, total = config.data, config.train, config.train.steps
    train_step = SeedStep(config, seeds)
    order = dict(workers=data.workers, seeds=seeds, buckets=data.buckets)
    stream = episodes.episodes(pieces, data.episode, data.batch, data.seed, **order)
    batches, keys, parameters = iter(stream), train_step.keys(), train_step.parameters()
    frozen = train_step.freeze(parameters)
    state = train_step.init({name: parameters[name] for name in train_step.trained})
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.Checkpoints(folder / "checkpoints", keep=1))
        where = checkpoints.directory
        restored = checkpoints.restore(
            state, batches, lambda saved: loop.check_same_run(saved, meta, where)
        )
        state, first = (state, 0) if restored is None else (restored[0], restored[1]["step"])
        bar = stack.enter_context(Bar(total, first, shown=progress))
        stopping = stack.enter_context(distributed.preemption())
        programs, times, compile_seconds = {}, [], 0.0
        began, done = time.perf_counter(), first
        for step in range(first + 1, total + 1):
            batch = jax.device_put(next(batches), train_step.batch_shardings)
            shape = episodes.shape(batch)
            if shape not in programs:
                start = time.perf_counter()
                lowered = train_step.step.lower(state, frozen, batch, keys)
                programs[shape] = lowered.compile()
                began, done = time.perf_counter(), step - 1
                compile_seconds += began - start
            state, metrics = programs[shape](state, frozen, batch, keys)
            stops = stopping(step)
            saves = stops or step == total or step % settings.checkpoint_every == 0
            if saves or step % settings.log_every == 0:
                # Waits: the host runs ahead of the steps else.
                losses = np.asarray(metrics["loss"])
                times.append((time.perf_counter() - began) / (step - done))
                bar.show(step, f"{title}  loss {' '.join(f'{loss:.2f}' for loss in losses)}")
                if saves:
                    checkpoints.save(step, state, batches, meta)
                began, done = time.perf_counter(), step
            if stops and step < total:
                checkpoints.wait()
                raise SystemExit(distributed.RETRY)
        checkpoints.wait()
    count = optax.tree_utils.tree_get_all_with_path(state.optimizer, "count")[0][1]
    return Trained(
        jax.device_get({**frozen, **state.evaluated}),
        train_step.axes,
        1.0 - np.asarray(count) / total,
        float(np.median(times)) if times else None,
        compile_seconds,
    )
