"""The streaming memory row by row, for sessions: what float32 cannot carry out is `MemoryNotFinite`.

now = finite.load(memory, prepared, empty, keys, values)         # a memory of these facts alone
now, moved = finite.write(memory, prepared, now, keys, values)  # a few more, one by one
now = finite.forget(memory, prepared, now, keys, values)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from larimar_jax.memory import rls
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.pending import Pending
from larimar_jax.memory.streaming import Streaming

Rows = Float[np.ndarray, "n C"]
# Rows of a read.
_ROWS = 128


class MemoryNotFinite(FloatingPointError):
    """A write or forget that float32 could not carry out; the memory stays as it was."""


class NotKept(ValueError):
    """A row that the memory would not give back, or beside which it would lose another."""


def load(
    memory: Streaming, prepared: Prepared, empty: rls.RLSState, keys: Rows, values: Rows
) -> rls.RLSState:
    """Return an empty memory with n rows written, all at once."""
    number = len(keys)
    size = max(rls.MAX_PENDING, 1 << number.bit_length())
    keys, values = (np.pad(rows, ((0, size - number), (0, 0))) for rows in (keys, values))
    signs = (np.arange(size) < number).astype(np.int32)
    if number < memory.slots:
        now, is_due = rls.begin(memory, prepared, empty, keys, values, signs)
    else:
        state = memory.accumulate(prepared, empty.state, keys, values, signs)
        now, is_due = rls.init(memory, prepared, state), True
    return _refactorized(memory, prepared, now) if is_due else now


def write(
    memory: Streaming, prepared: Prepared, now: rls.RLSState, keys: Rows, values: Rows
) -> tuple[rls.RLSState, float]:
    """Return the memory with n rows written, one by one, and a bound on how far, in norm, this moves
    what is read at any key that was in it before: a row adds g (z − wM) / (1 + ℓ) to M, g = A⁻¹wᵀ and
    ℓ = w g, and at a key v of what is in, v A⁻¹ vᵀ ≤ 1 and so |v g| ≤ √ℓ.
    """
    moved = 0.0
    for key, value in zip(keys, values, strict=True):
        # The statistics and the solution stay where they are: what moves is a few rows.
        pending, step, is_due, is_finite = _write(memory, prepared, now, key, value)
        now = dataclasses.replace(now, pending=pending)
        leverage = max(0.0, float(step.leverage))
        moved += leverage**0.5 * float(step.innovation) / (1 + leverage)
        if is_due:
            now = _refactorized(memory, prepared, now)
        elif not is_finite:
            raise _not_finite("write", memory)
    return now, moved


def forget(
    memory: Streaming, prepared: Prepared, now: rls.RLSState, keys: Rows, values: Rows
) -> rls.RLSState:
    """Return the memory without n rows; MemoryNotFinite too where one cannot have been in."""
    rows = _padded(keys), _padded(values)
    # Of the many rows that a load leaves, writing some again takes longer than a solve.
    if len(now.pending.signs) == rls.MAX_PENDING:
        pending, is_done = rls.withdraw(memory, prepared, now, *rows)
        if is_done:
            return dataclasses.replace(now, pending=pending)
    after, is_sound = rls.without(memory, prepared, now, *rows)
    if not is_sound:
        raise _not_finite("forget", memory)
    return after


def read(memory: Streaming, prepared: Prepared, now: rls.RLSState, keys: Rows) -> Rows:
    """Read at n keys."""
    # A number of rows at a time, so that it is compiled for few, however many there are.
    parts = [_padded(keys[at : at + _ROWS]) for at in range(0, len(keys), _ROWS)]
    return np.concatenate([rls.read(memory, prepared, now, part) for part in parts])[: len(keys)]


def read_back(
    memory: Streaming,
    prepared: Prepared,
    now: rls.RLSState,
    keys: Rows,
    values: Rows,
    parts: tuple[int, int],
) -> tuple[rls.RLSState, Float[np.ndarray, " n"]]:
    """Return the memory, solved anew where it rounds too much row by row, and how much farther, in norm,
    each of n rows may move until it is lost; below zero where it is.

    A row is lost where any part of it is read with more than half of the largest part as error.

    Args:
      parts: count and size of the parts, which are the last numbers of a row.
    """
    values = values[:, values.shape[1] - parts[0] * parts[1] :]
    sizes = np.linalg.norm(values.reshape(-1, *parts), axis=2).max(axis=1)

    def room(now: rls.RLSState) -> Float[np.ndarray, " n"]:
        errors = read(memory, prepared, now, keys)[:, -values.shape[1] :] - values
        return 0.5 * sizes - np.linalg.norm(errors.reshape(-1, *parts), axis=2).max(axis=1)

    if not (left := room(now)).min() >= 0:
        now = rls.refactorize(memory, prepared, now)
        left = room(now)
    return now, left


def _padded(rows: Rows) -> Float[np.ndarray, "m C"]:
    """Return rows and zero rows after them, so that few numbers of rows are compiled for."""
    return np.pad(rows, ((0, (1 << max(len(rows) - 1, 0).bit_length()) - len(rows)), (0, 0)))


@jax.jit
def _write(
    memory: Streaming,
    prepared: Prepared,
    now: rls.RLSState,
    key: Float[Array, "C"],
    value: Float[Array, "C"],
) -> tuple[Pending, rls.Step, Bool[Array, ""], Bool[Array, ""]]:
    """Return the pending writes with this one, its effect, whether to factorise, whether all is finite.

    Compiled as one, `rls.write` does not return copies of the arrays that a write leaves as they are.
    """
    written, step, is_due = rls.write(memory, prepared, now, key, value)
    pending = written.pending.refined(written.pending.number - 1)
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(pending)]
    return pending, step, is_due, jnp.stack(finite).all()


def _refactorized(memory: Streaming, prepared: Prepared, now: rls.RLSState) -> rls.RLSState:
    now = rls.refactorize(memory, prepared, now)
    if not jnp.isfinite(now.state.solution).all():
        raise _not_finite("write", memory)
    return now


def _not_finite(action: str, memory: Streaming) -> MemoryNotFinite:
    return MemoryNotFinite(
        f"The memory could not {action} this in float32, and stays as it was. Its ridge "
        f"({float(memory.ridge):g}) is too small for what is written: load the model with a larger "
        "editing.session_ridge and write the facts again."
    )
