"""A training run, from its config to an exported model."""

import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from larimar_jax import config as configs
from larimar_jax import model
from larimar_jax.config import Config
from larimar_jax.data import corpus, edit_records, episodes, pieces, vocabulary
from larimar_jax.train import checkpoint, distributed, sharding
from larimar_jax.train.evaluate import Evaluator
from larimar_jax.train.initial import start_from
from larimar_jax.train.logging import Logger, find_wandb, say
from larimar_jax.train.step import TrainStep, initialise
from larimar_jax.weights import Tokenizer, model_file

# Seconds that compiling, an evaluation or a save may take beyond `train.stall`.
_SLOW = 3600.0
# What may differ between a run and its continuation: no step's result changes beyond rounding.
_FREE = re.compile(
    r"name|model\.remat|editing\.(ridge|query_noise|scope_threshold)|train\.(mesh|layout|memory_layout|"
    r"accumulate|vocabulary_multiple|on_bad_step|spike|log_every|evaluate_every|edits|edit_records|"
    r"samples|wandb|checkpoint_every|keep|best|stall)"
)
# What a run and its continuation have to have in common, and the advice where they do not.
_COMMON = {
    "tokenizers": "was trained with other tokenizers. The corpus or the package of a tower has changed "
    "since; restore it, or start a new run.",
    "config": "belongs to a run of another config:\n  {lines}\nTake another folder, or the config that "
    "it was made with (its config.json).",
    "start": "was begun with other frozen parameters than train.start_from now has: the run there has "
    "gone on since. Point it at a copy of what it was, or at one checkpoint (…/checkpoints/STEP), or "
    "start a new run.",
}
# What an export holds in bfloat16: half the size for the largest map, whose products are summed over
# hundreds of terms.
_HALVED = {r"^(to_slots|reader/\w+)/kernel$": "bfloat16"}


class OtherRun(ValueError):
    """A run's folder that belongs to another config."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. step: steps done; finished: all of them; evaluation: the last terms."""

    step: int
    finished: bool
    evaluation: dict[str, float]


def train(
    config: Config, run_dir: str | Path, *, progress: bool = True, profile: int = 0
) -> Outcome:
    """Train Larimar by Eq. 1 until `train.steps`, or until SIGTERM, which saves and returns.

    `run_dir` receives config.json, tokenizer.json, checkpoints/, metrics.jsonl (every step),
    tensorboard/, and at the end model.safetensors (what was trained). A folder that has checkpoints
    is resumed: the steps are bit for bit those of a run that was never stopped.

    Args:
        config: what to train.
        run_dir: the run's folder; created if it is missing.
        progress: a bar and evaluations on stderr.
        profile: of so many steps, after the second, process 0 writes a trace to run_dir/profile.
    Raises:
        OtherRun: the folder belongs to a config that differs; names the keys.
        BadStep: where train.on_bad_step is "stop"; names what is not finite, or how large a spike.
        CheckpointError: there are checkpoints and none is whole.
    """
    run_dir, settings, data = Path(run_dir), config.train, config.data
    is_first, began_run = jax.process_index() == 0, time.perf_counter()
    # JAX makes no trace for Perfetto of a folder that several hosts write to.
    progress, profile = progress and is_first, profile if is_first else 0
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(distributed.Watchdog(settings.stall))

        # 1. The folder belongs to one config.
        claim(run_dir, config)

        # 2. All that can be missing or not fit is checked before any text is read.
        mesh = sharding.make_mesh(settings.mesh)
        model.check_sources(config)
        if settings.wandb:
            find_wandb()
        if settings.edits and settings.edit_records:
            edit_records.load(settings.edit_records, 1)
        train_step = TrainStep(config, model.AbstractModel(model.abstract(config)), mesh)
        # A corpus takes its time: one process writes its pieces, and the others wait for its lock.
        watchdog.ping(math.inf)
        tokenizers, training, held_out = open_text(config, run_dir / "tokenizer.json", progress)
        order = dict(workers=data.workers, buckets=data.buckets)
        stream = episodes.episodes(training, data.episode, data.batch, data.seed, **order)
        batches = iter(stream)
        if progress:
            texts = settings.steps * data.batch * np.mean(data.episode)
            epochs = texts / len(training)
            say(f"{settings.steps:,} steps are {texts:,.0f} pieces: {epochs:.1f} epochs")
            say(f"on {mesh.size} of {jax.device_count()} devices: {jax.devices()[0].device_kind}")
        watchdog.ping(_SLOW)

        # 3. Parameters, created or loaded where their sharding rule puts them, unless a checkpoint has
        # them. What it does not hold, the frozen ones, has to be what it was when a run is resumed.
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(run_dir / "checkpoints", settings.keep, settings.best)
        )
        frozen, started, state, resumes = {}, [], None, bool(checkpoints.steps())
        if train_step.frozen or not resumes:
            _, parameters = initialise(config, mesh, train_step.frozen if resumes else None)
            parameters, started = start_from(parameters, settings.start_from)
            frozen = train_step.freeze(parameters)
            if not resumes:
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
        restored = checkpoints.restore(
            train_step.abstract_state(),
            batches,
            lambda saved: check_same_run(saved, meta, checkpoints.directory),
        )
        state = state if restored is None else restored[0]
        first, total = int(state.step), settings.steps
        if progress and first:
            say(f"going on from the checkpoint of step {first:,}")
        log = stack.enter_context(Logger(run_dir, train_step, first, progress=progress))
        stopping = stack.enter_context(distributed.preemption())
        trace = stack.enter_context(contextlib.ExitStack())
        evaluation, step, saved, compiled = {}, first, first, set()
        watchdog.ping(_SLOW)
        if first in (0, total):
            evaluation = evaluator(state, frozen)
            log.evaluation(first, evaluation, record=first == 0)

        # 5. Steps, until all are done or the run is to stop.
        while step < total and not stopping(step):
            batch = next(batches)
            shape = episodes.shape(batch)
            watchdog.ping(0.0 if shape in compiled else _SLOW)
            compiled.add(shape)
            placed = sharding.place_batch(batch, mesh)
            if profile and step == first + 2:  # Compiled, and as fast as it will be.
                trace.enter_context(
                    jax.profiler.trace(run_dir / "profile", create_perfetto_trace=True)
                )
            if profile and step == first + 2 + profile:
                jax.block_until_ready(state)
                trace.close()
            began, step = time.perf_counter(), step + 1
            state, metrics = train_step.step(state, frozen, placed)
            # Reads the step before, while this one runs.
            log.train(step, state, metrics, batch, began)
            evaluates = step == total or step % settings.evaluate_every == 0
            saves = step == total or step % settings.checkpoint_every == 0
            if evaluates or saves or step == first + 1:
                log.flush(state)
                watchdog.ping(_SLOW)
            if progress and step == first + 1:
                say(f"the first step was done after {time.perf_counter() - began_run:.1f} s")
            if evaluates:
                evaluation = evaluator(state, frozen)
                log.evaluation(step, evaluation)
                if settings.samples:
                    log.samples(step, evaluator.samples(state, frozen))
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
        path, trained = run_dir / "model.safetensors", {*train_step.trained, *started}
        meta |= {"step": step, "evaluation": evaluation}
        export(path, config, {**frozen, **state.evaluated}, trained, meta)
        if progress:
            say(f"finished: {step:,} steps, the model is {path}")
        return Outcome(step, True, evaluation)


