"""Tokenised pieces on disk: made once, read at random.

A store is a folder of array_record shards with a manifest. It is written beside its place and
renamed when it is whole, so that what was cut off is never read, and two runs that make the same
store at once do not meet. Sizes are checked when it is opened, checksums when a read fails.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from larimar_jax.config import cache_folder

# Raised whenever a recipe would give other pieces or other bytes than before.
FORMAT = "larimar-pieces/2"
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
        self._open()

    def _open(self) -> None:
        paths = [str(self.folder / name) for name in self.manifest["shards"]]
        try:
            # A corpus may have no pieces, and array_record no source of nothing.
            source = array_record_data_source.ArrayRecordDataSource(paths) if paths else ()
        except (RuntimeError, ValueError, OSError) as error:
            raise self._unreadable(error) from error
        if len(source) != len(self):
            raise _damaged(self.folder, f"its shards hold {len(source)} pieces, not {len(self)}")
        self._source = source

    def _records(self, rows: Sequence[int]) -> Sequence[bytes]:
        if rows and not 0 <= min(rows) <= max(rows) < len(self):
            raise IndexError(f"{self.folder} has {len(self)} pieces, and {max(rows)} was asked for")
        try:
            return self._source.__getitems__(rows) if rows else []
        except (RuntimeError, ValueError, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> StoreError:
        """Why array_record could not read, by the checksums of all shards."""
        try:
            _manifest(self.folder, verify=True)
        except StoreError as damage:
            return damage
        return StoreError(
            f"the tokenised pieces in {self.folder} could not be read ({error}), and yet they are what "
            "was written. Is the disk well, and may this process open more files?"
        )

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

    def texts(self, rows: Iterable[SupportsInt]) -> list[str]:
        """The pieces of these rows, as text."""
        return [_text(record) for record in self._records([int(row) for row in rows])]

    def gather(self, rows: Int[np.ndarray, "B E"]) -> dict[str, np.ndarray]:
        """The batch of these rows: encoder_tokens int32 [B, E, S], encoder_mask bool, decoder_tokens
        int32 [B, E, T] (`<BOS> text <EOS>`), decoder_mask bool; padded on the right.

        Raises:
            StoreError: a record is damaged; names the shard.
        """
        bos, eos, pad = self._specials
        asked, told = zip(*map(_ids, self._records(rows.reshape(-1).tolist())), strict=True)
        place, length = _places(asked, self._shapes[0])
        encoder_mask = place < length
        encoder = np.zeros(encoder_mask.shape, np.int32)
        encoder[encoder_mask] = np.concatenate(asked)
        place, length = _places(told, self._shapes[1])
        decoder = np.full((len(told), self._shapes[1]), pad, np.int32)
        decoder[:, 0] = bos
        decoder[(place >= 1) & (place <= length)] = np.concatenate(told)
        decoder[place == length + 1] = eos
        batch = {
            "encoder_tokens": encoder,
            "encoder_mask": encoder_mask,
            "decoder_tokens": decoder,
            "decoder_mask": place < length + 2,
        }
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
        folder: of all stores; default `config.cache_folder()`.
        writes: whether this process makes it; the others wait for the one that does.
        progress: a count on stderr.
    Raises:
        StoreError: damaged, or it does not come.
    """
    place = (folder or cache_folder()) / recipe.name
    if not (place / MANIFEST).is_file():
        if writes:
            _make(place, recipe, pieces, encoder, decoder, progress)
        else:
            _wait(place)
    made = Store(place, decoder)
    if made.manifest["recipe"] != dataclasses.asdict(recipe):
        raise _damaged(place, "it was made from something else, or moved here")
    return made


def _make(place: Path, recipe: Recipe, pieces, encoder, decoder, progress: bool) -> None:
    # Said before hours of work that could not be moved there. In this order: another run may be
    # putting it there, all at once.
    if place.exists() and not (place / MANIFEST).is_file():
        raise _damaged(place, f"it has no {MANIFEST}")
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
        count = 0
        with _writer(part / name) as write:
            for record in itertools.chain([first], block):
                if record is None:
                    dropped += 1
                else:
                    write(record)
                    count += 1
        if count == 0:
            (part / name).unlink()
            continue
        total += count
        size = (part / name).stat().st_size
        shards[name] = {"pieces": count, "bytes": size, "sha256": _checksum(part / name)}


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yields `write(record)` of a new shard."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")

    def told(call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except RuntimeError as error:
            raise StoreError(
                f"tokenised pieces could not be written to {path} ({error}). Is the disk full? Set "
                "LARIMAR_CACHE to a folder with more room."
            ) from error

    yield lambda record: told(writer.write, record)
    told(writer.close)


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


def _ids(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    asked, told = struct.unpack_from("<II", record)
    ids = np.frombuffer(record, "<i4", asked + told, 8)
    return ids[:asked], ids[asked:]


def _text(record: bytes) -> str:
    return record[8 + 4 * sum(struct.unpack_from("<II", record)) :].decode("utf-8")


def _places(ids: Sequence[np.ndarray], tokens: int):
    """(0 … tokens − 1 [1, tokens], how many ids each has [N, 1])"""
    return np.arange(tokens)[None], np.array([len(row) for row in ids])[:, None]


def _manifest(folder: Path, verify: bool) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
        Recipe(**found["recipe"])
        for name, shard in found["shards"].items():
            path = folder / name
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise ValueError(f"{name} has {size} bytes, not {shard['bytes']}")
            if verify and _checksum(path) != shard["sha256"]:
                raise ValueError(f"{name} is not what was written")
        if found["pieces"] != sum(shard["pieces"] for shard in found["shards"].values()):
            raise ValueError("its shards do not add up to its pieces")
        int(found["dropped"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from error


def _damaged(folder: Path, reason: str) -> StoreError:
    return StoreError(
        f"the tokenised pieces in {folder} are damaged ({reason}). Delete the folder: the next run "
        "makes it again."
    )


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wait(place: Path) -> None:
    def progress() -> float:
        newest = 0.0
        # A part is renamed when it is whole, perhaps between being listed and being looked at.
        with contextlib.suppress(FileNotFoundError):
            for file in place.parent.glob(f"{place.name}.*.part/*"):
                newest = max(newest, file.stat().st_mtime)
        return newest

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
