"""Tokenised pieces of a corpus: made once by `datasets`, memory-mapped, read at random.

`datasets` keeps them under the fingerprint of everything that decides them. It locks the folder while
one process writes, and renames it when it is whole: a run that is cut off leaves nothing that is read,
and two runs of the same corpus on one file system share one folder.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
from jaxtyping import Int

from larimar_jax.config import DataConfig, cache_folder
from larimar_jax.data.corpus import Corpus
from larimar_jax.data.segments import distinct_pieces

# Raised whenever the same corpus and settings would give other pieces than before.
FORMAT = "larimar-pieces/3"
# Texts of one call to the tokenizers: enough for their threads.
BLOCK = 2048


class PiecesError(RuntimeError):
    """Tokenised pieces that cannot be written or read."""


@dataclasses.dataclass(frozen=True)
class TokenizedPieces:
    """N pieces, tokenised for both towers; `gather` makes batches of them.

    dataset: rows of `encoder` and `decoder` ids and their `text`. lengths: S and T. special_tokens: the
    decoder's BOS, EOS and PAD. dropped: how many pieces were too long for S or T.
    """

    dataset: Any
    lengths: tuple[int, int]
    special_tokens: tuple[int, int, int]
    dropped: int

    def __len__(self) -> int:
        return len(self.dataset)

    def texts(self, rows: Iterable[SupportsInt]) -> list[str]:
        """Return the pieces of these rows as text."""
        return self.dataset[[int(row) for row in rows]]["text"]

    def counts(self) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Return the tokens of each piece in either tower, with those that frame it."""
        columns = (self.dataset.data.column(name).chunks for name in ("encoder", "decoder"))
        encoder, decoder = (
            np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
            for chunks in columns
        )
        return encoder, decoder + 2

    def gather(
        self, rows: Int[np.ndarray, "*B E"], lengths: tuple[int, int] | None = None
    ) -> dict[str, np.ndarray]:
        """Return the batch of these rows, padded on the right: encoder_tokens int32 [*B, E, S],
        encoder_mask bool, decoder_tokens int32 [*B, E, T] (`<BOS> text <EOS>`), decoder_mask bool.

        Args:
            lengths: S and T, where all these rows fit into less than the pieces' own.
        """
        table = self.dataset.with_format("arrow")[rows.reshape(-1).tolist()]
        bos, eos, pad = self.special_tokens
        lengths = lengths or self.lengths
        place, length, ids = _ragged(table["encoder"], lengths[0])
        encoder_mask = place < length
        encoder = np.zeros(encoder_mask.shape, np.int32)
        encoder[encoder_mask] = ids
        place, length, ids = _ragged(table["decoder"], lengths[1])
        decoder = np.full((len(length), lengths[1]), pad, np.int32)
        decoder[:, 0] = bos
        decoder[(place >= 1) & (place <= length)] = ids
        decoder[place == length + 1] = eos
        batch = {
            "encoder_tokens": encoder,
            "encoder_mask": encoder_mask,
            "decoder_tokens": decoder,
            "decoder_mask": place < length + 2,
        }
        return {name: array.reshape(*rows.shape, -1) for name, array in batch.items()}


def tokenize(
    source: Corpus,
    held_out: bool,
    config: DataConfig,
    encoder: Any,
    decoder: Any,
    *,
    folder: Path | None = None,
    progress: bool = False,
) -> TokenizedPieces:
    """Return the distinct pieces of one side of a corpus, tokenised now or by an earlier run.

    A piece that is too long for either tower is dropped: cut, it would ask the decoder for words that
    the encoder never saw, or the reverse.

    Args:
        held_out: the documents that are held out of training, or the others.
        encoder, decoder: tokenizers of the towers.
        folder: where all pieces are; default `config.cache_folder()`.
        progress: show a count on stderr.
    Raises:
        PiecesError: the disk is full, or what is on it is damaged.
    """
    import datasets  # Takes a second, and only training reads a corpus.

    lengths = (config.encoder_tokens, config.decoder_tokens)
    decisive = [
        FORMAT,
        source.identity,
        held_out,
        config.unit,
        encoder.hash,
        decoder.hash,
        *lengths,
    ]
    fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]
    place = (folder or cache_folder()) / f"{'held-out' if held_out else 'training'}-{fingerprint}"

    def rows() -> Iterator[dict[str, Any]]:
        # A chunk has to leave room for the two tokens that frame it, in either tower.
        pieces = distinct_pieces(
            source.side(held_out),
            config.unit,
            min(lengths) - 2,
            lambda text: max(len(encoder.ids(text)), len(decoder.ids(text))),
        )
        dropped = 0
        while block := list(itertools.islice(pieces, BLOCK)):
            sides = {"encoder": encoder.encode(block), "decoder": decoder.encode(block)}
            for row, text in enumerate(block):
                ids = {name: side.ids[row][side.mask[row]] for name, side in sides.items()}
                if len(ids["encoder"]) <= lengths[0] and 0 < len(ids["decoder"]) <= lengths[1] - 2:
                    yield ids | {"text": text}
                else:
                    dropped += 1
        # Within the same lock as the rows, and before they are renamed to their place.
        (place / "dropped.json").write_text(json.dumps(dropped), encoding="utf-8")

    ids = datasets.List(datasets.Value("int32"))
    features = datasets.Features(encoder=ids, decoder=ids, text=datasets.Value("string"))
    place.mkdir(parents=True, exist_ok=True)
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    try:
        dataset = datasets.Dataset.from_generator(
            rows, features=features, cache_dir=str(place), fingerprint=fingerprint
        )
        dropped = json.loads((place / "dropped.json").read_text(encoding="utf-8"))
    except datasets.exceptions.DatasetGenerationError as error:
        raise _explained(error.__cause__ or error, place) from error
    except (OSError, ValueError) as error:
        raise _explained(error, place) from error
    return TokenizedPieces(dataset, lengths, (decoder.bos, decoder.eos, decoder.pad), dropped)


def _ragged(
    column: Any, tokens: int
) -> tuple[Int[np.ndarray, "1 T"], Int[np.ndarray, "N 1"], Int[np.ndarray, " n"]]:
    """Return the places 0 … T − 1, the length of each of N lists, and all their ids in a row."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    return np.arange(tokens)[None], lengths[:, None], lists.flatten().to_numpy()


def _explained(error: BaseException, place: Path) -> BaseException:
    """Return what a failure of `datasets` means: a full disk, damage, or an error of the corpus."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PiecesError(
            f"tokenised pieces could not be written to {place} ({error}). Set LARIMAR_CACHE to a "
            "folder with more room."
        )
    damaged = type(error).__module__.startswith(("pyarrow", "json"))
    if damaged or isinstance(error, FileNotFoundError):
        return PiecesError(
            f"the tokenised pieces in {place} are damaged ({error}). Delete the folder: the next run "
            "makes it again."
        )
    return error