def open_text(
    config: Config, path: Path, progress: bool
) -> tuple[tuple[Tokenizer, Tokenizer], pieces.TokenizedPieces, pieces.TokenizedPieces]:
    """Return the tokenizers of a config (encoder's, decoder's), and its pieces to train and to judge on.

    Args:
        path: where a vocabulary that is trained on the corpus is written, or read.
    """
    data = config.data

    def texts() -> Iterator[str]:
        yield from (d.text for d in corpus.open_corpus(data.corpus).side(held_out=False))

    tokenizers = vocabulary.tokenizers(config, texts, path)
    documents = corpus.open_corpus(data.corpus)
    judging = documents if data.held_out is None else corpus.open_corpus(data.held_out)
    training = pieces.tokenize(documents, False, data, *tokenizers, progress=progress)
    held_out = pieces.tokenize(judging, True, data, *tokenizers, progress=progress)
    for side, tokenized in (("training", training), ("held-out", held_out)) if progress else ():
        say(f"{side}: {len(tokenized):,} pieces, {tokenized.dropped:,} too long ones dropped")
    return tokenizers, training, held_out


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
        before = json.loads(path.read_text(encoding="utf-8"))
        check_same_run({"config": before}, {"config": values}, run_dir)
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        model_file.replace_file(path, json.dumps(values, indent=1) + "\n")


def check_same_run(saved: Mapping[str, Any], meta: Mapping[str, Any], where: Path) -> None:
    """Check that what is saved is of this run, for all that changes its result.

    Args:
        saved, meta: a checkpoint's meta, and this run's, or the same parts of both.
    Raises:
        OtherRun: another config, other tokenizers, or other frozen parameters to start from.
    """
    for part, advice in _COMMON.items():
        if part in meta and (lines := _differences(saved[part], meta[part])):
            listed = "\n  ".join(lines)
            raise OtherRun(f"{where} {advice.format(lines=listed)}")


def _differences(saved: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return a line for each key whose values differ and may not."""
    before, now = (
        traverse_util.flatten_dict(json.loads(json.dumps(v)), sep=".") for v in (saved, values)
    )
    return [
        f"{key}: {before.get(key)!r} in the folder, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _FREE.fullmatch(key)
    ]


def export(
    path: Path,
    config: Config,
    parameters: Mapping[str, jax.Array],
    trained: set[str],
    meta: Mapping[str, Any],
) -> None:
    """Write the model file; every process calls this, and the first one writes.

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
        model_file.save_exported(path, arrays, meta, _HALVED)
    multihost_utils.sync_global_devices("a trained model is written")
