"""A training run, from its config to an exported model."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from larimar_jax import config as configs
from larimar_jax import model
from larimar_jax.config import Config, StartConfig
from larimar_jax.data import corpus, episodes, pieces, vocabulary
from larimar_jax.train import checkpoint, distributed, sharding
from larimar_jax.train.evaluate import Evaluator
from larimar_jax.train.logging import Logger, say
from larimar_jax.train.step import TrainStep, initialise
from larimar_jax.weights import model_file

# Seconds that compiling, an evaluation or a save may take beyond `train.stall`.
_SLOW = 3600.0
# What may differ between a run and its continuation: none of these changes a step's result beyond
# rounding.
_FREE = re.compile(
    r"name|model\.remat|editing\.(ridge|query_noise|scope_threshold)|train\.(mesh|layout|memory_layout|"
    r"accumulate|on_bad_step|spike|log_every|evaluate_every|edits|checkpoint_every|keep|best|stall)"
)
# What an export holds in bfloat16: half the size for the largest map, whose products are summed over
# hundreds of terms.
_HALVED = {"^to_slots/kernel$": "bfloat16"}


class OtherRun(ValueError):
    """A run's folder that belongs to another config."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. step: steps done; finished: all of them; evaluation: the last terms."""

    step: int
    finished: bool
    evaluation: dict[str, float]


def train(config: Config, run_dir: str | Path, *, progress: bool = True) -> Outcome:
    """Train Larimar by Eq. 1 until `train.steps`, or until SIGTERM, which saves and returns.

    `run_dir` receives config.json, tokenizer.json, checkpoints/, metrics.jsonl (every step),
    tensorboard/, and at the end model.safetensors (what was trained). A folder that has checkpoints
    is resumed: the steps are bit for bit those of a run that was never stopped.

    Args:
        config: what to train.
        run_dir: the run's folder; created if it is missing.
        progress: a bar and evaluations on stderr.
    Raises:
        OtherRun: the folder belongs to a config that differs; names the keys.
        BadStep: where train.on_bad_step is "stop"; names what is not finite, or how large a spike.
        CheckpointError: there are checkpoints and none is whole.
    """
    run_dir, settings, data = Path(run_dir), config.train, config.data
    progress = progress and jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(distributed.Watchdog(settings.stall))

        # 1. The folder belongs to one config.
        claim(run_dir, config)

        # 2. Mesh, rules and sizes are checked before any text is tokenised; then tokenizers and text.
        mesh = sharding.make_mesh(settings.mesh)
        TrainStep(config, model.AbstractModel(model.abstract(config)), mesh)
        # A corpus takes its time, and processes that wait for its pieces give up by themselves.
        watchdog.ping(math.inf)
        documents = corpus.open_corpus(data.corpus)
        tokenizers = vocabulary.tokenizers(
            config,
            lambda: (document.text for document in documents.side(held_out=False)),
            run_dir / "tokenizer.json",
        )
        judging = documents if data.held_out is None else corpus.open_corpus(data.held_out)
        training = pieces.tokenize(documents, False, data, *tokenizers, progress=progress)
        held_out = pieces.tokenize(judging, True, data, *tokenizers, progress=progress)
        for side, tokenized in (("training", training), ("held-out", held_out)) if progress else ():
            say(f"{side}: {len(tokenized):,} pieces, {tokenized.dropped:,} too long ones dropped")
        batches = iter(
            episodes.episodes(training, data.episode, data.batch, data.seed, workers=data.workers)
        )
        watchdog.ping(_SLOW)

        # 3. Parameters, created or loaded where their sharding rule puts them. What a checkpoint does
        # not hold, the frozen ones of `start_from`, has to be what it was when the run is resumed.
        abstract, parameters = initialise(config, mesh)
        train_step = TrainStep(config, abstract, mesh)
        parameters = checkpoint.start_from(parameters, settings.start_from)
        started = _matching(abstract.parameters, settings.start_from)
        frozen = train_step.freeze(parameters)
        state = train_step.init({name: parameters[name] for name in train_step.trained})
        del parameters
        evaluator = Evaluator(train_step, held_out, tokenizers)
        meta = {
            "config": configs.to_dict(config),
            "tokenizers": {"encoder": tokenizers[0].hash, "decoder": tokenizers[1].hash},
            "start": checkpoint.array_checksums({n: frozen[n] for n in started if n in frozen}),
        }

        # 4. The newest readable checkpoint replaces what is trained, the optimiser's state and the
        # place in the data.
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(run_dir / "checkpoints", settings.keep, settings.best)
        )
        restored = checkpoints.restore(
            train_step.abstract_state(),
            batches,
            lambda saved: check_same_run(saved, meta, checkpoints.directory),
        )
        if restored is not None:
            state = restored[0]
        first, total = int(state.step), settings.steps
        if progress and first:
            say(f"going on from the checkpoint of step {first:,}")
        log = stack.enter_context(Logger(run_dir, train_step, first, progress=progress))
        stopping = stack.enter_context(_preemption())
        evaluation, saved, compiled = {}, first, set()
        step = first
        watchdog.ping(_SLOW)
        if first in (0, total):
            evaluation = evaluator(state, frozen)
            log.evaluation(first, evaluation, record=first == 0)

        # 5. Steps, until all are done or the run is to stop.
        while step < total and not stopping(step):
            batch = next(batches)
            size = batch["encoder_tokens"].shape[1]
            watchdog.ping(0.0 if size in compiled else _SLOW)
            compiled.add(size)
            placed = sharding.place_batch(batch, mesh)
            began, step = time.perf_counter(), step + 1
            state, metrics = train_step.step(state, frozen, placed)
            log.train(
                step, state, metrics, batch, began
            )  # Reads the step before, while this one runs.
            evaluates = step == total or step % settings.evaluate_every == 0
            saves = step == total or step % settings.checkpoint_every == 0
            if evaluates or saves or step == first + 1:
                log.flush(state)
                watchdog.ping(_SLOW)
            if evaluates:
                evaluation = evaluator(state, frozen)
                log.evaluation(step, evaluation)
                watchdog.ping(_SLOW)
            if saves:
                checkpoints.save(step, state, batches, meta, evaluation if evaluates else None)
                saved = step
            watchdog.ping()
        watchdog.ping(_SLOW)
        log.flush(state)
        if step != saved:
            checkpoints.save(step, state, batches, meta)
        checkpoints.wait()
        if step < total:
            say(f"stopped by SIGTERM after step {step}; the same command goes on from here")
            return Outcome(step, False, evaluation)

        # 6. Export what was trained.
        watchdog.ping(_SLOW)
        parameters = {**frozen, **state.evaluated}
        trained = {*train_step.trained, *started}
        _export(
            run_dir, config, parameters, trained, {**meta, "step": step, "evaluation": evaluation}
        )
        if progress:
            say(f"finished: {step:,} steps, the model is {run_dir / 'model.safetensors'}")
        return Outcome(step, True, evaluation)


