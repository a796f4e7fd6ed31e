"""Who may read and write which memory: a file of tokens.

# token                            name   rights: MEMORY=read or MEMORY=write, * for every memory
4f0c5b8b7c2e4d6a9d1e2f3a4b5c6d7e   anna   team-a=write team-b=read
9b1deb4d3b7d4bad9bdd2b0d7b3dcb6d   ops    *=write
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from larimar_jax.serve.problems import Problem

_RIGHTS = ("read", "write")
_SHORTEST = 16


class Caller(NamedTuple):
    """Who sends a request, and the right to each memory; "*" is every one."""

    name: str
    rights: Mapping[str, str]

    def may(self, right: str, memory: str) -> bool:
        """Return whether the caller may read or write a memory; who may write may read."""
        granted = {self.rights.get(memory), self.rights.get("*")}
        return "write" in granted or right in granted

    def require(self, right: str, memory: str) -> None:
        """Raise a Problem, 403, where the caller may not."""
        if not self.may(right, memory):
            raise Problem(403, "forbidden", f"this token may not {right} the memory {memory!r}.")


ANYONE = Caller("", {"*": "write"})


class TokenFileError(ValueError):
    """A file of tokens with a line that is none."""


class Access:
    """Callers by the SHA-256 of their tokens; without any, everyone may do everything."""

    def __init__(self, callers: Mapping[bytes, Caller] | None = None):
        self._callers = callers

    @classmethod
    def from_file(cls, path: str | Path) -> "Access":
        """Read a file of tokens.

        Raises:
          TokenFileError: names the line.
          OSError: no such file.
        """
        callers = {}
        for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            rights = dict(word.rpartition("=")[::2] for word in words[2:])
            if len(words) < 3 or len(words[0]) < _SHORTEST or {*rights.values()} - {*_RIGHTS}:
                raise TokenFileError(
                    f"{path}, line {number}: a line is a token of at least {_SHORTEST} characters, a "
                    "name, and rights such as team-a=read or *=write."
                )
            callers[_digest(words[0])] = Caller(words[1], rights)
        if not callers:
            raise TokenFileError(f"{path} has no token, so that nobody could do anything.")
        return cls(callers)

    @property
    def is_open(self) -> bool:
        """Whether no token is needed."""
        return self._callers is None

    def caller(self, authorization: str) -> Caller:
        """Return who sends an Authorization header: Bearer, or Basic with the token as the password.

        Raises:
          Problem: 401.
        """
        if self._callers is None:
            return ANYONE
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                token = base64.b64decode(token, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                token = ""
        digest, match = _digest(token.strip()), None
        # All are compared, each in constant time: how long it takes tells nothing.
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                match = caller
        if match is None:
            message = "a valid token is needed: send it as Authorization: Bearer TOKEN."
            challenge = 'Basic realm="larimar", charset="UTF-8"'
            raise Problem(401, "unauthorized", message, **{"WWW-Authenticate": challenge})
        return match


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
