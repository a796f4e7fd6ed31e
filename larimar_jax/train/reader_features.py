"""What frozen towers make of phrases in context, computed once and kept on disk, to fit a reader on.

A row is a place where a token is to be said: what the encoder makes of the answer's tokens, the
language model's last hidden state h_t, the newest token x_t, the tokens j of the answer before it, and
the target, which after the last token of an answer is LEAVE: the language model goes on as it would
without memory. An answer is encoded after one prompt, and for every second phrase said after another: a
question is seldom asked as it was written.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from larimar_jax import latent_layout, packing
from larimar_jax.data.phrases import Block, Phrases
from larimar_jax.generate import prompt_ids
from larimar_jax.model import Larimar
from larimar_jax.packing import ConditionRows, Text, Trie
from larimar_jax.weights.model_file import replaced
from larimar_jax.weights.tokenizer import Tokenizer, bucket

LEAVE = -1
# Blocks of a file, phrases of a block; of so many phrases one has a row after its last token.
BLOCKS, PHRASES, LEAVES = 256, 16, 4
# Texts of a call to the encoder, rows of one to the decoder.
_TEXTS, _ROWS = 64, 32


class Features(NamedTuple):
    """n phrases with their places; b = n + 1.

    pieces: the encoder's last hidden states of the phrases' own tokens, one phrase after the other;
    begin: the first of each, and the end of all. hidden: the m different h_t. Of each of r rows: phrase,
    state: its phrase and h_t; token: x_t; depth: j; target: the token to be said, or LEAVE.
    """

    pieces: Float[np.ndarray, "t H"]
    begin: Int[np.ndarray, " b"]
    hidden: Float[np.ndarray, "m D"]
    phrase: Int[np.ndarray, " r"]
    state: Int[np.ndarray, " r"]
    token: Int[np.ndarray, " r"]
    depth: Int[np.ndarray, " r"]
    target: Int[np.ndarray, " r"]


class FeatureMaker:
    """Frozen towers with their tokenizers, (encoder's, decoder's).

    Args:
        positions: places of an answer that a reader can change.
        products: what the towers' products are rounded to.
    """

    def __init__(
        self,
        model: Larimar,
        tokenizers: tuple[Tokenizer, Tokenizer],
        positions: int,
        products: DTypeLike | None,
    ):
        self._model, self._tokenizers = model, tokenizers
        self._positions, self._products = positions, products
        self._graph, self._state = nnx.split(model)

    def __call__(self, blocks: Sequence[Block]) -> Features:
        """Return the features of blocks, in float16."""
        placed = [
            (block, phrase, number % 2 == 0)
            for block in blocks
            for number, phrase in enumerate(block.phrases)
        ]
        contexts = [block.prompt if same else block.other for block, _, same in placed]
        pieces, begin = self._encode(contexts, [phrase for _, phrase, _ in placed])
        decoder, trie, texts, rows = self._tokenizers[1], Trie(), [], []
        count = itertools.count()
        for block in blocks:
            prompt = prompt_ids(decoder, block.prompt)
            stem, nodes = trie.path(prompt, 0), set()
            for phrase in block.phrases:
                number, ids = next(count), decoder.following(phrase)
                path = [stem[-1], *trie.path(ids, 0, stem[-1])]
                places = zip(path, [prompt[-1], *ids], [*ids, LEAVE], strict=True)
                leaves = number % LEAVES == 0
                chosen = list(itertools.islice(places, min(len(ids) + leaves, self._positions)))
                rows += [(number, node, x, j, y) for j, (node, x, y) in enumerate(chosen)]
                nodes.update(node for node, _, _ in chosen)
            texts.append(Text(frozenset({*stem, *nodes})))
        hidden = self._hidden(trie, texts)
        phrase, node, token, depth, target = np.asarray(rows, np.int32).T
        used, state = np.unique(node, return_inverse=True)
        stacked = np.stack([hidden[each] for each in used])
        return Features(pieces, begin, stacked, phrase, np.int32(state), token, depth, target)

    def _encode(
        self, prompts: Sequence[str], phrases: Sequence[str]
    ) -> tuple[Float[np.ndarray, "t H"], Int[np.ndarray, " b"]]:
        """Return the hidden states of n phrases' own tokens after prompts, and the n + 1 = b bounds."""
        tokenizer = self._tokenizers[0]
        texts = [f"{prompt} {phrase}" for prompt, phrase in zip(prompts, phrases, strict=True)]
        batch = tokenizer.encode(texts)
        span = latent_layout.answer_tokens(tokenizer, texts, phrases, batch.mask)
        lengths = batch.mask.sum(axis=1)
        begin = np.concatenate([np.zeros(1, np.int32), np.cumsum(span.sum(axis=1), dtype=np.int32)])
        pieces = np.zeros((begin[-1], self._model.encoder.config.width), np.float16)
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(texts), _TEXTS):
            rows = order[first : first + _TEXTS]
            padded = np.resize(rows, _TEXTS)
            width = bucket(int(lengths[rows].max()))
            arrays = (a[padded, :width] for a in (batch.ids, batch.mask))
            hidden = np.asarray(_encode(self._graph, self._state, *arrays, self._products))
            for row, states in zip(rows, hidden, strict=False):
                pieces[begin[row] : begin[row + 1]] = states[span[row, :width]]
        return pieces, begin

    def _hidden(self, trie: Trie, texts: Sequence[Text]) -> dict[int, np.ndarray]:
        conditions, result = ConditionRows(None, 1), {}
        decoder, how = self._model.decoder, dict(product_dtype=self._products)
        for packed, states, _ in packing.read(decoder, trie, texts, conditions, _ROWS, **how):
            for row, where in zip(np.asarray(states, np.float16), packed.where, strict=True):
                result |= {node: row[at] for node, at in where.items()}
        return result


def load(
    make: FeatureMaker,
    phrases: Phrases,
    seed: int,
    count: int,
    folder: Path,
    done: Callable[[int], Any] = lambda number: None,
) -> Features:
    """Return the features of count · BLOCKS blocks, from files in `folder`, where those that are missing
    are made.

    Args:
        done: called with the number of files that are there, after each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks, parts = phrases.blocks(PHRASES, seed), []
    for number in range(count):
        path, chosen = folder / f"{number:05}.npz", list(itertools.islice(blocks, BLOCKS))
        if not path.exists():
            with replaced(path) as file:
                np.savez(file, **make(chosen)._asdict())
        with np.load(path) as arrays:
            parts.append(Features(**arrays))
        done(number + 1)
    return join(parts)


def join(parts: Sequence[Features]) -> Features:
    """Return the features of several calls as those of one."""
    pieces, hidden, phrases = (
        np.cumsum([0, *counts], dtype=np.int32)
        for counts in zip(
            *((len(p.pieces), len(p.hidden), len(p.begin) - 1) for p in parts), strict=True
        )
    )
    moved = [
        part._replace(
            begin=part.begin[:-1] + pieces[n],
            state=part.state + hidden[n],
            phrase=part.phrase + phrases[n],
        )
        for n, part in enumerate(parts)
    ]
    whole = Features(*map(np.concatenate, zip(*moved, strict=True)))
    return whole._replace(begin=np.append(whole.begin, pieces[-1]))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _encode(graph, state, tokens, mask, products):
    return nnx.merge(graph, state).encoder.hidden(tokens, mask, products)
