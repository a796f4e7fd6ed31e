"""Facts as lines of JSON: prompt, answer, and if any a list of rephrasings and fields of a source."""

import json
from collections.abc import Iterable
from typing import Any

from larimar_jax.session_file import Event, NotText, normalise, require_text

_NEEDED, _FIELDS = {"prompt", "answer"}, {"prompt", "answer", "rephrasings", "source"}


def parse(content: bytes, name: str) -> list[dict[str, Any]]:
    """Return the facts of a file's content, as what `Session.write` takes.

    Raises:
      ValueError: a line of the file `name` is no fact.
    """
    facts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fact = json.loads(line.decode("utf-8-sig"))
            if not isinstance(fact, dict) or not _NEEDED <= set(fact) <= _FIELDS:
                raise ValueError(
                    'a fact is {"prompt": …, "answer": …}, with "rephrasings": […] and "source": {…} '
                    "if any."
                )
            normalise(fact["prompt"], fact["answer"], fact.get("rephrasings", ()))
            _require_source(fact.get("source"))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{name}, line {number}: {error} Nothing is written.") from error
        facts.append(fact)
    return facts


def _require_source(source: Any) -> None:
    """Raise NotText or NotUnicode where `source` is neither None nor a dict of texts."""
    if not isinstance(source, dict | None):
        raise NotText(f"source has fields, such as {{'by': 'Anna'}}; got {source!r}.")
    for name, text in (source or {}).items():
        require_text(f"source {name!r}", text)


def lines(writes: Iterable[Event]) -> Iterable[str]:
    """Yield the lines of facts, by the events that wrote them; `parse` takes them back."""
    for event in writes:
        fact = dict(prompt=event.fact.prompt, answer=event.fact.answer)
        if event.fact.rephrasings:
            fact["rephrasings"] = event.fact.rephrasings
        if event.source:
            fact["source"] = event.source
        yield json.dumps(fact, ensure_ascii=False) + "\n"
