"""A training run, from its config to an exported model; goes on by itself where it was stopped.

In order: (1) the run's folder is of this config; (2) parameters are made or loaded, each where its
sharding rule says; (3) the newest whole checkpoint, if there is one, replaces what is trained, the
optimiser and the place in the data; (4) steps until `train.steps`, or until SIGTERM.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from larimar_jax import config as configs
from larimar_jax import model
from larimar_jax.config import Config
from larimar_jax.data import corpus, episodes, pieces, vocabulary
from larimar_jax.train import (
    checkpoint,
    distributed,
    folder,
    guard,
    report,
    sharding,
    start,
    throughput,
)
from larimar_jax.train.checksums import array_checksums
from larimar_jax.train.finish import finish
from larimar_jax.train.held_out import HeldOut
from larimar_jax.train.metrics import MetricsLog
from larimar_jax.train.step import TrainState, TrainStep, initialise

# Seconds that compiling, an evaluation or a save may take beyond `train.stall`.
_SLOW = 3600.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. step: steps done; finished: all of them; evaluation: the last terms."""

    step: int
    finished: bool
    evaluation: dict[str, float]


def train(config: Config, run_dir: str | Path, *, progress: bool = True) -> Outcome:
    """Trains Larimar by Eq. 1 until `train.steps`, or until SIGTERM, which saves and returns.

    `run_dir` receives config.json, tokenizer.json, checkpoints/, metrics.jsonl (every step),
    tensorboard/, and at the end model.safetensors (what was trained). A folder that has checkpoints
    is gone on with: the steps are bit for bit those of a run that was never stopped.

    Args:
        config: what to train.
        run_dir: the run's folder; made if it is missing.
        progress: a bar and evaluations on stderr.
    Raises:
        OtherRun: the folder belongs to a config that differs; names the keys.
        BadStep: where train.on_bad_step is "stop"; names what is not finite, or how large a spike.
        CheckpointError: there are checkpoints and none is whole.
    """
    with distributed.Watchdog(config.train.stall) as dog:
        return _train(config, Path(run_dir), dog, progress)


def _train(config: Config, run_dir: Path, dog: distributed.Watchdog, progress: bool) -> Outcome:
    first = jax.process_index() == 0
    folder.claim(run_dir, config)
    mesh = sharding.make_mesh(config.train.mesh)
    # Before the corpus is tokenised: what does not fit is said while little was done.
    abstract = model.AbstractModel(model.abstract(config))
    TrainStep(config, abstract, mesh)
    # A corpus takes its time, and whoever waits for its pieces gives up by itself.
    dog.beat(math.inf)
    source = corpus.open_corpus(config.data.corpus)
    tokenizers = vocabulary.tokenizers(
        config,
        lambda: (document.text for document in source.side(held_out=False)),
        run_dir / "tokenizer.json",
    )
    judge = source if config.data.held_out is None else corpus.open_corpus(config.data.held_out)
    training, held_out = (
        _stored(config, documents, tokenizers, side, progress and first)
        for documents, side in ((source, False), (judge, True))
    )
    dog.beat(_SLOW)
    skeleton, parameters = initialise(config, mesh)
    stepper = TrainStep(config, skeleton, mesh)
    kept = (config.train.keep, config.train.best)
    saved = _Saved(checkpoint.Checkpoints(run_dir / "checkpoints", *kept), stepper)
    if config.train.start_from is not None:
        # Of a run that goes on as well: a checkpoint holds nothing of what is frozen.
        parameters = start.replace(parameters, config.train.start_from)
    frozen = stepper.freeze(parameters)
    # No checkpoint holds these: when the run goes on they have to be what they were.
    taken = [n for n in start.named(skeleton.parameters, config.train.start_from) if n in frozen]
    state = stepper.begin({name: parameters[name] for name in stepper.trained})
    del parameters
    data = config.data
    stream = iter(
        episodes.episodes(training, data.episode, data.batch, data.seed, workers=data.workers)
    )
    hashes = dict(zip(("encoder", "decoder"), (t.hash for t in tokenizers), strict=True))
    meta = {"config": configs.to_dict(config), "tokenizers": hashes}
    meta["start"] = array_checksums({name: frozen[name] for name in taken})
    state = saved.restore(state, stream, meta)
    if progress and first and int(state.step):
        report.say(f"going on from the checkpoint of step {int(state.step):,}")
    dog.beat(_SLOW)
    with _Run(config, run_dir, mesh, stepper, saved, meta, dog, progress) as run:
        judged = HeldOut(config, mesh, held_out, tokenizers, skeleton.max_tokens)
        state, evaluation, finished = run.steps(state, frozen, stream, judged)
    step = int(state.step)
    if finished:
        dog.beat(_SLOW)
        finish(
            run_dir / "model.safetensors",
            config,
            {**frozen, **(state.average or state.params)},
            [*stepper.trained, *start.named(skeleton.parameters, config.train.start_from)],
            {**meta, "step": step, "evaluation": evaluation},
        )
        if progress and first:
            report.say(f"finished: {step:,} steps, the model is {run_dir / 'model.safetensors'}")
    return Outcome(step, finished, evaluation)


