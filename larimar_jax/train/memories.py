"""A memory alone on disk, by Orbax, tied to the encoder whose encodings it holds.

    memories.save("facts/2024", state, encoder=pipeline.fingerprint, about={"facts": 1000})
    state, about = memories.load("facts/2024", like, encoder=pipeline.fingerprint)

Written to a temporary folder and renamed, so that it is there whole or not at all; onto any mesh: `like`
names the place of each array. (`Session.save` writes facts with their texts to one file; this is for
memories without texts, of any variant and any size.)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from larimar_jax.train import checkpoint

FORMAT = "larimar-memory/1"


class MemoryFileError(ValueError):
    """A folder that holds no memory, a damaged one, or one of another encoder or kind."""


def save(
    path: str | Path, state: Any, *, encoder: str, about: Mapping[str, Any] | None = None
) -> None:
    """Write a memory's state.

    Args:
        path: a folder that does not exist yet.
        state: any variant's, wherever its arrays are.
        encoder: a digest of all that keys and values depend on: encoder, M₀, addressing and the
            memory's settings. `Pipeline.fingerprint` is one.
        about: anything JSON can hold.
    Raises:
        FileExistsError: `path` exists.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} is there already; a memory is never written over another")
    meta = dict(format=FORMAT, state=type(state).__name__, encoder=encoder, about=dict(about or {}))
    checkpoint.write(path, {"state": checkpoint.named(state)}, meta)


def load(path: str | Path, like: Any, *, encoder: str) -> tuple[Any, dict[str, Any]]:
    """Return (the state, what `save` was told about it).

    Args:
        like: a state of the same variant and sizes, of arrays or of ShapeDtypeStructs with a sharding:
            `jax.eval_shape(memory.empty, prepared)` for a memory whose state does not grow with its
            facts, or `sharded.empty(…)` for a memory in rows over devices.
        encoder: as passed to `save`.
    Raises:
        FileNotFoundError: there is no such folder.
        MemoryFileError: no memory, a damaged one, one of another encoder, or of other sizes than `like`.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no memory in {path}")
    try:
        meta = checkpoint.read_meta(path)
        if meta.get("format") != FORMAT:
            raise ValueError("it is of another format")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    if meta["encoder"] != encoder:
        raise MemoryFileError(
            f"{path} holds encodings of the encoder {meta['encoder'][:16]}; the encoder here is "
            f"{encoder[:16]}. What one encoder wrote another cannot read: load that encoder, or "
            "write the facts again."
        )
    shapes, wanted = meta["shapes"]["state"], checkpoint.named(like)
    if meta["state"] != type(like).__name__ or shapes.keys() != wanted.keys():
        raise MemoryFileError(
            f"{path} holds a {meta['state']} of {', '.join(sorted(shapes))}; asked for "
            f"is a {type(like).__name__} of {', '.join(sorted(wanted))}. Is it of another variant?"
        )
    differ = [
        f"{name}: {tuple(shapes[name])} there, {leaf.shape} asked for"
        for name, leaf in sorted(wanted.items())
        if tuple(shapes[name]) != leaf.shape
    ]
    if differ:
        raise MemoryFileError(f"{path} is of other sizes:\n  " + "\n  ".join(differ))
    try:
        arrays = checkpoint.read_item(path, "state", wanted, meta)
    except Exception as error:  # Damage shows as nearly any type.
        raise _damaged(path, error) from error
    return checkpoint.unnamed(like, arrays), meta["about"]


def _damaged(path: Path, error: Exception) -> MemoryFileError:
    return MemoryFileError(f"{path} holds no memory, or a damaged one ({checkpoint.brief(error)})")
