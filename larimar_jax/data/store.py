"""Tokenised pieces on disk: made once, read at random, checked when opened.

A store is a folder of array_record shards with a manifest. It is written beside its place and
renamed when it is whole, so that what was cut off is never read, and two runs that make the same
store at once do not meet.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

FORMAT = "larimar-pieces/1"
MANIFEST = "manifest.json"
# Pieces of a shard, and of a call to the tokenizers: enough for their threads, and a moving count.
SHARD, BLOCK = 1 << 18, 2048
# Seconds that a process waits for another one's store to come nearer to being whole.
PATIENCE = 1800.0


class StoreError(RuntimeError):
    """A store that is damaged, or does not come."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a store is made from, and under which it is kept.

    corpus: its identity. side: "training" or "held-out". encoder, decoder: hashes of the tokenizers.
    """

    corpus: str
    side: str
    unit: str
    encoder: str
    decoder: str
    encoder_tokens: int
    decoder_tokens: int

    @property
    def name(self) -> str:
        """A folder's name: no other recipe has it."""
        text = json.dumps([FORMAT, dataclasses.asdict(self)], sort_keys=True)
        return f"{self.side}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:24]}"


def cache() -> Path:
    """Where stores are kept: $LARIMAR_CACHE, or ~/.cache/larimar."""
    said = os.environ.get("LARIMAR_CACHE")
    return Path(said) if said else Path.home() / ".cache" / "larimar"


class Store:
    """N pieces, tokenised for both towers; `gather` makes batches of them.

    Args:
        folder: of a whole store.
        tokenizer: of the decoder, for the tokens around a text and for padding.
        verify: read every shard and compare its checksum with the manifest's.
    Raises:
        StoreError: not whole, or damaged; names the shard.
    """

    def __init__(self, folder: str | Path, tokenizer: Any, *, verify: bool = False):
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder, verify)
        recipe = self.manifest["recipe"]
        self._shapes = (recipe["encoder_tokens"], recipe["decoder_tokens"])
        self._specials = (tokenizer.bos, tokenizer.eos, tokenizer.pad)
        self._paths = [str(self.folder / name) for name in self.manifest["shards"]]
        self._open()

    def _open(self) -> None:
        # The library refuses no files at all; what is asked of an empty store fails where it is asked.
        reader = array_record_data_source.ArrayRecordDataSource
        self._source = reader(self._paths) if self._paths else None

    # Grain's workers get a copy, which opens its own files.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_source"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return self.manifest["pieces"]

    @property
    def dropped(self) -> int:
        """Pieces that were too long for the token lengths."""
        return self.manifest["dropped"]

    def texts(self, rows: Iterable[int]) -> list[str]:
        """The pieces of these rows, as text."""
        return [_unpacked(record)[2] for record in self._source.__getitems__([int(row) for row in rows])]

    def gather(self, rows: Int[np.ndarray, "B E"]) -> dict[str, np.ndarray]:
        """The batch of these rows: encoder_tokens int32 [B, E, S], encoder_mask bool, decoder_tokens
        int32 [B, E, T] (`<BOS> text <EOS>`), decoder_mask bool; padded on the right."""
        encoder, decoder = self._shapes
        bos, eos, pad = self._specials
        count = rows.size
        batch = {
            "encoder_tokens": np.zeros((count, encoder), np.int32),
            "encoder_mask": np.zeros((count, encoder), bool),
            "decoder_tokens": np.full((count, decoder), pad, np.int32),
            "decoder_mask": np.zeros((count, decoder), bool),
        }
        for row, record in enumerate(self._source.__getitems__(rows.reshape(-1).tolist())):
            asked, told, _ = _unpacked(record)
            batch["encoder_tokens"][row, : len(asked)] = asked
            batch["encoder_mask"][row, : len(asked)] = True
            batch["decoder_tokens"][row, 0] = bos
            batch["decoder_tokens"][row, 1 : len(told) + 1] = told
            batch["decoder_tokens"][row, len(told) + 1] = eos
            batch["decoder_mask"][row, : len(told) + 2] = True
        return {name: array.reshape(*rows.shape, -1) for name, array in batch.items()}


def open_or_make(
    recipe: Recipe,
    pieces: Iterable[str],
    encoder: Any,
    decoder: Any,
    *,
    folder: Path | None = None,
    writes: bool = True,
    progress: bool = False,
) -> Store:
    """The store of a recipe; made from `pieces` where it is not there yet.

    A text that is too long for either tower is dropped: cut, it would ask the decoder for words that
    the encoder never saw, or the reverse.

    Args:
        pieces: read only where the store has to be made.
        encoder, decoder: `weights.tokenizers.Tokenizer`s.
        folder: of all stores; default `cache()`.
        writes: whether this process makes it; the others wait for the one that does.
        progress: a count on stderr.
    Raises:
        StoreError: damaged, or it does not come.
    """
    place = (folder or cache()) / recipe.name
    if not (place / MANIFEST).is_file():
        if writes:
            _make(place, recipe, pieces, encoder, decoder, progress)
        else:
            _wait(place)
    return Store(place, decoder)


