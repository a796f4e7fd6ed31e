"""A training run, from its config to an exported model; goes on by itself where it was stopped.

In order: (1) the run's folder is of this config; (2) parameters are made or loaded, each where its
sharding rule says; (3) the newest whole checkpoint, if there is one, replaces what is trained, the
optimiser and the place in the data; (4) steps until `train.steps`, or until SIGTERM.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
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
from larimar_jax import lexicon
from larimar_jax.data import corpus, episodes, vocabulary
from larimar_jax.model import Larimar
from larimar_jax.pretrained import Pretrained
from larimar_jax.settings import Config
from larimar_jax.train import checkpoint, export, report, sharding
from larimar_jax.train.metrics import MetricsLog
from larimar_jax.train.step import Stepper, TrainState, initialise
from larimar_jax.weights.tokenizers import Tokenizer

# Held-out batches of an evaluation: enough to halve the noise of one, cheap enough to be frequent.
_EVALUATION_BATCHES = 4
# What may differ between a run and its continuation: none of these changes a step's result.
_FREE = {"name", "editing.ridge", "editing.scope_threshold"} | {
    # Fitted when training is over.
    *(f"model.lexicon.{key}" for key in ("entries", "gain", "decay"))
} | {
    f"train.{key}" for key in ("mesh", "log_every", "evaluate_every", "checkpoint_every", "keep")
}


# Parameters that an export holds in bfloat16.
_HALVED = ("^to_slots/kernel$", "^lexicon/directions$")


class OtherRun(ValueError):
    """The run's folder was made by another config."""


class NonFiniteLoss(FloatingPointError):
    """A step's loss or gradient is NaN or infinite; the state before it is kept."""


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
        NonFiniteLoss: names the first parameter, loss term or gradient that is not finite.
        CheckpointError: there are checkpoints and none is whole.
    """
    run_dir = Path(run_dir)
    _claim(run_dir, config)
    mesh = sharding.make_mesh(config.train.mesh)
    documents, tokenizers = _sources(config, run_dir)
    pieces, held_out = (
        _pieces(config, *tokenizers, side, name if progress else None)
        for name, side in zip(("training", "held out"), documents, strict=True)
    )
    skeleton, parameters = initialise(config, mesh)
    stepper = Stepper(config, skeleton, mesh)
    frozen = stepper.freeze(parameters)
    state = stepper.begin({name: parameters[name] for name in stepper.trained})
    del parameters
    stream = iter(
        episodes.episodes(pieces, config.data.episode[0], config.data.batch, config.data.seed)
    )
    saved = _Saved(checkpoint.Checkpoints(run_dir / "checkpoints", config.train.keep), stepper)
    hashes = dict(zip(("encoder", "decoder"), (t.hash for t in tokenizers), strict=True))
    meta = {"config": configs.to_dict(config), "tokenizers": hashes}
    state = saved.restore(state, stream, meta)
    run = _Run(config, run_dir, mesh, stepper, saved, meta, progress)
    try:
        state, evaluation, finished = run.steps(state, frozen, stream, held_out)
    finally:
        run.close()
    step = int(state.step)
    if finished and jax.process_count() == 1:
        whole = {**frozen, **state.params}
        if config.model.lexicon is not None:
            if progress:
                report.say(f"fitting a lexicon of {config.model.lexicon.entries:,} words")
            whole |= _lexicon(config, skeleton.model(whole), tokenizers, documents[0])
        kept = _not_from_source(config, whole, stepper.trained)
        # Half the size for the two large maps, whose products are summed over hundreds of terms.
        halved = [name for name in _HALVED if any(re.search(name, kept_name) for kept_name in kept)]
        export.save_exported(
            run_dir / "model.safetensors",
            kept,
            {**meta, "step": step, "evaluation": evaluation},
            dict.fromkeys(halved, "bfloat16"),
        )
    return Outcome(step, finished, evaluation)


def _claim(run_dir: Path, config: Config) -> None:
    """Makes the folder this config's, or finds that it is another's."""
    path = run_dir / "config.json"
    mine = configs.to_dict(config)
    if path.is_file():
        _same_run(json.loads(path.read_text(encoding="utf-8")), mine, run_dir)
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _not_from_source(config: Config, parameters: Mapping[str, Any], trained: list[str]):
    """Without the frozen parameters of towers that are loaded: their source gives them again."""
    towers = {"encoder": config.model.encoder, "decoder": config.model.decoder}
    loaded = tuple(f"{name}/" for name, tower in towers.items() if tower.source is not None)
    return {n: a for n, a in parameters.items() if n in trained or not n.startswith(loaded)}


def _same_run(theirs: Mapping[str, Any], mine: Mapping[str, Any], run_dir: Path) -> None:
    theirs, mine = _flat(theirs), _flat(mine)
    keys = sorted(set(theirs) | set(mine))
    differ = [k for k in keys if theirs.get(k) != mine.get(k) and k not in _FREE]
    if differ:
        lines = [f"{k}: {theirs.get(k)!r} in the folder, {mine.get(k)!r} now" for k in differ]
        raise OtherRun(
            f"{run_dir} belongs to a run of another config:\n  " + "\n  ".join(lines)
            + "\nTake another folder, or the config that it was made with (its config.json)."
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    inner = (_flat(item, f"{path}.{key}" if path else key) for key, item in value.items())
    return {key: leaf for part in inner for key, leaf in part.items()}


def _sources(config: Config, run_dir: Path):
    """((training, held-out documents), (encoder's, decoder's tokenizer))"""
    documents = corpus.documents(config.data.corpus)
    training, held_out = ([d for d in documents if d.held_out is side] for side in (False, True))
    tokenizers = vocabulary.tokenizers(
        config, lambda: (document.text for document in training), run_dir / "tokenizer.json"
    )
    return (training, held_out), tokenizers


def _pieces(config: Config, encoder: Tokenizer, decoder: Tokenizer, documents, name: str | None):
    """The documents' pieces, tokenised for both towers; `name` is how to report them, if at all."""
    data = config.data
    # A chunk has to leave room for the two tokens that frame it, in either tower.
    room = min(data.encoder_tokens, data.decoder_tokens) - 2

    def count(text: str) -> int:
        return max(len(encoder.ids(text)), len(decoder.ids(text)))

    texts = corpus.pieces(documents, data.unit, room, count)
    made, dropped = episodes.tokenise(
        texts, encoder, decoder, data.encoder_tokens, data.decoder_tokens, progress=name is not None
    )
    if name is not None:
        report.say(f"{name}: {len(made):,} pieces, {dropped:,} too long ones dropped")
    return made


