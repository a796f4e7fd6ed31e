"""What frozen towers make of phrases in context, computed once and kept on disk, to fit a reader on.

A row is a place where a token is to be said: what the encoder makes of the answer's tokens, the
language model's last hidden state h_t, the newest token x_t, the tokens j of the answer before it, and
the target, which after the last token of an answer is LEAVE: the language model goes on as it would
without memory. An answer is encoded after one prompt, and for every second phrase said after another: a
question is seldom asked as it was written.

The language model is most of the work, and what a reader lacks is phrases. So it reads one file in READ
alone; in the others h_t is zero, and the reader says the answer by itself.
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
# Of so many files the language model reads one.
READ = 5
# Texts of a call to the encoder, rows of one to the decoder.
_TEXTS, _ROWS = 64, 32


class Features(NamedTuple):
    """n phrases with their places; b = n + 1.

    pieces: the encoder's last hidden states of the phrases' own tokens, one phrase after the other.
    hidden: the m different h_t. Of each of r rows, one phrase after the other: state: its h_t; token:
    x_t; depth: j; target: the token to be said, or LEAVE. first_piece, first_row: of each phrase, and
    the end of all.
    """

    pieces: Float[np.ndarray, "t H"]
    first_piece: Int[np.ndarray, " b"]
    first_row: Int[np.ndarray, " b"]
    hidden: Float[np.ndarray, "m D"]
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

    def __call__(self, blocks: Sequence[Block], read: bool = True) -> Features:
        """Return the features of blocks, in float16; `read`: by the language model too."""
        placed = [
            (block, phrase, number % 2 == 0)
            for block in blocks
            for number, phrase in enumerate(block.phrases)
        ]
        contexts = [block.prompt if same else block.other for block, _, same in placed]
        pieces, first_piece = self._encode(contexts, [phrase for _, phrase, _ in placed])
        decoder, trie, texts, rows, counts = self._tokenizers[1], Trie(), [], [], []
        for block in blocks:
            prompt = prompt_ids(decoder, block.prompt)
            stem, nodes = trie.path(prompt, 0), set()
            for phrase in block.phrases:
                ids = decoder.following(phrase)
                path = [stem[-1], *trie.path(ids, 0, stem[-1])]
                places = zip(path, [prompt[-1], *ids], [*ids, LEAVE], strict=True)
                leaves = read and len(counts) % LEAVES == 0
                chosen = list(itertools.islice(places, min(len(ids) + leaves, self._positions)))
                rows += [(node, x, j, y) for j, (node, x, y) in enumerate(chosen)]
                counts.append(len(chosen))
                nodes.update(node for node, _, _ in chosen)
            texts.append(Text(frozenset({*stem, *nodes})))
        node, token, depth, target = np.asarray(rows, np.int32).T
        if read:
            hidden = self._hidden(trie, texts)
            used, state = np.unique(node, return_inverse=True)
            stacked = np.stack([hidden[each] for each in used])
        else:
            stacked = np.zeros((1, self._model.decoder.config.width), np.float16)
            state = np.zeros(len(node))
        bounds = first_piece, _bounds(counts)
        return Features(pieces, *bounds, stacked, np.int32(state), token, depth, target)

    def _encode(
        self, prompts: Sequence[str], phrases: Sequence[str]
    ) -> tuple[Float[np.ndarray, "t H"], Int[np.ndarray, " b"]]:
        """Return the hidden states of n phrases' own tokens after prompts, and the n + 1 = b bounds."""
        tokenizer = self._tokenizers[0]
        texts = [f"{prompt} {phrase}" for prompt, phrase in zip(prompts, phrases, strict=True)]
        batch = tokenizer.encode(texts)
        span = latent_layout.answer_tokens(tokenizer, texts, phrases, batch.mask)
        lengths = batch.mask.sum(axis=1)
        begin = _bounds(span.sum(axis=1))
        pieces = np.zeros((begin[-1], self._model.encoder.config.width), np.float16)
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(texts), _TEXTS):
            rows = order[first : first + _TEXTS]
            padded = np.resize(rows, _TEXTS)
            width = bucket(int(lengths[rows].max()), 4)
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
    parts = []
    for number in range(count):
        path = folder / f"{number:05}.npz"
        if not path.exists():
            blocks = itertools.islice(phrases.blocks(PHRASES, seed, number * BLOCKS), BLOCKS)
            with replaced(path) as file:
                np.savez(file, **make(list(blocks), number % READ == 0)._asdict())
        with np.load(path) as arrays:
            parts.append(Features(**arrays))
        done(number + 1)
    return join(parts)


def join(parts: Sequence[Features]) -> Features:
    """Return the features of several calls as those of one."""
    pieces, rows, states = (
        _bounds([len(getattr(part, name)) for part in parts])
        for name in ("pieces", "state", "hidden")
    )
    moved = [
        part._replace(
            first_piece=part.first_piece[:-1] + pieces[n],
            first_row=part.first_row[:-1] + rows[n],
            state=part.state + states[n],
        )
        for n, part in enumerate(parts)
    ]
    whole = Features(*map(np.concatenate, zip(*moved, strict=True)))
    return whole._replace(
        first_piece=np.append(whole.first_piece, pieces[-1]),
        first_row=np.append(whole.first_row, rows[-1]),
    )


def _bounds(counts: Sequence[int] | Int[np.ndarray, " n"]) -> Int[np.ndarray, " b"]:
    """Return where each of several runs of so many things begins, and where the last ends."""
    return np.cumsum([0, *counts], dtype=np.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _encode(graph, state, tokens, mask, products):
    return nnx.merge(graph, state).encoder.hidden(tokens, mask, products)