def _make(place: Path, recipe: Recipe, pieces, encoder, decoder, progress: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Of another attempt that was cut off: nobody writes to it any more after a day.
    for old in place.parent.glob(f"{place.name}.*.part"):
        if time.time() - old.stat().st_mtime > 86_400:
            shutil.rmtree(old, ignore_errors=True)
    part = place.parent / f"{place.name}.{uuid.uuid4().hex[:8]}.part"
    part.mkdir()
    try:
        records = _records(recipe, pieces, encoder, decoder, progress)
        shards, total, dropped = _write(part, records)
        manifest = {
            "format": FORMAT,
            "recipe": dataclasses.asdict(recipe),
            "pieces": total,
            "dropped": dropped,
            "shards": shards,
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        try:
            part.rename(place)
        except OSError:
            if not (place / MANIFEST).is_file():  # Else another run was quicker, with the same.
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(part: Path, records: Iterator[bytes | None]) -> tuple[dict[str, Any], int, int]:
    """({shard: its pieces, bytes and checksum}, pieces, dropped); None in `records` is a dropped one."""
    shards, total, dropped = {}, 0, 0
    while True:
        block = itertools.islice(records, SHARD)
        first = next(block, ...)
        if first is ...:
            return shards, total, dropped
        name = f"pieces-{len(shards):05}.array_record"
        # A record by itself, so that reading one reads no others.
        writer = array_record_module.ArrayRecordWriter(str(part / name), "group_size:1")
        count = 0
        for record in itertools.chain([first], block):
            if record is None:
                dropped += 1
                continue
            writer.write(record)
            count += 1
        writer.close()
        if count == 0:
            (part / name).unlink()
            continue
        total += count
        size = (part / name).stat().st_size
        shards[name] = {"pieces": count, "bytes": size, "sha256": _checksum(part / name)}


def _records(recipe: Recipe, pieces, encoder, decoder, progress: bool) -> Iterator[bytes | None]:
    texts, done = iter(pieces), 0
    with Progress(
        SpinnerColumn(),
        TextColumn(f"tokenise {recipe.side}: {{task.completed:,}} pieces"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    ) as bar:
        task = bar.add_task("", total=None)
        while block := list(itertools.islice(texts, BLOCK)):
            asked, told = encoder.encode(block), decoder.encode(block)
            for row, text in enumerate(block):
                ids = asked.ids[row][asked.mask[row]]
                inner = told.ids[row][told.mask[row]]
                fits = len(ids) <= recipe.encoder_tokens
                fits &= 0 < len(inner) <= recipe.decoder_tokens - 2
                yield _packed(ids, inner, text) if fits else None
            done += len(block)
            bar.update(task, completed=done)


def _packed(encoder: np.ndarray, decoder: np.ndarray, text: str) -> bytes:
    head = struct.pack("<II", len(encoder), len(decoder))
    ids = np.concatenate([encoder, decoder]).astype("<i4").tobytes()
    return head + ids + text.encode("utf-8")


def _unpacked(record: bytes) -> tuple[np.ndarray, np.ndarray, str]:
    asked, told = struct.unpack_from("<II", record)
    ids = np.frombuffer(record, "<i4", asked + told, 8)
    return ids[:asked], ids[asked:], record[8 + ids.nbytes :].decode("utf-8")


def _manifest(folder: Path, verify: bool) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
        for name, shard in found["shards"].items():
            path = folder / name
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise ValueError(f"{name} has {size} bytes, not {shard['bytes']}")
            if verify and _checksum(path) != shard["sha256"]:
                raise ValueError(f"{name} is not what was written")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"the tokenised pieces in {folder} are damaged ({error}). Delete the folder: the next run "
            "makes it again."
        ) from error


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wait(place: Path) -> None:
    def progress() -> float:
        parts = place.parent.glob(f"{place.name}.*.part/*")
        return max((file.stat().st_mtime for file in parts), default=0.0)

    seen, since = progress(), time.monotonic()
    while not (place / MANIFEST).is_file():
        if (now := progress()) != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise StoreError(
                f"waited {PATIENCE:g} s for process 0 to make {place}, and nothing came. Do all "
                "processes see the same LARIMAR_CACHE?"
            )
        time.sleep(0.2)