def claim(run_dir: Path, config: Config) -> None:
    """Make the folder this config's; a folder in which nothing was trained yet is free.

    Raises:
        OtherRun: it belongs to another config; names the keys that differ.
    """
    path, values = run_dir / "config.json", configs.to_dict(config)
    begun = (run_dir / "model.safetensors").exists() or any(
        child.name.isdigit() for child in (run_dir / "checkpoints").glob("*")
    )
    if path.is_file() and begun:
        _check_same_config(json.loads(path.read_text(encoding="utf-8")), values, run_dir)
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def check_same_run(saved: Mapping[str, Any], meta: Mapping[str, Any], where: Path) -> None:
    """Check that a checkpoint's meta is of this run, for all that changes its result.

    Raises:
        OtherRun: another config, other tokenizers, or other frozen parameters to start from.
    """
    if saved["tokenizers"] != meta["tokenizers"]:
        raise OtherRun(
            f"{where} was trained with other tokenizers. The corpus or the package of a tower has "
            "changed since; restore it, or start a new run."
        )
    _check_same_config(saved["config"], meta["config"], where)
    if saved["start"] != meta["start"]:
        raise OtherRun(
            f"{where} was begun with other frozen parameters than train.start_from now has: the run "
            "there has gone on since. Point it at a copy of what it was, or at one checkpoint "
            "(…/checkpoints/STEP), or start a new run."
        )


def _check_same_config(saved: Mapping[str, Any], values: Mapping[str, Any], where: Path) -> None:
    before, now = (
        traverse_util.flatten_dict(json.loads(json.dumps(v)), sep=".") for v in (saved, values)
    )
    keys = [key for key in sorted({*before, *now}) if not _FREE.fullmatch(key)]
    lines = [
        f"{key}: {before.get(key)!r} in the folder, {now.get(key)!r} now"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if lines:
        raise OtherRun(
            f"{where} belongs to a run of another config:\n  "
            + "\n  ".join(lines)
            + "\nTake another folder, or the config that it was made with (its config.json)."
        )


def _matching(parameters: Iterable[str], start: StartConfig | None) -> list[str]:
    """Return the paths that `start_from` names: a tower's own source does not have them."""
    regexes = () if start is None else start.parameters
    return [name for name in parameters if any(re.search(regex, name) for regex in regexes)]


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[int], bool]]:
    """Yield `stopping(step)`: whether SIGTERM has come; never, outside the main thread."""
    if jax.process_count() > 1:
        # One process may receive it before the others, and all must stop after the same step: JAX's
        # coordination service catches the signal itself and agrees on a step.
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


def _export(
    run_dir: Path,
    config: Config,
    parameters: Mapping[str, jax.Array],
    trained: set[str],
    meta: Mapping[str, Any],
) -> None:
    """Write model.safetensors; every process calls this, and the first one writes.

    What a tower's source has as well is left out: frozen parameters of towers that are loaded.
    """
    towers = {"encoder": config.model.encoder, "decoder": config.model.decoder}
    loaded = tuple(f"{name}/" for name, tower in towers.items() if tower.source is not None)
    first, alone = jax.process_index() == 0, jax.process_count() == 1
    arrays = {}
    for name, leaf in parameters.items():
        if name in trained or not name.startswith(loaded):
            # Gathered leaf by leaf; processes other than the first let go of it.
            whole = leaf if alone else multihost_utils.process_allgather(leaf, tiled=True)
            arrays[name] = np.asarray(whole) if first else None
    if first:
        model_file.save_exported(run_dir / "model.safetensors", arrays, meta, _HALVED)
    if not alone:
        multihost_utils.sync_global_devices("a trained model is written")
