"""Many memories over one model: a session each, opened on demand, changed in order, closed when idle."""

import asyncio
import concurrent.futures
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from larimar_jax.pipeline import Pipeline
from larimar_jax.serve.limits import Limits
from larimar_jax.serve.problems import Problem
from larimar_jax.serve.prometheus import Metrics
from larimar_jax.session import Session

T = TypeVar("T")
DEFAULT = "default"
# No dot and no slash: a name is that of a file in the folder, and of no other.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SUFFIX = ".jsonl"


class OpenMemory:
    """A session in use. lock: of changes, which are served in the order of their arrival."""

    def __init__(self, session: Session):
        self.session, self.lock = session, asyncio.Lock()
        self.changes, self.used = 0, time.monotonic()


class MemoryFolder:
    """The memories of a folder, a journal each.

    Args:
      folder: where they are; made if it is not there.
    """

    def __init__(self, model: Pipeline, folder: Path, limits: Limits, metrics: Metrics):
        self.model, self.limits, self.metrics = model, limits, metrics
        self.open: dict[str, OpenMemory] = {}
        self._folder, self._opening = folder, asyncio.Lock()
        self._threads = concurrent.futures.ThreadPoolExecutor(2, "larimar-memory")
        folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Return the names of all memories."""
        stems = (path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}"))
        return sorted(filter(_NAME.fullmatch, stems))

    async def get(self, name: str, create: bool = False) -> OpenMemory:
        """Return a memory, opened if it is not.

        Raises:
          Problem: 400, it is no name; 404, there is none; 409, there are too many to create one.
          DamagedSession, WrongModel, SaveFailed.
        """
        memory = self.open.get(name)
        if memory is None:
            require_name(name)
            async with self._opening:
                memory = self.open.get(name) or await self._opened(name, create)
            self.close_idle(besides=name)
        memory.used = time.monotonic()
        return memory

    async def _opened(self, name: str, create: bool) -> OpenMemory:
        path = self._folder / f"{name}{_SUFFIX}"
        if not path.exists():
            if not create:
                message = f"there is no memory {name!r}; the first fact that is written makes it."
                raise Problem(404, "model_not_found", message)
            if len(self.names()) >= self.limits.memories:
                message = f"there are {self.limits.memories} memories, and no room for more."
                raise Problem(409, "too_many_memories", message)
        session = await self.run(Session, self.model, path)
        memory = self.open[name] = OpenMemory(session)
        return memory

    async def change(self, name: str, work: Callable[[Session], T], create: bool = False) -> T:
        """Return `work` of a memory's session, after all changes that came before.

        Raises:
          Problem: as `get`; 429, too many changes wait.
        """
        begin, memory = time.monotonic(), await self.get(name, create)
        if memory.changes >= self.limits.writes:
            message = f"{memory.changes} changes of the memory {name!r} wait: try again."
            raise Problem(429, "too_many_changes", message, **{"Retry-After": "1"})
        memory.changes += 1
        try:
            async with memory.lock:
                return await self.run(work, memory.session)
        finally:
            memory.changes -= 1
            self.metrics.observe("larimar_write_seconds", time.monotonic() - begin)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a function returns that runs in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    def close_idle(self, besides: str = "") -> None:
        """Close memories that were not used for long, and those used the longest ago of too many.

        What still answers a question with one goes on: only the name is given up.
        """
        ordered = sorted(self.open, key=lambda name: self.open[name].used)
        too_many = len(ordered) - self.limits.open_memories
        for place, name in enumerate(ordered):
            memory = self.open[name]
            is_idle = time.monotonic() - memory.used > self.limits.idle_seconds
            if (is_idle or place < too_many) and not memory.changes and name != besides:
                del self.open[name]

    def close(self) -> None:
        """Wait for the changes that have begun."""
        self._threads.shutdown()


def require_name(name: str) -> None:
    """Raise a Problem, 400, for what is no memory's name."""
    if not _NAME.fullmatch(name):
        raise Problem(
            400,
            "bad_name",
            "a memory's name has 1 to 64 lower-case letters, digits, - and _, and begins with a letter "
            "or a digit.",
        )