def _lexicon(config: Config, model: Larimar, tokenizers, documents) -> dict[str, np.ndarray]:
    """The lexicon's parameters, fitted to the trained encoder (§10)."""
    trained = Pretrained(config, model, *tokenizers, source=config.name, fingerprint="")
    texts = (document.text for document in documents)
    entries = config.model.lexicon.entries
    return lexicon.fit(lambda words: trained.encode(words).latent, tokenizers[1], texts, entries)


class _Saved:
    """The run's checkpoints, in terms of its state: M₀ and log σ_W² are an item of their own."""

    def __init__(self, checkpoints: checkpoint.Checkpoints, stepper: Stepper):
        self.checkpoints, self._stepper = checkpoints, stepper

    @staticmethod
    def _items(state: TrainState) -> dict[str, Any]:
        memory = {n: leaf for n, leaf in state.params.items() if n.startswith("memory/")}
        params = {n: leaf for n, leaf in state.params.items() if n not in memory}
        # What the optimiser and the policy on bad steps remember.
        remembered = (state.optimizer, state.average, state.loss)
        return dict(params=params, memory=memory, optimizer=remembered)

    def save(self, step: int, state: TrainState, stream, meta: Mapping[str, Any]) -> None:
        self.checkpoints.save(step, **self._items(state), data=stream, meta=meta)

    def restore(self, fresh: TrainState, stream, meta: Mapping[str, Any]) -> TrainState:
        """The newest whole checkpoint as a state, or `fresh` where there is none."""

        def check(found: Mapping[str, Any]) -> None:
            if found["tokenizers"] != meta["tokenizers"]:
                raise OtherRun(
                    f"{self.checkpoints.directory} was trained with other tokenizers. The corpus "
                    "or the package of a tower has changed since; restore it, or start a new run."
                )
            _same_run(found["config"], meta["config"], self.checkpoints.directory)

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
    """The steps of a run, with its logs; `steps` is called once."""

    def __init__(self, config, run_dir, mesh, stepper, saved, meta, progress):
        self._config, self._dir, self._mesh, self._stepper = config, run_dir, mesh, stepper
        self._saved, self._meta, self._progress = saved, meta, progress
        self._log: MetricsLog | None = None
        self._read_at = 0.0

    def close(self) -> None:
        self._saved.checkpoints.close()
        if self._log is not None:
            self._log.close()

    def steps(self, state: TrainState, frozen, stream, held_out):
        """(state, last evaluation, whether all steps are done)"""
        every, first, total = self._config.train, int(state.step), self._config.train.steps
        if jax.process_index() == 0:
            self._log = MetricsLog(self._dir, first)
        batches = self._held_out(held_out)
        bar = report.Bar(total, first, shown=self._progress and jax.process_index() == 0)
        evaluation = {}
        if first in (0, total):
            evaluation = self._evaluate(first, state, frozen, batches, bar, written=first == 0)
        saved_at, pending, step = first, None, first
        with _terminated() as stopping, bar:
            while step < total and not stopping(step):
                local = next(stream)
                batch = sharding.place_batch(local, self._mesh)
                begun = time.perf_counter()
                state, metrics = self._stepper.step(state, frozen, batch)
                step += 1
                # The step before this one: while its numbers are read, this one already runs.
                self._read(pending, state, bar)
                pending = (step, metrics, begun, int(local["decoder_mask"].sum()))
                last = step == total
                if last or step % every.evaluate_every == 0 or step % every.checkpoint_every == 0:
                    self._read(pending, state, bar)
                    pending = None
                if last or step % every.evaluate_every == 0:
                    evaluation = self._evaluate(step, state, frozen, batches, bar)
                if last or step % every.checkpoint_every == 0:
                    self._saved.save(step, state, stream, self._meta)
                    saved_at = step
            self._read(pending, state, bar)
            if step != saved_at:
                self._saved.save(step, state, stream, self._meta)
            self._saved.checkpoints.wait()
        if step < total:
            report.say(f"stopped by SIGTERM after step {step}; the same command goes on from here")
        return state, evaluation, step == total

    def _held_out(self, pieces: episodes.Pieces) -> list[dict[str, jax.Array]]:
        """The same batches at every evaluation; too few pieces for one are used more than once."""
        size = (self._config.data.batch, max(self._config.data.episode))
        if not len(pieces):
            raise episodes.TooFewPieces(
                "no document of data.corpus is held out, or none of its pieces fits "
                "data.encoder_tokens and data.decoder_tokens; use a larger corpus"
            )
        count = min(_EVALUATION_BATCHES, max(1, len(pieces) // math.prod(size)))
        order = np.random.default_rng(self._config.data.seed).permutation(len(pieces))
        mine = slice(jax.process_index(), None, jax.process_count())
        return [
            sharding.place_batch(pieces.gather(rows[mine]), self._mesh)
            for rows in np.resize(order, (count, *size))
        ]

    def _evaluate(self, step: int, state: TrainState, frozen, batches, bar, written: bool = True):
        """The mean terms over the held-out batches, in nats per token."""
        terms = [jax.device_get(self._stepper.evaluate(state.params, frozen, b)) for b in batches]
        mean = {name: float(np.mean([t[name] for t in terms])) for name in sorted(terms[0])}
        if self._log is not None and written:
            self._log.write(step, "evaluation", mean)
        bar.evaluation(step, mean)
        return mean

    def _read(self, pending, state: TrainState, bar) -> None:
        """Waits for a step's numbers and writes them down."""
        if pending is None:
            return
        step, metrics, begun, tokens = pending
        found = jax.device_get(metrics)
        # A step dispatched while the one before it ran began when that one was done.
        now = time.perf_counter()
        seconds, self._read_at = now - max(begun, self._read_at), now
        loss, norm = float(found["loss"]), float(found["gradient_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(self._blame(step, loss, found, state))
        values = {
            "loss": loss,
            **{name: float(value) for name, value in sorted(found["terms"].items())},
            **{name: float(found[name]) for name in ("beta", "learning_rate", "gradient_norm")},
            "tokens_per_second": tokens * jax.process_count() / seconds,
            "episodes_per_second": self._config.data.batch / seconds,
        }
        shown = step % self._config.train.log_every == 0
        if self._log is not None:
            self._log.write(step, "train", values, board=shown)
        bar.step(step, values)

    def _blame(self, step: int, loss: float, found: Mapping[str, Any], state: TrainState) -> str:
        """The first that is not finite: a parameter causes a term, and a term a gradient."""
        # The step left the state as it was, so these are the parameters that it began with.
        bad = [f"parameter {n}" for n, leaf in state.params.items() if not _finite(leaf)]
        bad += [f"loss term {n}" for n, term in sorted(found["terms"].items()) if not _finite(term)]
        squares = np.asarray(found["gradient_squares"])
        named = zip(self._stepper.trained, squares, strict=True)
        bad += [f"gradient of {n}" for n, square in named if not _finite(square)]
        first = bad[0] if bad else "the norm of the gradients, though each of them is finite"
        return (
            f"step {step}: the loss is {loss}; the first that is not finite is {first}. The state "
            "before this step is untouched, and the last checkpoint is sound. Likely causes: too "
            "high a learning rate (train.learning_rate, train.warmup_steps), too little clipping "
            "(train.clip_norm), or a compute dtype with too small a range (model.dtype)."
        )


def _finite(value: Any) -> bool:
    return bool(jax.numpy.isfinite(value).all())


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
