"""Texts in, texts out: a trained model with its tokenizers and the memory that it is edited through.

pipeline = load("smol")
encodings = pipeline.encode(["The capital of Japan is"])
condition = pipeline.condition(encodings.latent)
pipeline.generate(["The capital of Japan is"], condition)
"""

import copy
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from larimar_jax import config as configs
from larimar_jax import generate, latent_layout, scope, scoring, weights
from larimar_jax.config import Config
from larimar_jax.data import vocabulary
from larimar_jax.latent_layout import Condition
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.dual import Dual
from larimar_jax.memory.streaming import Streaming
from larimar_jax.model import Larimar, load_towers, restore
from larimar_jax.packing import steps_bucket
from larimar_jax.weights import model_file
from larimar_jax.weights.tokenizer import TextTooLong, Tokenizer, bucket

# Texts of one encoder call; a long list goes through it in slices.
_TEXTS = 32


class EncodingNotFinite(FloatingPointError):
    """A text of which the encoder made NaN or infinity."""


@dataclasses.dataclass(frozen=True)
class Encodings:
    """n texts, float32: `embedding` for the scope detector (§6), `latent` for the memory (§2).

    pooled: the encoder's output, from which the model's detector, if any, makes `embedding`.
    C is the size of the whole `LatentLayout`: behind a text's encoding stand its features and the code
    of its answer, zeros where it has none.
    """

    embedding: Float[np.ndarray, "n E"]
    latent: Float[np.ndarray, "n C"]
    pooled: Float[np.ndarray, "n H"]

    def __getitem__(self, rows: Sequence[int] | slice) -> "Encodings":
        """Return those of the given rows."""
        return Encodings(self.embedding[rows], self.latent[rows], self.pooled[rows])