def _stored(config: Config, source: corpus.Corpus, tokenizers, held_out: bool, progress: bool):
    """One side of the corpus, tokenised for both towers."""
    tokenised = pieces.tokenize(source, held_out, config.data, *tokenizers, progress=progress)
    if progress:
        side = "held-out" if held_out else "training"
        report.say(f"{side}: {len(tokenised):,} pieces, {tokenised.dropped:,} too long ones dropped")
    return tokenised


class _Saved:
    """The run's checkpoints, in terms of its state: M₀ and log σ_W² are an item of their own."""

    def __init__(self, checkpoints: checkpoint.Checkpoints, stepper: TrainStep):
        self.checkpoints, self._stepper = checkpoints, stepper

    @staticmethod
    def _items(state: TrainState) -> dict[str, Any]:
        memory = {n: leaf for n, leaf in state.params.items() if n.startswith("memory/")}
        params = {n: leaf for n, leaf in state.params.items() if n not in memory}
        # What the optimiser and the policy on bad steps remember.
        remembered = (state.optimizer, state.average, state.loss)
        return dict(params=params, memory=memory, optimizer=remembered)

    def save(self, step: int, state: TrainState, stream, meta, evaluation) -> None:
        self.checkpoints.save(
            step, **self._items(state), data=stream, meta=meta, evaluation=evaluation
        )

    def restore(self, fresh: TrainState, stream, meta: Mapping[str, Any]) -> TrainState:
        """The newest whole checkpoint as a state, or `fresh` where there is none."""

        def check(found: Mapping[str, Any]) -> None:
            if found["tokenizers"] != meta["tokenizers"]:
                raise folder.OtherRun(
                    f"{self.checkpoints.directory} was trained with other tokenizers. The corpus "
                    "or the package of a tower has changed since; restore it, or start a new run."
                )
            folder.same_run(found["config"], meta["config"], self.checkpoints.directory)
            begun = meta.get("start", {})
            if found.get("start", begun) != begun:
                raise folder.OtherRun(
                    f"{self.checkpoints.directory} was begun with other frozen parameters than "
                    "train.start_from now has: the run there has gone on since. Point it at a copy of "
                    "what it was, or at one checkpoint (…/checkpoints/STEP), or start a new run."
                )

        items = self._items(self._stepper.abstract())
        restored = self.checkpoints.restore(**items, data=stream, check=check)
        if restored is None:
            return fresh
        params = {**restored.params, **restored.memory}
        return TrainState(
            step=jax.device_put(np.int32(restored.step), self._stepper.state_shardings.step),
            params={name: params[name] for name in self._stepper.trained},
            **dict(zip(("optimizer", "average", "loss"), restored.optimizer, strict=True)),
        )


