"""Tokenised pieces → a Grain stream of episodes."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int


class TooFewPieces(ValueError):
    """The corpus does not fill one batch of episodes."""


@runtime_checkable
class Pieces(Protocol):
    """N tokenised pieces, such as a `store.Store`."""

    def __len__(self) -> int:
        """N."""

    def gather(self, rows: Int[np.ndarray, "B E"]) -> dict[str, np.ndarray]:
        """The batch of these rows."""


def episodes(
    pieces: Pieces,
    sizes: Sequence[int],
    batch: int,
    seed: int,
    *,
    epochs: int | None = None,
    process: tuple[int, int] | None = None,
    workers: int = 0,
) -> grain.IterDataset:
    """The stream of batches: B episodes of E different pieces drawn at random (exchangeable, §1).

    The order is new in every epoch, a function of `seed` alone, and the same for any number of
    processes: each takes its share of every batch. An iterator's state goes into a checkpoint
    through Grain's own handler.

    Args:
        pieces: N tokenised pieces; those that fill no whole batch sit out each epoch.
        sizes: E of the episodes. Each batch has one of them, all equally often, so that each is
            compiled once.
        batch: B, of all processes together.
        epochs: how often the corpus is passed; None for ever. The last, partial batch is dropped.
        process: (index, count) of this process; default JAX's own.
        workers: processes that read and batch; 0 does it in a thread.
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
    cycle = sum(sizes)
    if len(pieces) < cycle * batch:
        raise TooFewPieces(
            f"{len(pieces)} pieces do not fill one batch of {batch} episodes of each size "
            f"({', '.join(map(str, sizes))}). Use a larger corpus, a smaller batch, or longer token "
            "lengths (pieces that are too long are dropped)."
        )
    rows = grain.MapDataset.range(len(pieces)).seed(seed).shuffle()
    # A cycle has one batch of each size, in an order of its own: so an epoch is all its pieces, and
    # where a batch begins is known without counting those before it.
    cycles = rows.batch(batch, drop_remainder=True)
    cycles = cycles.batch(cycle, drop_remainder=True).repeat(epochs)
    share = slice(index * batch // count, (index + 1) * batch // count)

    batches = grain.MapDataset.range(min(len(cycles), sys.maxsize // len(sizes)) * len(sizes))
    take = _Take(cycles, pieces, tuple(sizes), share, seed)
    made = batches.map(take).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    )
    if workers:
        # Grain's workers look at their flags, which nobody parses in a program without absl.app.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        made = made.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return made


@dataclasses.dataclass(frozen=True)
class _Take:
    """A batch by its number; a class, so that it can be sent to a worker."""

    cycles: grain.MapDataset
    pieces: Pieces
    sizes: tuple[int, ...]
    share: slice
    seed: int

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        which, place = divmod(number, len(self.sizes))
        order = np.random.default_rng((self.seed, which)).permutation(len(self.sizes))
        begin = sum(self.sizes[k] for k in order[:place])
        block = np.asarray(self.cycles[which])[begin : begin + self.sizes[order[place]]]
        return self.pieces.gather(block.T[self.share])
