"""Held-out terms and edits of a model in training: the same texts at every evaluation."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from larimar_jax import linalg, objective
from larimar_jax.config import EditingConfig
from larimar_jax.data import edit_records
from larimar_jax.data.episodes import TooFewPieces
from larimar_jax.data.pieces import TokenizedPieces
from larimar_jax.latent_layout import Condition
from larimar_jax.memory.streaming import Streaming
from larimar_jax.model import Larimar
from larimar_jax.train import sharding
from larimar_jax.train.step import TrainState, TrainStep
from larimar_jax.weights.tokenizer import Tokenizer

# Tokens of a sample.
_SAMPLE = 16
# Held-out batches of an evaluation: enough to halve the noise of a single one, and cheap.
_BATCHES = 4
# The share of a text's words that is the prompt: enough to tell texts apart, enough left to predict.
_PROMPT = 0.6
_LEAST_WORDS = 5


class Evaluator:
    """Batches of held-out pieces, and a few of them as edits, on the devices.

    Args:
        train_step: the run's compiled step.
        pieces: held-out ones; too few for one batch are used more than once.
        tokenizers: (encoder's, decoder's).
    Raises:
        TooFewPieces: there is none, or too few of two sentences' length for `train.edits`.
    """

    def __init__(
        self,
        train_step: TrainStep,
        pieces: TokenizedPieces,
        tokenizers: tuple[Tokenizer, Tokenizer],
    ):
        self._step, self._config, mesh = train_step, train_step.config, train_step.mesh
        data, edits = self._config.data, self._config.train.edits
        if not len(pieces):
            raise TooFewPieces(
                f"no document of {data.held_out or data.corpus} is held out, or none of its pieces fits "
                "data.encoder_tokens and data.decoder_tokens; use a larger corpus (data.corpus, or "
                "data.held_out where that is set)"
            )
        size = (data.batch, max(data.episode))
        count = min(_BATCHES, max(1, len(pieces) // math.prod(size)))
        order = np.random.default_rng(data.seed).permutation(len(pieces))
        share = data.batch // jax.process_count()
        local = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        self._batches = [
            sharding.place_batch(pieces.gather(rows[local]), mesh)
            for rows in np.resize(order, (count, *size))
        ]
        self._edits = None
        whole, frozen = sharding.replicated(mesh), train_step.frozen_shardings
        if edits:
            max_tokens = train_step.abstract.max_tokens
            # Several are too short to be cut in two, or too long.
            records, most = self._config.train.edit_records, 4 * edits
            if records is None:
                cuts = cut_texts(pieces.texts(order[:most].tolist()))
            else:
                cuts = [
                    JudgedEdit(record.prompt, record.target_new, record.target_true)
                    for record in edit_records.load(records, most)
                    if record.target_true
                ]
            lengths = (data.encoder_tokens, data.decoder_tokens, max_tokens)
            chosen = choose_edits(cuts, edits, *tokenizers, *lengths)
            if chosen is None:
                raise TooFewPieces(
                    "train.edits needs held-out texts of five words or more, whose halves fit the "
                    f"decoder's {max_tokens} tokens in any pair, and there are not two; use a larger "
                    "corpus, or train.edits=0"
                    if records is None
                    else f"of the first {most} records of train.edit_records {records!r} not two have "
                    "an answer that another displaces (as CounterFact's) and fit the towers' tokens"
                )
            self._edits = jax.device_put(chosen, whole)
        self._terms = jax.jit(
            self._batch_terms,
            in_shardings=(None, frozen, train_step.batch_shardings),
            out_shardings=whole,
        )
        self._edit, self._sample = (
            jax.jit(scores, in_shardings=(None, frozen, whole), out_shardings=whole)
            for scores in (self._edit_scores, self._edit_samples)
        )
        self._tokenizer = tokenizers[1]

    def __call__(self, state: TrainState, frozen: Mapping[str, Any]) -> dict[str, float]:
        """Return the mean of each term over the batches in nats per token, the memory's condition
        number, and what `edit_scores` returns."""
        params = state.evaluated
        terms = [jax.device_get(self._terms(params, frozen, batch)) for batch in self._batches]
        mean = {name: float(np.mean([t[name] for t in terms])) for name in sorted(terms[0])}
        if self._edits is not None:
            scores = jax.device_get(self._edit(params, frozen, self._edits))
            mean |= {name: float(value) for name, value in sorted(scores.items())}
        return mean

    def samples(self, state: TrainState, frozen: Mapping[str, Any]) -> list[dict[str, str]]:
        """Return the first `train.samples` edits: prompt, answer, and what the model says before and
        after it is written."""
        if self._edits is None:
            return []
        first = {name: array[: self._config.train.samples] for name, array in self._edits.items()}
        sampled = jax.device_get(self._sample(state.evaluated, frozen, first))
        own, ending = np.asarray(first["own"]), np.asarray(first["own_ending"])
        start = ending.argmax(axis=1)
        ids = {
            "prompt": [row[1:at] for row, at in zip(own, start, strict=True)],
            "answer": [row[place] for row, place in zip(own, ending, strict=True)],
            **{name: list(rows) for name, rows in sampled.items()},
        }
        return [
            {name: self._tokenizer.decode(rows[i].tolist()) for name, rows in ids.items()}
            for i in range(len(own))
        ]

    def _batch_terms(self, params, frozen, batch) -> dict[str, Array]:
        # All three routes whatever the run optimises: reconstruction against language is what shows
        # that the memory is used, since the latter is the same text decoded with z = 0.
        weights = dataclasses.replace(
            self._config.objective, reconstruction=1.0, autoencoding=1.0, language=1.0
        )
        terms = self._step.loss(params, frozen, batch, None, weights, jnp.float32(0.0))[1]
        larimar = self._step.abstract.model({**params, **frozen})
        with jax.sharding.use_abstract_mesh(self._step.mesh.abstract_mesh):
            base = objective.untouched(larimar, batch, objective.counts(batch, weights))
        condition = linalg.matrix_condition(larimar.memory.prior_memory[...])
        return {**terms, "base": base, "memory_condition": condition}

    def _edit_scores(self, params, frozen, edits) -> dict[str, Array]:
        larimar = self._step.abstract.model({**params, **frozen})
        return edit_scores(larimar, edits, self._config.editing)

    def _edit_samples(self, params, frozen, edits) -> dict[str, Array]:
        larimar = self._step.abstract.model({**params, **frozen})
        condition = condition_of(larimar, edits, self._config.editing)
        return {
            "base": continuations(larimar, edits, None),
            "edited": continuations(larimar, edits, condition),
        }


class JudgedEdit(NamedTuple):
    """A prompt, the ending that is written, and the one that it is compared with.

    other: None for the ending of the next edit.
    """

    prompt: str
    ending: str
    other: str | None


def cut_texts(texts: Iterable[str]) -> Iterator[JudgedEdit]:
    """Yield each text that has enough words, cut in two."""
    for words in map(str.split, texts):
        at = round(_PROMPT * len(words))
        if len(words) >= _LEAST_WORDS:
            yield JudgedEdit(" ".join(words[:at]), " ".join(words[at:]), None)


def choose_edits(
    edits: Iterable[JudgedEdit],
    count: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    encoder_tokens: int,
    decoder_tokens: int,
    max_tokens: int,
) -> dict[str, np.ndarray] | None:
    """Return the first `count` edits that fit the towers' tokens; None if no two do.

    Args:
        max_tokens: of the decoder; a prompt and an ending of any two edits have to fit.
    Returns:
        prompt_tokens and text_tokens int32 [R, S] with their masks, for the encoder; own and swapped
        int32 [R, T] with own_ending and swapped_ending bool [R, T], for the decoder. Row r of `swapped`
        is prompt r with its other ending.
    """

    def fits(edit: JudgedEdit) -> bool:
        text, endings = f"{edit.prompt} {edit.ending}", filter(None, edit[1:])
        sizes = [1 + len(decoder.ids(edit.prompt)), *(len(decoder.following(e)) for e in endings)]
        return encoder.encode([text]).mask.sum() <= encoder_tokens and max(sizes) <= max_tokens // 2

    cuts = list(itertools.islice(filter(fits, edits), count))
    if len(cuts) < 2:
        return None
    sides = {"prompt": [e.prompt for e in cuts], "text": [f"{e.prompt} {e.ending}" for e in cuts]}
    arrays = {}
    for name, side in sides.items():
        encoded = encoder.encode(side, encoder_tokens)
        arrays[f"{name}_tokens"] = _padded(encoded.ids, encoder_tokens, np.int32(0))
        arrays[f"{name}_mask"] = _padded(encoded.mask, encoder_tokens, np.False_)
    starts = [[decoder.bos, *decoder.ids(edit.prompt)] for edit in cuts]
    others = [after.ending for after in (*cuts[1:], cuts[0])]
    others = [edit.other or after for edit, after in zip(cuts, others, strict=True)]
    pairs = {"own": [edit.ending for edit in cuts], "swapped": others}
    pairs = {name: [decoder.following(ending) for ending in side] for name, side in pairs.items()}
    texts = {n: [[*a, *b] for a, b in zip(starts, side, strict=True)] for n, side in pairs.items()}
    # Two halves of two texts may be longer together than either text; and a sample has to fit.
    length = max(len(text) for side in texts.values() for text in side)
    length = max(length, *(len(start) + _SAMPLE for start in starts))
    length = min(-(-length // decoder_tokens) * decoder_tokens, max_tokens)
    for name, side in texts.items():
        is_ending = [np.arange(len(b)) >= len(a) for a, b in zip(starts, side, strict=True)]
        arrays[name] = _padded(side, length, np.int32(decoder.pad))
        arrays[f"{name}_ending"] = _padded(is_ending, length, np.False_)
    return arrays


def _padded(rows: Sequence[Any] | np.ndarray, length: int, fill: np.generic) -> np.ndarray:
    """Return rows of several lengths as [rows, length] of the dtype of `fill`, which fills the rest."""
    result = np.full((len(rows), length), fill)
    for padded, row in zip(result, rows, strict=True):
        padded[: len(row)] = row
    return result


def condition_of(model: Larimar, edits: Mapping[str, Array], editing: EditingConfig) -> Condition:
    """Write each text into a memory of its own (§4: key e(prompt), value e(text)), and read it at its
    prompt."""
    memory = Streaming(
        *model.memory.prior_memory[...].shape, ridge=editing.ridge, query_noise=editing.query_noise
    )
    prepared = memory.prepare(model.memory.params())
    keys = model.encode(edits["prompt_tokens"], edits["prompt_mask"])
    values = model.encode(edits["text_tokens"], edits["text_mask"])

    def write_and_read(key, value):
        state = memory.write(prepared, memory.empty(prepared), key[None], value[None])
        return memory.read(prepared, state, key[None]).latent[0]

    return model.condition(jax.vmap(write_and_read)(keys, values))


def continuations(
    model: Larimar, edits: Mapping[str, Array], condition: Condition | None
) -> Int[Array, "R N"]:
    """Return the likeliest tokens after each prompt, each after those before it, without a cache."""
    start, rows = jnp.argmax(edits["own_ending"], axis=1), jnp.arange(len(edits["own"]))

    def extend(tokens, i):
        hidden, _ = model.hidden(tokens, condition)
        token = model.decoder.logits(hidden[rows, start + i - 1]).argmax(axis=-1)
        return tokens.at[rows, start + i].set(token.astype(tokens.dtype), mode="drop"), token

    return jax.lax.scan(extend, edits["own"], jnp.arange(_SAMPLE))[1].T


def edit_scores(
    model: Larimar, edits: Mapping[str, Array], editing: EditingConfig
) -> dict[str, Float[Array, ""]]:
    """Compare how likely the endings are after `condition_of` and to the untouched base LM.

    Returns:
        edit_gain: nats per token by which the endings are likelier than to the untouched base LM.
        edit_success: the share of texts whose ending is likelier, per token, than the other after
        the same prompt; edit_success_base: that of the base LM.
    """
    condition = condition_of(model, edits, editing)

    def likelihoods(condition) -> list[Float[Array, " R"]]:
        return [
            -objective.token_losses(model, edits[side], edits[f"{side}_ending"], condition).sum(
                axis=1
            )
            / edits[f"{side}_ending"].sum(axis=1).astype(jnp.float32)
            for side in ("own", "swapped")
        ]

    edited, base = likelihoods(condition), likelihoods(None)
    return {
        "edit_gain": (edited[0] - base[0]).mean(),
        "edit_success": (edited[0] > edited[1]).astype(jnp.float32).mean(),
        "edit_success_base": (base[0] > base[1]).astype(jnp.float32).mean(),
    }
