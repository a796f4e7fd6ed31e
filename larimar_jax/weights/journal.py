"""The file of a session: lines of JSON behind a first line that names the model.

    {"crc": …, "format": "larimar-session/1", "id": …, "model": …, "fingerprint": …, "next_id": 1}
    {"crc": …, "events": [{"kind": "write", "fact": {…}, "at": …, …, "rows": {…}}]}

A line is appended by one writer at a time, and is on the disk when `append` returns. One that was cut
short has no end: it was never acknowledged, readers leave it out, and the next writer overwrites it.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from larimar_jax.weights import model_file

_FORMAT = "larimar-session/1"
_PREFIX = b'{"crc": "'
_CHECKED = len(_PREFIX) + len('01234567", ')


class DamagedSession(ValueError):
    """A file that is no session, or a damaged one."""


class SaveFailed(OSError):
    """A session's file that could not be written, as on a full disk; it stays as it was."""


class Journal:
    """A session's file, as it was when it was read last."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._id, self._end = "", 0
        self._file: BinaryIO | None = None  # while it is locked

    def begin(self, about: dict[str, Any]) -> None:
        """Start the file with a first line about its model, unless it is there.

        Raises:
          DamagedSession: something else is there.
          SaveFailed.
        """
        try:
            self.header()
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.locked(os.O_CREAT):
                if not self._file.read().endswith(b"\n"):  # or another process began it
                    self._write(0, _line(_header(about)))

    def header(self) -> dict[str, Any]:
        """Return the first line.

        Raises:
          FileNotFoundError: no file, or one that was cut short before anything was written to it.
          DamagedSession.
        """
        with _open(self.path, "rb") as file:
            return self._header(file)

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Return the lines that are new since the last call; before them the first one, where that was
        of another file or there was none.

        Raises:
          FileNotFoundError, DamagedSession: as `header`.
        """
        with _open(self.path, "rb") as file:
            header = self._header(file)
            is_new = header["id"] != self._id
            begin = file.tell() if is_new else self._end
            file.seek(begin)
            # What is behind the last end of a line was cut short, or is just being written.
            *lines, rest = file.read().split(b"\n")
            parsed = [self._parsed(line) for line in lines]
            self._id, self._end = header["id"], file.tell() - len(rest)
        return header if is_new else None, parsed

    @contextlib.contextmanager
    def locked(self, flags: int = 0) -> Iterator[None]:
        """Hold the file as its only writer; waits for the one before."""
        while True:
            with _open(self.path, "r+b", flags) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # Else the writer before has replaced the file.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    self._file = file
                    yield
                    return

    def append(self, values: dict[str, Any]) -> None:
        """Append a line to the file, which is locked and was read to its end since.

        Raises:
          SaveFailed: the file stays as it was.
        """
        line = _line(values)
        self._write(self._end, line)
        self._end += len(line)

    def rewrite(self, about: dict[str, Any], lines: Iterable[dict[str, Any]]) -> None:
        """Replace the file by one of these lines, whole or not at all.

        Raises:
          SaveFailed: the file stays as it was.
        """
        header = _header(about)
        content = b"".join(_line(values) for values in (header, *lines))
        if self.path.is_dir():
            raise _folder(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _explained(self.path, content), model_file.replaced(self.path.resolve()) as file:
            file.write(content)
        self._id, self._end = header["id"], len(content)

    def _write(self, place: int, line: bytes) -> None:
        """Write a line at the end, in place of one that was cut short."""
        file, rest = self._file, memoryview(line)
        with _explained(self.path, line):
            try:
                file.truncate(place)
                file.seek(place)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(place)
                raise

    def _header(self, file: BinaryIO) -> dict[str, Any]:
        line = file.readline()
        if not line.endswith(b"\n") and _PREFIX.startswith(line[: len(_PREFIX)]):
            raise FileNotFoundError(
                f"there is no session in {self.path}, which is empty. `larimar edit` starts one there."
            )
        header = self._parsed(line[:-1]) if line.startswith(_PREFIX) else {}
        if header.get("format") != _FORMAT:
            raise DamagedSession(
                f"{self.path} is no session: its first line names no {_FORMAT}. Give a model to "
                "--model, and name another file here."
            )
        return header

    def _parsed(self, line: bytes) -> dict[str, Any]:
        body = b"{" + line[_CHECKED:]
        if line[:_CHECKED] != _checked(body):
            raise DamagedSession(
                f"{self.path} is damaged: a line, {line[:40]!r}…, is not as it was written. Take a "
                "copy of the file, or delete that line and with it what it wrote."
            )
        return json.loads(body)


def packed(array: np.ndarray) -> dict[str, Any]:
    """Return a float32 array as JSON, compressed: zeros and answer codes take next to nothing."""
    data = base64.b64encode(zlib.compress(array.astype("<f4").tobytes(), 1)).decode()
    return dict(shape=array.shape, data=data)


def unpacked(shape: list[int], data: str) -> np.ndarray:
    """Return the array of which `packed` made JSON."""
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), "<f4").reshape(shape)


def _header(about: dict[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "id": uuid.uuid4().hex, **about}


def _line(values: dict[str, Any]) -> bytes:
    body = json.dumps(values, ensure_ascii=False).encode("utf-8")
    return _checked(body) + body[1:] + b"\n"


def _checked(body: bytes) -> bytes:
    """Return the beginning of a line, with the checksum of the JSON object that it is without it."""
    return b'%s%08x", ' % (_PREFIX, zlib.crc32(body))


def _open(path: Path, mode: str, flags: int = 0) -> BinaryIO:
    try:
        # What is written is not held back: an error is one of the call that writes.
        buffering = -1 if mode == "rb" else 0
        return open(
            path, mode, buffering, opener=lambda name, own: os.open(name, own | flags, 0o666)
        )
    except IsADirectoryError:
        raise _folder(path) from None


def _folder(path: Path) -> IsADirectoryError:
    name = path / "larimar-session.jsonl"
    return IsADirectoryError(f"{path} is a folder, and a session is a file, such as {name}.")


@contextlib.contextmanager
def _explained(path: Path, content: bytes) -> Iterator[None]:
    """Raise SaveFailed for an OSError while content is written."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise SaveFailed(
            f"{path} could not be written ({error.strerror}): {len(content):,} bytes were to go there, "
            f"and {free:,} are free. It stays as it was: make room, or name a file elsewhere."
        ) from error
