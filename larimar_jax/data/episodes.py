"""Pieces → tokens, once → a Grain stream of episodes."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.progress import track

# Tokenised at once: enough for the tokenizer's threads, small enough for a moving progress bar.
_BLOCK = 2048


class TooFewPieces(ValueError):
    """The corpus does not fill one batch of episodes."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """N tokenised pieces, in memory.

    encoder_tokens as the encoder's tokenizer makes them (special tokens included), decoder_tokens
    `<BOS> text <EOS>`; both padded on the right, where their masks are False.
    """

    encoder_tokens: Int[np.ndarray, "N S"]
    encoder_mask: Bool[np.ndarray, "N S"]
    decoder_tokens: Int[np.ndarray, "N T"]
    decoder_mask: Bool[np.ndarray, "N T"]

    def __len__(self) -> int:
        return len(self.encoder_tokens)

    def gather(self, rows: Int[np.ndarray, "B E"]) -> dict[str, np.ndarray]:
        """The batch of these rows: every field, [B, E, S] or [B, E, T]."""
        return {field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)}


def tokenise(
    texts: Sequence[str],
    encoder_tokenizer: Any,
    decoder_tokenizer: Any,
    encoder_length: int,
    decoder_length: int,
    *,
    progress: bool = False,
) -> tuple[Pieces, int]:
    """Tokenises texts for both towers and drops those that do not fit.

    A cut text would ask the decoder for words that the encoder never saw, or the reverse, so that
    too long ones are dropped rather than truncated.

    Args:
        texts: N pieces.
        encoder_tokenizer, decoder_tokenizer: `weights.tokenizers.Tokenizer`s.
        encoder_length: S, special tokens included.
        decoder_length: T, `<BOS>` and `<EOS>` included.
        progress: show a bar on stderr.
    Returns:
        (pieces, number dropped)
    Raises:
        TooFewPieces: there is no text at all.
    """
    if not texts:
        raise TooFewPieces("the corpus holds no text; look at data.corpus and data.unit")
    names = [field.name for field in dataclasses.fields(Pieces)]
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in track(
        range(0, len(texts), _BLOCK),
        f"tokenise {len(texts):,} pieces",
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    ):
        block = list(texts[start : start + _BLOCK])
        encoder = encoder_tokenizer.encode(block, None)
        decoder = decoder_tokenizer.encode(block, None)
        inner = np.asarray(decoder.mask).sum(axis=1)
        fits = (np.asarray(encoder.mask).sum(axis=1) <= encoder_length) & (inner > 0)
        fits &= inner + 2 <= decoder_length
        made = (
            _resize(encoder.ids, encoder_length, fits),
            _resize(encoder.mask, encoder_length, fits),
            *_framed(decoder.ids, inner, decoder_length, fits, decoder_tokenizer),
        )
        for name, array in zip(names, made, strict=True):
            kept[name].append(array)
    pieces = Pieces(**{name: np.concatenate(parts) for name, parts in kept.items()})
    return pieces, len(texts) - len(pieces)


def _resize(array: np.ndarray, length: int, rows: np.ndarray) -> np.ndarray:
    """The chosen rows, cut or zero-padded to `length` (what is cut is padding)."""
    array = np.asarray(array)[rows][:, :length]
    return np.pad(array, ((0, 0), (0, length - array.shape[1])))


def _framed(ids, inner, length, rows, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """`<BOS> text <EOS>` and its mask, for the chosen rows."""
    text = _resize(ids, length - 2, rows)
    inner = inner[rows, None]
    place = np.arange(length)[None, :]
    shifted = np.pad(text, ((0, 0), (1, 1)))
    tokens = np.where(place <= inner, shifted, tokenizer.pad)
    tokens = np.where(place == 0, tokenizer.bos, tokens)
    tokens = np.where(place == inner + 1, tokenizer.eos, tokens)
    return tokens.astype(np.int32), place <= inner + 1


def episodes(
    pieces: Pieces,
    episode: int,
    batch: int,
    seed: int,
    *,
    epochs: int | None = None,
    process: tuple[int, int] | None = None,
) -> grain.IterDataset:
    """The stream of batches: B episodes of E different pieces drawn at random (exchangeable, §1).

    The order is new in every epoch, a function of `seed` alone, and the same for any number of
    processes: each takes its share of every batch. An iterator's state goes into a checkpoint
    through Grain's own handler.

    Args:
        pieces: N tokenised pieces; N mod E of them sit out each epoch.
        episode: E. batch: B, of all processes together.
        epochs: how often the corpus is passed; None for ever. The last, partial batch is dropped.
        process: (index, count) of this process; default JAX's own.
    Returns:
        Batches {encoder_tokens int32 [B/processes, E, S], encoder_mask bool, decoder_tokens int32
        [B/processes, E, T], decoder_mask bool} as numpy arrays.
    Raises:
        TooFewPieces: the pieces do not fill one batch.
        ValueError: the processes do not divide the batch.
    """
    index, count = (jax.process_index(), jax.process_count()) if process is None else process
    if batch % count:
        raise ValueError(f"data.batch is {batch}, which {count} processes do not divide")
    if len(pieces) < episode * batch:
        raise TooFewPieces(
            f"{len(pieces)} pieces do not fill one batch of {batch} episodes of {episode}. Use a "
            "larger corpus, a smaller batch, or longer token lengths (pieces that are too long are "
            "dropped)."
        )
    rows = grain.MapDataset.range(len(pieces)).seed(seed).shuffle()
    rows = rows.batch(episode, drop_remainder=True).repeat(epochs)
    rows = rows.slice(slice(index, sys.maxsize if epochs is None else len(rows), count))
    return (
        rows.batch(batch // count, drop_remainder=True)
        .map(pieces.gather)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    )