class Pipeline:
    """A model with its tokenizers, the streaming memory it is edited through, and its fingerprint.

    Every method takes texts or arrays and goes through one compiled function per bucket of shapes.
    Nothing here changes after construction: what is written lives in memory states.
    """

    def __init__(
        self,
        config: Config,
        model: Larimar,
        encoder_tokenizer: Tokenizer,
        decoder_tokenizer: Tokenizer,
        *,
        source: str,
        fingerprint: str,
        projection: Float[np.ndarray, "H H"] | None = None,
        relations: scope.RelationDetector | None = None,
    ):
        self.config, self.model = config, model
        self.encoder_tokenizer, self.decoder_tokenizer = encoder_tokenizer, decoder_tokenizer
        self.source, self.fingerprint = source, fingerprint
        self.projection = None if projection is None else jax.device_put(projection)
        self.relations = None if relations is None else jax.device_put(relations)
        editing, self.layout = config.editing, latent_layout.layout(config)
        params = latent_layout.extend_prior(model.memory.params(), self.layout)
        sizes = dict(slots=len(params.prior_memory), latent=self.layout.size)
        self.memory = Streaming(**sizes, ridge=editing.ridge, query_noise=editing.query_noise)
        self.prepared: Prepared = self.memory.prepare(params)
        self.graph, self.state = nnx.split(model)

    @property
    def dual(self) -> Dual:
        """The same memory, which costs what its facts are and not what its slots are: for few facts."""
        fields = ("slots", "latent", "ridge", "query_noise")
        return Dual(**{name: getattr(self.memory, name) for name in fields})

    @property
    def scope_threshold(self) -> float:
        """The least cosine of a query and a written prompt in scope."""
        return self.config.editing.scope_threshold

    def with_memory(self, memory: Streaming, prepared: Prepared) -> "Pipeline":
        """Return the same towers with another memory, which holds as many numbers a text.

        Raises:
          ValueError: its latents are of another size.
        """
        if memory.latent != self.memory.latent:
            raise ValueError(
                f"the memory holds {memory.latent} numbers a text and the model makes "
                f"{self.memory.latent} (encoding, features and spelling): give it that `latent`"
            )
        pipeline = copy.copy(self)
        pipeline.memory, pipeline.prepared = memory, prepared
        return pipeline

    def encode(
        self, texts: Sequence[str], answers: Sequence[str | None] | None = None, cut: bool = False
    ) -> Encodings:
        """Embed and encode n texts.

        Args:
          answers: of each text the answer in it, whose code stands beside its encoding where the memory
            keeps such codes; None has none, as a query.
          cut: leave out the beginning of a text that is too long.

        Raises:
          ValueError: not as many answers as texts.
          TextTooLong: a text exceeds what the encoder takes; names it.
          EncodingNotFinite: names the first text whose encoding is not finite.
        """
        if self.relations is None:
            return self._encode_texts(texts, answers, cut)
        count, (frames, places) = len(texts), scope.frames(texts)
        # Of one call: a few more texts of a batch take hardly longer.
        answers = None if answers is None else [*answers, *[None] * len(frames)]
        both = self._encode_texts([*texts, *frames], answers, cut)
        pooled, framed = both.pooled[:count], both.pooled[count:][places]
        padding = ((0, (1 << max(count - 1, 0).bit_length()) - count), (0, 0))
        padded = (np.pad(rows, padding) for rows in (pooled, framed))
        embedding = scope.relation_embedding(*padded, *self.relations)
        return Encodings(np.asarray(embedding)[:count], both.latent[:count], pooled)

    def _encode_texts(self, texts: Sequence[str], answers: Any, cut: bool) -> Encodings:
        limit, width = self.model.encoder.config.max_length, self.model.encoder.config.width
        batch = self.encoder_tokenizer.encode(texts)
        lengths = batch.mask.sum(axis=1)
        for row in np.flatnonzero(lengths > limit) if cut else ():
            begin = len(self.encoder_tokenizer.prefix)
            batch.ids[row, begin:limit] = batch.ids[row, : lengths[row]][begin - limit :]
        if not cut and len(texts) and lengths.max() > limit:
            row = int(lengths.argmax())
            raise TextTooLong(
                f"The text {_shorten(texts[row])!r} has {lengths[row]} tokens and the encoder takes "
                f"{limit}. Shorten it, or split it into several."
            )
        spans, parts = None, self.layout
        if parts.answer_encoding:
            tokenizer, answers = self.encoder_tokenizer, answers or [None] * len(texts)
            spans = latent_layout.answer_tokens(tokenizer, texts, answers, batch.mask)
        sizes = (width, parts.encoding + parts.key_features, width, parts.answer_encoding)
        outputs = [np.zeros((len(texts), size), np.float32) for size in sizes]
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(texts), _TEXTS):
            rows = order[first : first + _TEXTS]
            # The last bucket may end beyond the positions that the encoder has.
            columns = min(bucket(int(lengths[rows].max())), limit)
            padding = ((0, min(_TEXTS, 1 << (len(rows) - 1).bit_length()) - len(rows)), (0, 0))
            ids, mask = batch.ids[rows, :columns], np.pad(batch.mask[rows, :columns], padding)
            ids = np.pad(ids, padding, constant_values=self.encoder_tokenizer.pad)
            span = None if spans is None else np.pad(spans[rows, :columns], padding)
            inputs = (self.projection, ids, mask, span, self.config.editing.key_features)
            encoded = latent_layout.encode(self.graph, self.state, *inputs)
            for output, part in zip(outputs, encoded, strict=True):
                output[rows] = np.asarray(part)[: len(rows)]
        embedding, latent, pooled, answer = outputs
        latent = np.concatenate([latent, answer], axis=1)
        finite = np.isfinite(embedding).all(axis=1) & np.isfinite(latent).all(axis=1)
        if not finite.all():
            raise EncodingNotFinite(
                f"The encoding of {_shorten(texts[int(np.argmin(finite))])!r} is not finite, so nothing "
                "was written or read. The encoder's weights are damaged, or its compute dtype "
                "overflows: load the model anew, or set model.dtype to float32."
            )
        if self.config.editing.answer_code is not None:
            answers = [None] * len(texts) if answers is None else answers
            if len(answers) != len(texts):
                raise ValueError(f"{len(texts)} texts need as many answers; got {len(answers)}")
            say = self.decoder_tokenizer.following
            tokens = [None if answer is None else say(answer.strip()) for answer in answers]
            latent = np.concatenate([latent, self.answer_codes(tokens)], axis=1)
        return Encodings(embedding, latent, pooled)

    def encode_fact(self, prompts: Sequence[str], answer: str) -> tuple[Encodings, Encodings]:
        """Return keys and values of a fact, for each prompt a row, or several for an answer of more
        tokens than a code has places: a further part's key is its number, the prompt and the part
        before. (Without a number those of an answer that repeats itself are hardly apart.)

        Raises:
          TextTooLong, EncodingNotFinite: as `encode`.
        """
        code, tokens = self.config.editing.answer_code, self.decoder_tokenizer.following(answer)
        size = len(tokens) + 1 if code is None else code.positions
        starts = range(0, len(tokens) + 1, size)
        parts = [self.decoder_tokenizer.decode(tokens[start : start + size]) for start in starts]
        further = enumerate(parts[:-1], 1)
        texts = [*prompts, *(f"{n} {p} {part.strip()}" for n, part in further for p in prompts)]
        whole, answers = [f"{prompt} {answer}" for prompt in prompts], [answer] * len(prompts)
        encodings = self.encode([*texts, *whole], [None] * len(texts) + answers)
        keys, values = (
            encodings[: len(texts)],
            encodings[[*range(len(texts), len(encodings.latent))] * len(starts)],
        )
        if code is not None:
            codes = self.answer_codes([tokens[start : start + size] for start in starts])
            values.latent[:, -codes.shape[1] :] = np.repeat(codes, len(prompts), axis=0)
        return keys, values

    def answer_codes(self, tokens: Sequence[Sequence[int] | None]) -> Float[np.ndarray, "n S"]:
        """Return the codes of n answers or parts of one (`latent_layout.pack_answers`)."""
        code = self.config.editing.answer_code
        packed = latent_layout.pack_answers(code, tokens, self.decoder_tokenizer.eos)
        codes = np.zeros((len(packed), self.layout.answer_code), np.float32)
        rows = np.flatnonzero((packed != latent_layout.NOTHING).any(axis=1))
        if len(rows):
            # Padded, so that few numbers of answers are compiled for.
            padded = np.resize(packed[rows], (bucket(len(rows), 8), code.positions))
            codes[rows] = np.asarray(latent_layout.encode_answers(code, padded))[: len(rows)]
        return codes

    def condition(
        self,
        readout: Float[np.ndarray, "n C"] | Array,
        active: Bool[np.ndarray, " n"] | None = None,
    ) -> Condition:
        """Return `Larimar.condition` of n readouts, compiled, with the evidence for answers in them.

        Behind a readout may stand the codes of further parts of its answer, of all rows as many. Rows of
        padding, not active, come after the n, as few numbers of rows are compiled for.
        """
        rows, more = len(readout), steps_bucket(len(readout), 1) - len(readout)
        readout = np.pad(np.asarray(readout, np.float32), ((0, more), (0, 0)))
        active = np.pad(np.ones(rows, bool) if active is None else np.asarray(active), (0, more))
        return latent_layout.condition(
            self.graph, self.state, readout, active, self.layout, self.config.editing.answer_code
        )

    def zero(self, rows: int) -> Condition:
        """Return z = 0 for so many rows: the memory slot is there and holds zeros (§2)."""
        single = self.condition(np.zeros((1, self.memory.latent), np.float32))
        return single.rows(jnp.zeros((steps_bucket(rows, 1),), jnp.int32))

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        condition: Condition | None = None,
    ) -> Float[np.ndarray, "n c"]:
        """Return ℓ of c candidates for each of n prompts, in nats per token; see `judge`."""
        return self.judge(prompts, candidates, condition).loss

    def judge(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        condition: Condition | None = None,
    ) -> scoring.Scores:
        """Return losses and teacher-forced accuracies of every candidate; see `scoring.judge`."""
        return scoring.judge(self.model, self.decoder_tokenizer, prompts, candidates, condition)

    def generate(
        self, prompts: Sequence[str], condition: Condition | None = None, **options
    ) -> list[str]:
        """Return continuations; options as in `generate.generate`."""
        return generate.generate(self.model, self.decoder_tokenizer, prompts, condition, **options)

    def stream(
        self, prompts: Sequence[str], condition: Condition | None = None, **options
    ) -> Iterator[list[str]]:
        """Yield continuations piece by piece; options as in `generate.pieces`."""
        steps = generate.pieces(self.model, self.decoder_tokenizer, prompts, condition, **options)
        yield from ([piece.text for piece in pieces] for pieces in steps)


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def load(source: str | pathlib.Path = "smol", overrides: Sequence[str] = ()) -> Pipeline:
    """Load a shipped checkpoint by name, or an export or a finished run by path.

    Args:
      overrides: settings of how it is edited that differ from the file's, as "editing.ridge=0.1".

    Raises:
      ConfigError: an override that names no setting of `editing`, or a value that makes no sense.
      FileNotFoundError: no such model, or the package of a tower is not installed (names the command).
      ExportError: the file is damaged, half written, or does not fit its own config.
    """
    path = model_file.locate(source)
    arrays, meta = model_file.load_exported(path)
    if outside := [text for text in overrides if not text.startswith("editing.")]:
        raise configs.ConfigError(
            f"{outside[0]!r} is no setting of `editing`: what else is in a checkpoint was trained so."
        )
    config = configs.load(meta["config"], overrides)
    towers = load_towers(config)
    fitted = {name: arrays.pop(name) for name in scope.ARRAYS if name in arrays}
    model = restore(config, {name: tower for name, (tower, _) in towers.items()}, arrays, path)
    projection, relations = scope.detectors(fitted, model.encoder.config.width, path)
    encoder_tokenizer, decoder_tokenizer = vocabulary.tokenizers(
        config,
        functools.partial(_no_corpus, path),
        path.parent / "tokenizer.json",
        {name: tokenizer for name, (_, tokenizer) in towers.items()},
    )
    with path.open("rb") as file:
        # The header holds the digest of the content.
        digest = hashlib.sha256(file.read(int.from_bytes(file.read(8), "little")))
    for part in (encoder_tokenizer.hash, decoder_tokenizer.hash, *sorted(overrides)):
        digest.update(part.encode())
    for tower in (config.model.encoder, config.model.decoder):
        if tower.source is not None:
            digest.update(weights.fingerprint(tower.source).encode())
    return Pipeline(
        config,
        model,
        encoder_tokenizer,
        decoder_tokenizer,
        # A path is kept whole, so that a session finds its model from any folder.
        source=str(source) if str(source) in model_file.shipped() else str(path.resolve()),
        fingerprint=digest.hexdigest(),
        projection=projection,
        relations=relations,
    )


def _no_corpus(path: pathlib.Path) -> list[str]:
    raise FileNotFoundError(
        f"{path} was trained with a vocabulary of its own, which is not beside it. Copy tokenizer.json "
        "from the run's folder to there (a converted model has one for each tower)."
    )
