"""A run that fits a reader (decoders/reader.py) to what frozen towers make of phrases in context.

The loss of a place where a token y is to be said is −ln p(y); after the last one it is KL(p_LM ‖ p), as
the language model goes on by itself. Both are over a step's targets, the vocabulary's first tokens, its
most frequent ones, and a sample of the rest: the whole vocabulary costs ten times as much. Evaluations
are over all of it. Noise is added to z, as other facts in a memory add to what is read.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from larimar_jax import config as configs
from larimar_jax import losses, model
from larimar_jax.config import Config
from larimar_jax.data import corpus, vocabulary
from larimar_jax.data.phrases import Phrases
from larimar_jax.model import AbstractModel
from larimar_jax.train import checkpoint, distributed, loop, optimizer, reader_features
from larimar_jax.train.initial import start_from
from larimar_jax.train.logging import Bar, say
from larimar_jax.train.reader_features import LEAVE, FeatureMaker, Features, load
from larimar_jax.train.step import TrainState

# Tokens of a step's softmax beside its targets: the vocabulary's first, and drawn ones.
_FIRST, _DRAWN = 2048, 3072
# The most noise, as a share of z's length.
_NOISE = 0.5
# Files of held-out features, their phrases that an evaluation is over, and how many at a time.
_HELD_OUT, _JUDGED, _TOGETHER = 1, 1024, 64
# Places and tokens of phrases for which a step has room, of those that so many have on average.
_ROOM = 1.15


class NotAlone(ValueError):
    """A config that trains more than the reader, or a process that is not the only one."""


def train(config: Config, run_dir: str | Path, *, progress: bool = True) -> loop.Outcome:
    """Fit the reader until `train.steps`, or until SIGTERM, which saves and returns.

    `run_dir` receives config.json, features/ (what the towers make of `data.phrases`), checkpoints/,
    metrics.jsonl (an evaluation a line) and at the end model.safetensors. A folder that has any of these
    is gone on with.

    Args:
    Raises:
        OtherRun: the folder belongs to a config that differs; names the keys.
        NotAlone: the config trains other parameters too, or there are several processes.
        CheckpointError: there are checkpoints and none is whole.
    """
    run_dir, settings = Path(run_dir), config.train
    if jax.process_count() > 1:
        raise NotAlone("A reader is fitted in one process, in minutes; start one process alone.")

    # 1. The folder belongs to one config, and nothing but the reader is trained.
    loop.claim(run_dir, config)
    documents = corpus.open_corpus(config.data.corpus)
    larimar = model.build(config, jax.random.key(settings.seed))
    trained, frozen = optimizer.partition(model.parameters(larimar), settings.frozen)
    trained, _ = start_from(trained, settings.start_from)
    if more := sorted(name for name in trained if not name.startswith("reader/")):
        raise NotAlone(
            f"a reader is fitted alone, and train.frozen leaves {', '.join(more)} to be trained. "
            'Freeze all else: frozen=("^(?!reader/)",).'
        )

    # 2. Features, of both sides of the corpus, from the folder or made.
    texts = (document.text for document in documents.side(held_out=False))
    tokenizers = vocabulary.tokenizers(config, lambda: texts, run_dir / "tokenizer.json")
    maker = FeatureMaker(larimar, tokenizers, config.model.reader.positions, settings.products)
    size = reader_features.BLOCKS * reader_features.PHRASES
    files, sides, words = -(-config.data.phrases // size), [], tokenizers[1].words()
    # Of all that decides them: a folder in which nothing was trained may have those of another config.
    hashes = [tokenizer.hash for tokenizer in tokenizers]
    of_model = config.model.encoder, config.model.decoder, config.model.reader.positions
    source = (documents.identity, config.data.seed, settings.products, size, of_model, hashes)
    digest = hashlib.sha256(repr(source).encode()).hexdigest()[:12]
    for held_out, count in ((True, _HELD_OUT), (False, files)):
        name = "held_out" if held_out else "training"
        with Bar(count, 0, shown=progress) as bar:
            phrases = Phrases(documents, held_out, words)
            folder, title = run_dir / "features" / digest / name, f"{name} features, files"
            shown = functools.partial(bar.show, text=title)
            sides.append(load(maker, phrases, config.data.seed, count, folder, shown))
    held_out, training = (jax.device_put(side) for side in sides)
    if progress:
        say(f"{len(training.first_row) - 1:,} phrases, {len(training.state):,} places")

    # 3. The newest readable checkpoint, if any.
    fit = ReaderFit(config, AbstractModel(larimar))
    batches = iter(_batches(len(training.first_row) - 1, config))
    meta = {
        "config": configs.to_dict(config),
        "tokenizers": {"encoder": tokenizers[0].hash, "decoder": tokenizers[1].hash},
    }
    with checkpoint.Checkpoints(run_dir / "checkpoints", settings.keep) as checkpoints:
        state = fit.init(trained)
        restored = checkpoints.restore(
            state, batches, lambda saved: loop.check_same_run(saved, meta, run_dir)
        )
        state = state if restored is None else restored[0]
        step = first = int(state.step)
        evaluation: dict[str, float] = {}

        # 4. Steps, until all are done or the run is to stop.
        with (
            distributed.preemption() as stopping,
            Bar(settings.steps, first, shown=progress) as bar,
        ):
            while step < settings.steps and not stopping(step):
                phrases = next(batches)
                step += 1
                state, loss = fit.step(state, frozen, training, phrases)
                if step % settings.log_every == 0:
                    bar.show(step, f"loss {float(loss):.3f}")
                if step == settings.steps or step % settings.evaluate_every == 0:
                    evaluation = fit.evaluate(state, frozen, held_out)
                    line = json.dumps({"step": step, **evaluation})
                    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
                    if progress:
                        bar.console.print(line)
                if step == settings.steps or step % settings.checkpoint_every == 0:
                    checkpoints.save(step, state, batches, meta)
            if step < settings.steps:
                checkpoints.save(step, state, batches, meta)
            checkpoints.wait()
    if step < settings.steps:
        say(f"stopped by SIGTERM after step {step}; the same command goes on from here")
        return loop.Outcome(step, False, evaluation)

    # 5. Export.
    meta |= {"step": step, "evaluation": evaluation}
    path = run_dir / "model.safetensors"
    loop.export(path, config, {**frozen, **state.params}, set(state.params), meta)
    if progress:
        say(f"finished: {step:,} steps, the model is {path}")
    return loop.Outcome(step, True, evaluation)


class ReaderFit:
    """The compiled step and evaluation of a run.

    Attributes:
        init: the reader's parameters → the state before the first step. step: (state, frozen, features,
            phrases) → (state, loss), compiled; the state is donated. phrases: their numbers, and the
            step's number is the state's.
    """

    def __init__(self, config: Config, abstract: AbstractModel):
        self._abstract, self._seed = abstract, config.train.seed
        self._optimizer = optimizer.make(config.train)
        self.step = jax.jit(self._step, donate_argnums=0)
        self._judge = jax.jit(self._judged)

    def init(self, params: Mapping[str, Array]) -> TrainState:
        """Return the state before the first step."""
        zero, loss = jnp.zeros((), jnp.int32), jnp.full((), jnp.inf)
        # Copied: the step donates its state.
        params = jax.tree.map(jnp.copy, dict(params))
        return TrainState(zero, params, self._optimizer.init(params), {}, loss)

    def evaluate(
        self, state: TrainState, frozen: Mapping[str, Array], features: Features
    ) -> dict[str, float]:
        """Return, of held-out places: nats per token, through memory and without; shares of first and of
        further tokens that are the likeliest; of places after the last, where the likeliest is the
        language model's."""
        chosen = np.random.default_rng(0).permutation(len(features.first_row) - 1)[:_JUDGED]
        parts = [
            self._judge(state.params, frozen, features, np.int32(part))
            for part in chosen.reshape(-1, min(_TOGETHER, len(chosen)))
        ]
        loss, base, hit, target, depth, real = (
            np.concatenate([np.asarray(array) for array in arrays])
            for arrays in zip(*parts, strict=True)
        )
        answer, first = real & (target != LEAVE), depth == 0
        return {
            "nats": float(loss[answer].mean()),
            "language_model": float(base[answer].mean()),
            "first": float(hit[answer & first].mean()),
            "further": float(hit[answer & ~first].mean()),
            "left": float(hit[real & ~answer].mean()),
        }

    def _step(self, state, frozen, features, phrases):
        key = jax.random.fold_in(jax.random.key(self._seed), state.step)
        loss, gradient = jax.value_and_grad(self._loss)(
            state.params, frozen, features, phrases, key
        )
        updates, optimised = self._optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimised, {}, loss), loss

    def _loss(
        self,
        params: Mapping[str, Array],
        frozen: Mapping[str, Array],
        features: Features,
        phrases: Int[Array, " N"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        noise_key, size_key, token_key = jax.random.split(key, 3)
        places = _places(features, phrases)

        def noisy(answer):
            size = jax.random.uniform(size_key, (len(answer), 1), maxval=_NOISE)
            noise = jax.random.normal(noise_key, answer.shape)
            return answer + noise * size / jnp.sqrt(jnp.float32(answer.shape[1]))

        changed, head = self._read(params, frozen, places, noisy)

        vocabulary = head.kernel.shape[0 if head.tied else 1]
        first = jnp.arange(min(_FIRST, vocabulary))
        drawn = jax.random.randint(token_key, (_DRAWN,), 0, vocabulary)
        tokens = jnp.sort(jnp.concatenate([jnp.maximum(places.target, 0), first, drawn]))
        again = jnp.concatenate([jnp.zeros(1, bool), tokens[1:] == tokens[:-1]])
        kernel = head.kernel[tokens] if head.tied else head.kernel[:, tokens]
        bias = None if head.bias is None else head.bias[tokens]
        some = losses.Head(kernel, bias, head.tied, head.dtype)

        def log_p(hidden):
            return jax.nn.log_softmax(jnp.where(again, -jnp.inf, losses.logits(some, hidden)))

        p, spoken = log_p(changed), places.target != LEAVE
        place = jnp.searchsorted(tokens, jnp.maximum(places.target, 0))
        total = -jnp.take_along_axis(p, place[:, None], axis=1)[:, 0]
        total = total.sum(where=places.real & spoken)
        # A phrase has at most one place after it, and few phrases have one.
        (after,) = jnp.nonzero(places.real & ~spoken, size=places.count // 2, fill_value=-1)
        base = log_p(places.hidden[after])
        gap = jnp.where(again, 0.0, base - p[after])
        left = (jnp.exp(base) * gap).sum(axis=1)
        return (total + left.sum(where=after >= 0)) / places.real.sum(dtype=jnp.float32)

    def _judged(
        self, params, frozen, features: Features, phrases: Int[Array, " N"]
    ) -> tuple[Array, ...]:
        """Return, of the B places of N phrases, −ln p of the target with the reader and without, whether
        the likeliest token is the target, or the language model's where that is to go on; targets and
        depths; and whether it is a place."""
        places = _places(features, phrases)
        changed, head = self._read(params, frozen, places)
        logits, base = losses.logits(head, changed), losses.logits(head, places.hidden)
        target = jnp.where(places.target == LEAVE, base.argmax(axis=1), places.target)
        nats = (
            -jnp.take_along_axis(jax.nn.log_softmax(each), target[:, None], axis=1)[:, 0]
            for each in (logits, base)
        )
        hit = logits.argmax(axis=1) == target
        return *nats, hit, places.target, places.depth, places.real

    def _read(
        self, params, frozen, places: "_Places", noisy=lambda answer: answer
    ) -> tuple[Float[Array, "B D"], losses.Head]:
        larimar = self._abstract.model({**frozen, **params})
        token = larimar.decoder.word.embedding[...][places.token]
        terms = larimar.reader.terms(places.pieces, places.at)
        total = jnp.zeros((places.count, terms.shape[1]), terms.dtype).at[places.of].add(terms)
        answer = noisy(larimar.reader.scale(total))[places.phrase]
        changed = larimar.reader(answer, places.hidden, token, places.depth)
        return changed, larimar.decoder.to_logits


class _Places(NamedTuple):
    """The places of N phrases, with the encoder's T tokens of these; real: not padding."""

    count: int  # N
    pieces: Float[Array, "T H"]
    at: Int[Array, " T"]  # place in its phrase
    of: Int[Array, " T"]  # its phrase; N for padding
    phrase: Int[Array, " B"]
    hidden: Float[Array, "B D"]
    token: Int[Array, " B"]
    depth: Int[Array, " B"]
    target: Int[Array, " B"]
    real: Bool[Array, " B"]


def _places(features: Features, phrases: Int[Array, " N"]) -> _Places:
    count, whole = len(phrases), len(features.first_row) - 1

    def spread(begin: Int[Array, " b"], things: int) -> tuple[Array, Array, Array]:
        """Return of each thing its phrase, N for padding, its number, and its place in the phrase."""
        counts = begin[phrases + 1] - begin[phrases]
        ends = jnp.cumsum(counts)
        number = jnp.arange(math.ceil(_ROOM * things * count / whole / 64) * 64)
        of = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        inside = jnp.minimum(of, count - 1)
        place = number - (ends - counts)[inside]
        return of, jnp.minimum(begin[phrases[inside]] + place, things - 1), place

    of, piece, at = spread(features.first_piece, len(features.pieces))
    phrase, row, _ = spread(features.first_row, len(features.state))
    return _Places(
        count,
        features.pieces[piece].astype(jnp.float32),
        at,
        of,
        jnp.minimum(phrase, count - 1),
        features.hidden[features.state[row]].astype(jnp.float32),
        features.token[row],
        features.depth[row],
        features.target[row],
        phrase < count,
    )


def _batches(phrases: int, config: Config) -> grain.IterDataset:
    """Return the stream of numbers of phrases, each once an epoch, whose order is the epoch's own."""
    batch, seed = config.data.batch, config.data.seed
    count = max(1, phrases // batch)

    def chosen(number: int) -> Int[np.ndarray, " N"]:
        epoch, place = divmod(int(number), count)
        return np.int32(order(epoch)[np.arange(place * batch, (place + 1) * batch) % phrases])

    @functools.lru_cache(2)
    def order(epoch: int) -> Int[np.ndarray, " n"]:
        return np.random.default_rng((seed, epoch)).permutation(phrases)

    return grain.MapDataset.range(1 << 40).map(chosen).to_iter_dataset()
