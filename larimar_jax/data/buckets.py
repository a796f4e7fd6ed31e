"""Pieces sorted by their lengths, so that a batch of them pads little."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Bucket(NamedTuple):
    """lengths: S and T of its batches. pieces: the numbers of those that fit, int [N]."""

    lengths: tuple[int, int]
    pieces: Sequence[int]


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