class _Run:
    """The steps of a run, with its logs, as a context; `steps` is called once."""

    def __init__(self, config, run_dir, mesh, stepper, saved, meta, dog, progress):
        self._config, self._dir, self._mesh, self._stepper = config, run_dir, mesh, stepper
        self._saved, self._meta, self._progress = saved, meta, progress
        self._guard = guard.Guard(config.train, stepper.trained)
        self._speed = throughput.Speed(
            throughput.gemm(config.train.products or config.model.dtype), mesh.size
        )
        self._log: MetricsLog | None = None
        self._read_at, self._dog = 0.0, dog

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self._log is not None:
            self._log.close()
        try:
            self._saved.checkpoints.close()
        except checkpoint.CheckpointError as error:
            if kind is None:
                raise
            report.say(str(error))  # What ended the run is said last, and not hidden by this.

    def steps(self, state: TrainState, frozen, stream, held_out):
        """(state, last evaluation, whether all steps are done)"""
        every, first, total = self._config.train, int(state.step), self._config.train.steps
        if jax.process_index() == 0:
            self._log = MetricsLog(self._dir, first)
        bar = report.Bar(total, first, shown=self._progress and jax.process_index() == 0)
        evaluation = {}
        saved_at, pending, step, sizes = first, None, first, set()
        dog = self._dog
        with _terminated() as stopping, bar:
            if first in (0, total):
                evaluation = self._evaluate(first, state, frozen, held_out, bar, written=first == 0)
            while step < total and not stopping(step):
                local = next(stream)
                batch = sharding.place_batch(local, self._mesh)
                size = local["encoder_tokens"].shape[1]
                if size not in sizes:
                    sizes.add(size)
                    dog.beat(_SLOW)  # It is compiled now.
                flops = self._stepper.flops(size)
                begun = time.perf_counter()
                state, metrics = self._stepper.step(state, frozen, batch)
                step += 1
                # The step before this one: while its numbers are read, this one already runs.
                self._read(pending, state, bar)
                pending = (step, metrics, begun, int(local["decoder_mask"].sum()), flops)
                if step == first + 1:
                    self._read(pending, state, bar)
                    pending = None
                dog.beat()
                last = step == total
                if last or step % every.evaluate_every == 0 or step % every.checkpoint_every == 0:
                    self._read(pending, state, bar)
                    pending, found = None, None
                    dog.beat(_SLOW)
                    if last or step % every.evaluate_every == 0:
                        found = evaluation = self._evaluate(step, state, frozen, held_out, bar)
                        dog.beat(_SLOW)
                    if last or step % every.checkpoint_every == 0:
                        self._saved.save(step, state, stream, self._meta, found)
                        saved_at = step
                    dog.beat()
            dog.beat(_SLOW)
            self._read(pending, state, bar)
            if step != saved_at:
                self._saved.save(step, state, stream, self._meta, None)
            self._saved.checkpoints.wait()
        if step < total:
            report.say(f"stopped by SIGTERM after step {step}; the same command goes on from here")
        return state, evaluation, step == total

    def _evaluate(self, step: int, state: TrainState, frozen, held_out, bar, written: bool = True):
        """The mean terms over the held-out batches in nats per token, and a few edits."""
        params = state.average or state.params
        mean = held_out.evaluate(self._stepper, params, frozen)
        if self._log is not None and written:
            self._log.write(step, "evaluation", mean)
        bar.evaluation(step, mean)
        return mean

    def _read(self, pending, state: TrainState, bar) -> None:
        """Waits for a step's numbers and writes them down."""
        if pending is None:
            return
        step, metrics, begun, tokens, flops = pending
        found = jax.device_get(metrics)
        # A step dispatched while the one before it ran began when that one was done.
        now = time.perf_counter()
        seconds, self._read_at = now - max(begun, self._read_at), now
        # A bad step left the state as it was, so these are the parameters that it began with.
        bad = self._guard.look(step, found, state.params)
        tokens *= jax.process_count()
        values = {
            "loss": float(found["loss"]),
            **{name: float(value) for name, value in sorted(found["terms"].items())},
            **{name: float(found[name]) for name in ("beta", "learning_rate", "gradient_norm")},
            **self._norms(found["gradient_squares"]),
            **self._speed.of(seconds, tokens, self._config.data.batch, flops),
            "skipped": float(bad is not None),
        }
        shown = step % self._config.train.log_every == 0
        if self._log is not None:
            self._log.write(step, "train", values, board=shown)
        bar.step(step, values)
        if bad is not None:
            report.say(bad)

    def _norms(self, squares) -> dict[str, float]:
        """The norm of the gradients of each part of the model."""
        parts: dict[str, float] = {}
        for name, square in zip(self._stepper.trained, np.asarray(squares), strict=True):
            part = name.split("/")[0]
            parts[part] = parts.get(part, 0.0) + float(square)
        return {f"gradient_norm_{part}": square**0.5 for part, square in parts.items()}


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[int], bool]]:
    """Yields `stopping(step)`: whether SIGTERM has come; never, outside the main thread."""
    if jax.process_count() > 1:
        # One process may hear of it before the others, and all must stop after the same step: JAX's
        # coordination service catches the signal itself and agrees on one.
        yield multihost_utils.reached_preemption_sync_point
        return
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield lambda step: stop.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
