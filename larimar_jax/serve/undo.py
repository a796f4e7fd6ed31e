"""Undo: a session's memory goes back to the facts that it held after an earlier change."""

import dataclasses
import datetime
from collections.abc import Sequence

from larimar_jax.session import Session
from larimar_jax.session_file import Event, Fact, Source


class NoSuchChange(ValueError):
    """A point of the history that is none, or named in no way or several."""


@dataclasses.dataclass(frozen=True)
class Undo:
    """Where to go back to, by one of these. changes: so many of the last ones are undone. to: the number
    of the last change that stays; 0 is the beginning. time: what was changed later is undone, in ISO
    8601; without an offset it is UTC."""

    changes: int | None = None
    to: int | None = None
    time: str | None = None

    def last(self, history: Sequence[Event]) -> int:
        """Return the number of the last change that stays.

        Raises:
          NoSuchChange.
        """
        if sum(value is not None for value in dataclasses.astuple(self)) != 1:
            raise NoSuchChange("give one of changes, to and time.")
        if self.time is not None:
            try:
                time = datetime.datetime.fromisoformat(self.time)
            except ValueError as error:
                message = f"{self.time!r} is no time such as 2026-01-31T12:00:00Z."
                raise NoSuchChange(message) from error
            time = time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
            earlier = (e.change for e in history if datetime.datetime.fromisoformat(e.at) <= time)
            return max(earlier, default=0)
        numbers = [0, *sorted({event.change for event in history})]
        if self.changes is not None and 1 <= self.changes < len(numbers):
            return numbers[-1 - self.changes]
        if self.to is not None and 0 <= self.to <= numbers[-1]:
            return self.to
        last = f", the last of which is number {numbers[-1]}" if history else ""
        raise NoSuchChange(f"the history has {len(numbers) - 1} changes{last}.")


def undo(
    session: Session, wanted: Undo, source: Source = None
) -> tuple[list[Fact], list[Fact], int]:
    """Go back by one change more, and return the facts that it forgot, those that it wrote, and the
    number of the change that it went back to.

    A fact that comes back has a number of its own; its source names the former one as `restores`.

    Raises:
      NoSuchChange.
      As `Session.write` and `forget`; nothing is changed then.
    """
    with session.together() as draft:
        history = draft.history()
        last, then, now = wanted.last(history), {}, draft.list()
        for event in history:
            if event.change <= last:
                then.pop(event.fact.id, None)
                if event.kind == "write":
                    then[event.fact.id] = event
        stays = {(event.fact.prompts, event.fact.answer) for event in then.values()}
        gone = [fact for fact in now if (fact.prompts, fact.answer) not in stays]
        is_there = {(fact.prompts, fact.answer) for fact in now}
        for fact in gone:
            draft.forget(fact.id, source)
        back = []
        for event in then.values():
            fact = event.fact
            if (fact.prompts, fact.answer) not in is_there:
                origin = {**event.source, **(source or {}), "restores": str(fact.id)}
                back.append(draft.write(fact.prompt, fact.answer, fact.rephrasings, origin))
    return gone, back, last
