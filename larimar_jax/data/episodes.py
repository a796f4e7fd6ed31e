"""Tokenised pieces → a Grain stream of episodes."""

import dataclasses
import functools
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Int

from larimar_jax.data.pieces import TokenizedPieces


class TooFewPieces(ValueError):
    """The corpus does not fill one batch of episodes."""


class Bucket(NamedTuple):
    """Pieces of like lengths, so that a batch of them pads little.

    lengths: S and T of its batches. pieces: the numbers of those that fit, int [N].
    """

    lengths: tuple[int, int]
    pieces: Sequence[int]


def episodes(
    pieces: TokenizedPieces,
    sizes: Sequence[int],
    batch: int,
    seed: int,
    *,
    epochs: int | None = None,
    process: tuple[int, int] | None = None,
    workers: int = 0,
    seeds: int | None = None,
    buckets: int = 1,
) -> grain.IterDataset:
    """Return the stream of batches: B episodes of E different pieces drawn at random (exchangeable, §1).

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
        seeds: so many streams side by side, the i-th in the order of seed + i; their batches have a
            leading axis.
        buckets: pairs of lengths that pieces are sorted into. All pieces of a batch are of one, which
            is its S and T; each bucket has the share of batches that it has of pieces.
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
    if not sizes or min(sizes) < 1:
        raise ValueError(f"data.episode is {tuple(sizes)}; give at least one size, each above 0")
    sorted_pieces = [Bucket(pieces.lengths, range(len(pieces)))]
    if buckets > 1 and len(pieces):
        sorted_pieces = sort_pieces(*pieces.counts(), pieces.lengths, buckets, sum(sizes) * batch)
    rows = tuple(
        tuple(
            grain.MapDataset.range(len(bucket.pieces)).seed(seed + i).shuffle()
            for bucket in sorted_pieces
        )
        for i in range(seeds or 1)
    )
    share = range(index * batch // count, (index + 1) * batch // count)
    take = _Take(
        rows, pieces, tuple(sorted_pieces), tuple(sizes), batch, share, seed, seeds is None
    )
    if not take.cycles:
        raise TooFewPieces(
            f"{len(pieces)} pieces do not fill one batch of {batch} episodes of each size "
            f"({', '.join(map(str, sizes))}). Use a larger corpus, a smaller batch, or longer token "
            "lengths (pieces that are too long are dropped)."
        )
    total = sys.maxsize if epochs is None else epochs * take.cycles * len(sizes)
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    stream = grain.MapDataset.range(total).map(take).to_iter_dataset(ahead)
    if workers:
        # Grain's workers look at their flags, which nobody parses in a program without absl.app.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers)
        stream = stream.mp_prefetch(options, _begin_worker)
    return stream


def shape(batch: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return E, S and T of a batch: what a program is compiled for."""
    return (*batch["encoder_tokens"].shape[-2:], batch["decoder_tokens"].shape[-1])


def _begin_worker(index: int, count: int) -> None:
    # A scheduler signals all processes of a job; a run that saves then still wants its batches.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclasses.dataclass(frozen=True)
class _Take:
    """A batch by its number; a class, so that it can be sent to a worker.

    A cycle has one batch of each size, in an order of its own, and all of one bucket: so an epoch is all
    its pieces, and where a batch begins is known without counting those before it.

    rows: of each stream and bucket, a permutation of its pieces for each epoch, one after the other.
    share: the episodes of a batch that this process takes. single: whether there is one stream, without
    an axis.
    """

    rows: tuple[tuple[grain.MapDataset, ...], ...]
    pieces: TokenizedPieces
    buckets: tuple[Bucket, ...]
    sizes: tuple[int, ...]
    batch: int
    share: range
    seed: int
    single: bool

    @property
    def bounds(self) -> Int[np.ndarray, " n"]:
        """The numbers of cycles in an epoch, summed up to each bucket."""
        pieces = sum(self.sizes) * self.batch
        return np.cumsum([len(bucket.pieces) // pieces for bucket in self.buckets])

    @property
    def cycles(self) -> int:
        """The number of cycles in an epoch."""
        return int(self.bounds[-1])

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        which, place = divmod(number, len(self.sizes))
        order = np.random.default_rng((self.seed, which)).permutation(len(self.sizes))
        begin, size = sum(self.sizes[k] for k in order[:place]), self.sizes[order[place]]
        bounds = self.bounds
        epoch, cycle = divmod(which, int(bounds[-1]))
        if len(bounds) > 1:
            cycle = int(_order(self.seed, epoch, int(bounds[-1]))[cycle])
        at = int(np.searchsorted(bounds, cycle, side="right"))
        bucket, cycle = self.buckets[at], cycle - int(bounds[at - 1] if at else 0)
        first = epoch * len(bucket.pieces) + (cycle * sum(self.sizes) + begin) * self.batch
        # Only the share's: looking a row up takes microseconds, and a cycle may have thousands.
        facts = range(first, first + size * self.batch, self.batch)
        chosen = [
            [[bucket.pieces[rows[at][fact + episode]] for fact in facts] for episode in self.share]
            for rows in self.rows
        ]
        return self.pieces.gather(np.array(chosen[0] if self.single else chosen), bucket.lengths)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, cycles: int) -> Int[np.ndarray, " cycles"]:
    """Return the order of an epoch's cycles, so that batches of all buckets are mixed."""
    return np.random.default_rng((seed, epoch, cycles)).permutation(cycles)


def sort_pieces(
    encoder: Int[np.ndarray, " N"],
    decoder: Int[np.ndarray, " N"],
    limits: tuple[int, int],
    count: int,
    least: int,
) -> list[Bucket]:
    """Return at most `count` buckets, chosen one after the other by how many positions each saves.

    A piece is in the bucket with the fewest positions, S + T, of those that it fits in; the first one
    chosen is that of the limits, for what fits in no other.

    Args:
        encoder, decoder: tokens of each piece, with those that frame it.
        limits: the largest S and T.
        least: pieces of a bucket; with fewer it would make no batch.
    """
    number = np.zeros((limits[0] + 1, limits[1] + 1), np.int64)
    np.add.at(number, (encoder, decoder), 1)
    positions, owner = np.full(number.shape, sum(limits)), np.zeros(number.shape, np.int64)
    lengths = [limits]
    while len(lengths) < count:
        saved = {
            (s, t): (inside * np.maximum(positions[: s + 1, : t + 1] - s - t, 0)).sum()
            for s in range(1, limits[0] + 1)
            for t in range(1, limits[1] + 1)
            if (inside := number[: s + 1, : t + 1]).sum() >= least
        }
        for s, t in sorted(saved, key=lambda pair: -saved[pair]):
            changed = owner.copy()
            block = (slice(s + 1), slice(t + 1))
            changed[block][positions[block] > s + t] = len(lengths)
            sizes = np.bincount(changed.ravel(), number.ravel(), len(lengths) + 1)
            if saved[s, t] > 0 and sizes[sizes > 0].min() >= least:
                break
        else:  # None saves anything, or makes a batch.
            break
        lengths.append((s, t))
        owner, positions[block] = changed, np.minimum(positions[block], s + t)
    owners = owner[encoder, decoder]
    buckets = [Bucket(pair, np.flatnonzero(owners == i)) for i, pair in enumerate(lengths)]
    return [bucket for bucket in buckets if len(bucket.pieces)]
