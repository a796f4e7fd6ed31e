"""A memory alone on disk, by Orbax, tied to the encoder whose encodings it holds.

    memories.save("facts/2024", state, encoder=tokenizer_and_weights_hash, about={"facts": 1000})
    state, about = memories.load("facts/2024", like, encoder=…)

Written to a temporary folder and renamed, so that it is there whole or not at all; onto any mesh: `like`
says where each array goes. (`Session.save` writes facts with their texts to one file; this is for
memories without texts, of any variant and any size.)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from larimar_jax.train.checksums import array_checksums, json_checksum, named, unnamed

FORMAT = "larimar-memory/1"


class MemoryFileError(ValueError):
    """A folder that holds no memory, a damaged one, or one of another encoder or kind."""


def save(path: str | Path, state: Any, *, encoder: str, about: Mapping[str, Any] | None = None) -> None:
    """Writes a memory's state.

    Args:
      path: a folder that is not there yet.
      state: any variant's, wherever its arrays are.
      encoder: a digest of all that keys and values depend on: encoder, M₀, addressing and the memory's
        settings. `Pretrained.fingerprint` is one.
      about: anything JSON can hold.
    Raises:
      FileExistsError: `path` is there.
    """
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} is there already; a memory is never written over another")
    arrays = named(state)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "state": type(state).__name__,
        "encoder": encoder,
        "about": dict(about or {}),
        "shapes": {name: list(leaf.shape) for name, leaf in arrays.items()},
        "checksums": array_checksums(arrays),
    }
    with ocp.Checkpointer(_handler()) as writer:
        writer.save(
            path,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays),
                meta=ocp.args.JsonSave({**meta, "checksum": json_checksum(meta)}),
            ),
        )


def load(path: str | Path, like: Any, *, encoder: str) -> tuple[Any, dict[str, Any]]:
    """(the state, what was said about it).

    Args:
      like: a state of the same variant and sizes, of arrays or of ShapeDtypeStructs with a sharding:
        `jax.eval_shape(memory.empty, prepared)` for a memory whose state does not grow with its facts, or
        `sharded.empty(…)` for one in rows over devices.
      encoder: as it was said to `save`.
    Raises:
      FileNotFoundError: there is no such folder.
      MemoryFileError: no memory, a damaged one, one of another encoder, or of other sizes than `like`.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"there is no memory in {path}")
    with ocp.Checkpointer(_handler()) as reader:
        try:
            meta = dict(reader.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)
        except Exception as error:  # Damage shows as nearly any type.
            raise _damaged(path, error) from error
        if meta.pop("checksum", None) != json_checksum(meta) or meta.get("format") != FORMAT:
            raise _damaged(path, "its meta is not what was written")
        if meta["encoder"] != encoder:
            raise MemoryFileError(
                f"{path} holds encodings of the encoder {meta['encoder'][:16]}; the encoder here is "
                f"{encoder[:16]}. What one encoder wrote another cannot read: load that encoder, or "
                "write the facts again."
            )
        wanted = named(like)
        if meta["state"] != type(like).__name__ or set(meta["checksums"]) != set(wanted):
            raise MemoryFileError(
                f"{path} holds a {meta['state']} of {', '.join(sorted(meta['checksums']))}; asked for "
                f"is a {type(like).__name__} of {', '.join(sorted(wanted))}. Is it of another variant?"
            )
        other = [
            f"{name}: {tuple(meta['shapes'][name])} there, {leaf.shape} asked for"
            for name, leaf in sorted(wanted.items())
            if tuple(meta["shapes"][name]) != leaf.shape
        ]
        if other:
            raise MemoryFileError(f"{path} is of other sizes:\n  " + "\n  ".join(other))
        try:
            given = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(_abstract, wanted)))
            arrays = reader.restore(path, args=given).state
        except Exception as error:
            raise _damaged(path, error) from error
    sums = array_checksums(arrays)
    wrong = sorted(name for name, value in meta["checksums"].items() if sums[name] != value)
    if wrong:
        raise _damaged(path, f"checksums differ: {', '.join(wrong)}")
    return unnamed(like, arrays), meta["about"]


def _handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    where = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _damaged(path: Path, reason: Any) -> MemoryFileError:
    said = " ".join(str(reason).split())[:300]
    return MemoryFileError(f"{path} holds no memory, or a damaged one ({said})")
