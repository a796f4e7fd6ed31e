"""Held-out terms and edits of a model in training: the same texts at every evaluation."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from larimar_jax import linalg, objective
from larimar_jax.config import EditingConfig
from larimar_jax.data.episodes import TooFewPieces
from larimar_jax.data.pieces import TokenizedPieces
from larimar_jax.memory.streaming import Streaming
from larimar_jax.model import Larimar
from larimar_jax.train import sharding
from larimar_jax.train.step import TrainState, TrainStep
from larimar_jax.weights.tokenizer import Tokenizer

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
            # Several are too short to be cut in two.
            texts = pieces.texts(order[: 4 * edits].tolist())
            lengths = (data.encoder_tokens, data.decoder_tokens, max_tokens)
            chosen = choose_edits(texts, edits, *tokenizers, *lengths)
            if chosen is None:
                raise TooFewPieces(
                    "train.edits needs held-out texts of five words or more, whose halves fit the "
                    f"decoder's {max_tokens} tokens in any pair, and there are not two; use a larger "
                    "corpus, or train.edits=0"
                )
            self._edits = jax.device_put(chosen, whole)
        self._terms = jax.jit(
            self._batch_terms,
            in_shardings=(None, frozen, train_step.batch_shardings),
            out_shardings=whole,
        )
        self._edit = jax.jit(
            self._edit_scores, in_shardings=(None, frozen, whole), out_shardings=whole
        )

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


def choose_edits(
    texts: Sequence[str],
    count: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    encoder_tokens: int,
    decoder_tokens: int,
    max_tokens: int,
) -> dict[str, np.ndarray] | None:
    """Return the first `count` texts that can be cut in two, as R edits; None if no two texts fit.

    Args:
        max_tokens: of the decoder; two halves of any two texts have to fit.
    Returns:
        prompt_tokens and text_tokens int32 [R, S] with their masks, for the encoder; own and swapped
        int32 [R, T] with own_ending and swapped_ending bool [R, T], for the decoder. Row r of `swapped`
        is prompt r with the ending of text r + 1.
    """
    cuts: list[tuple[str, str]] = []
    for text in texts:
        words = text.split()
        at = round(_PROMPT * len(words))
        if len(words) < _LEAST_WORDS or encoder.encode([text]).mask.sum() > encoder_tokens:
            continue
        prompt, ending = " ".join(words[:at]), " ".join(words[at:])
        if max(1 + len(decoder.ids(prompt)), len(decoder.following(ending))) <= max_tokens // 2:
            cuts.append((prompt, ending))
    cuts = cuts[:count]
    if len(cuts) < 2:
        return None
    sides = {"prompt": [p for p, _ in cuts], "text": [f"{p} {ending}" for p, ending in cuts]}
    edits = {}
    for name, side in sides.items():
        encoded = encoder.encode(side, encoder_tokens)
        edits[f"{name}_tokens"] = _padded(encoded.ids, encoder_tokens, np.int32(0))
        edits[f"{name}_mask"] = _padded(encoded.mask, encoder_tokens, np.False_)
    starts = [[decoder.bos, *decoder.ids(prompt)] for prompt, _ in cuts]
    endings = [decoder.following(ending) for _, ending in cuts]
    pairs = {"own": endings, "swapped": endings[1:] + endings[:1]}
    texts = {n: [[*a, *b] for a, b in zip(starts, side, strict=True)] for n, side in pairs.items()}
    # Two halves of two texts may be longer together than either text.
    length = max(len(text) for side in texts.values() for text in side)
    length = min(-(-length // decoder_tokens) * decoder_tokens, max_tokens)
    for name, side in texts.items():
        is_ending = [np.arange(len(b)) >= len(a) for a, b in zip(starts, side, strict=True)]
        edits[name] = _padded(side, length, np.int32(decoder.pad))
        edits[f"{name}_ending"] = _padded(is_ending, length, np.False_)
    return edits


def _padded(rows: Sequence[Any] | np.ndarray, length: int, fill: np.generic) -> np.ndarray:
    """Return rows of several lengths as [rows, length] of the dtype of `fill`, which fills the rest."""
    result = np.full((len(rows), length), fill)
    for padded, row in zip(result, rows, strict=True):
        padded[: len(row)] = row
    return result


def edit_scores(
    model: Larimar, edits: Mapping[str, Array], editing: EditingConfig
) -> dict[str, Float[Array, ""]]:
    """Write each text into a memory of its own (§4: key e(prompt), value e(text)), and query it.

    Returns:
        edit_gain: nats per token by which the endings are likelier than to the untouched base LM.
        edit_success: the share of texts whose ending is likelier, per token, than another text's after
        the same prompt; edit_success_base: that of the base LM.
    """
    memory = Streaming(
        *model.memory.prior_memory[...].shape, ridge=editing.ridge, query_noise=editing.query_noise
    )
    prepared = memory.prepare(model.memory.params())
    keys = model.encode(edits["prompt_tokens"], edits["prompt_mask"])
    values = model.encode(edits["text_tokens"], edits["text_mask"])

    def write_and_read(key, value):
        state = memory.write(prepared, memory.empty(prepared), key[None], value[None])
        return memory.read(prepared, state, key[None]).latent[0]

    condition = model.condition(jax.vmap(write_and_read)(keys, values))

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
