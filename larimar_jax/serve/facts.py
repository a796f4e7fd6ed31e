"""The facts of a memory: write, list, correct, forget, undo, export, import; its history and health."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from larimar_jax.serve import fact_lines, problems, tenants
from larimar_jax.serve.problems import Problem
from larimar_jax.serve.state import Served
from larimar_jax.serve.undo import Undo
from larimar_jax.serve.undo import undo as go_back
from larimar_jax.session import Session
from larimar_jax.session_file import Event, Fact

# Facts of a page.
_PAGE, _LONGEST_PAGE = 100, 1_000
# Fields of a source.
_MOST_SOURCE = 16


@dataclasses.dataclass(frozen=True)
class NewFact:
    """rephrasings: further prompts of the answer. source: who wrote it, from where; any fields."""

    prompt: str
    answer: str
    rephrasings: tuple[str, ...] = ()
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FactChange:
    """What is to differ; what is not there stays. source: who corrects it, from where; any fields."""

    prompt: str | None = None
    answer: str | None = None
    rephrasings: tuple[str, ...] | None = None
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)


async def write(request: Request) -> Response:
    """Write a fact, or a list of facts, one after the other; the first one makes the memory.

    Returns 201 and `data`: facts, each with its number `id`, `at`, `note` and `source`.
    """
    served, name = _addressed(request, "write")
    values = await problems.json_body(request, served.limits.body)
    if isinstance(values, dict) and "facts" in values:
        values = values["facts"]
    values = values if isinstance(values, list) else [values]
    _require_count(served, len(values))
    facts = [problems.read(NewFact, value) for value in values]
    return await _write(request, served, name, facts)


async def import_facts(request: Request) -> Response:
    """Write the facts of JSON lines, as `export` returns them; returns as a write does."""
    served, name = _addressed(request, "write")
    content = await problems.body(request, served.limits.body)
    try:
        parsed = fact_lines.parse(content, "the body")
    except ValueError as error:
        raise Problem(400, "invalid", str(error)) from error
    _require_count(served, len(parsed))
    return await _write(request, served, name, [problems.read(NewFact, fact) for fact in parsed])


async def _write(
    request: Request, served: Served, name: str, facts: Sequence[NewFact]
) -> JSONResponse:
    """Write facts that are all checked first; an error names how many of them were written."""
    for fact in facts:
        for text in (fact.prompt, fact.answer, *fact.rephrasings):
            served.require_text("a text of a fact", text)
    sources = [_source(request, served, fact.source) for fact in facts]

    def work(session: Session) -> list[dict[str, Any]]:
        written: list[Fact] = []
        for fact, source in zip(facts, sources, strict=True):
            try:
                _require_room(served, session)
                written.append(session.write(fact.prompt, fact.answer, fact.rephrasings, source))
            except Exception as error:
                problem = problems.explain(error)
                before = f"Fact {len(written) + 1} of {len(facts)}: " if len(facts) > 1 else ""
                after = f" The {len(written)} before it are written." if written else ""
                raise Problem(problem.status, problem.code, f"{before}{problem}{after}") from error
        return _described(session, written)

    return JSONResponse({"data": await served.memories.change(name, work, create=True)}, 201)


async def change(request: Request) -> Response:
    """Correct a fact.

    Returns the new one, which has a number of its own, and the former one's as `replaces` in its source.
    """
    served, name = _addressed(request, "write")
    number = _number(request)
    values = await problems.json_body(request, served.limits.body)
    changed = problems.read(FactChange, values)
    texts = (changed.prompt, changed.answer, *(changed.rephrasings or ()))
    for text in filter(lambda text: text is not None, texts):
        served.require_text("a text of a fact", text)
    source = _source(request, served, changed.source)

    def work(session: Session) -> dict[str, Any]:
        with session.together() as draft:
            before = _fact(draft, number)
            rephrasings = changed.rephrasings
            fact = draft.write(
                before.prompt if changed.prompt is None else changed.prompt,
                before.answer if changed.answer is None else changed.answer,
                before.rephrasings if rephrasings is None else rephrasings,
                dict(source, replaces=str(number)),
            )
            # One of the same prompt is replaced by the write itself.
            if any(known.id == number for known in draft.list()):
                draft.forget(number, source)
        return _described(session, [fact])[0]

    return JSONResponse(await served.memories.change(name, work))


async def forget(request: Request) -> Response:
    """Take a fact out of the memory.

    Returns a `certificate`, with `distance`: of the memory to one that never had the fact, relative; and
    `leverage`: the share of the fact's key that other facts explain.
    """
    served, name = _addressed(request, "write")
    number, is_purged = _number(request), request.query_params.get("purge") == "true"
    source = _source(request, served, {})

    def work(session: Session) -> dict[str, Any]:
        forgotten = session.forget(number, source)
        if is_purged:
            session.purge(number)
        return _finite(dict(distance=forgotten.distance, leverage=forgotten.leverage))

    certificate = await served.memories.change(name, work)
    return JSONResponse(dict(id=number, deleted=True, certificate=certificate))


async def undo(request: Request) -> Response:
    """Bring back the facts that were in memory after an earlier change, by one change more.

    Returns `to`, the number of that change; `forgotten`, numbers of facts; `written`, facts.
    """
    served, name = _addressed(request, "write")
    wanted = problems.read(Undo, await problems.json_body(request, served.limits.body))
    source = _source(request, served, {})

    def work(session: Session) -> dict[str, Any]:
        gone, back, last = go_back(session, wanted, source)
        written = _described(session, back)
        return dict(to=last, forgotten=[fact.id for fact in gone], written=written)

    return JSONResponse(await served.memories.change(name, work))


async def list_facts(request: Request) -> Response:
    """List facts in the order of writing.

    Returns `data`; `total`, how many have `q`; `has_more`, whether some follow.
    """
    served, name = _addressed(request, "read")
    limit = problems.integer(request, "limit", _PAGE, _LONGEST_PAGE)
    after = problems.integer(request, "after", 0, 10**12)
    words = request.query_params.get("q", "").casefold()
    session = (await served.memories.get(name)).session
    facts = [
        fact
        for fact in session.list()
        if any(words in text.casefold() for text in (*fact.prompts, fact.answer))
    ]
    rest = [fact for fact in facts if fact.id > after]
    page = _described(session, rest[:limit])
    return JSONResponse(dict(data=page, total=len(facts), has_more=len(rest) > limit))


async def show(request: Request) -> Response:
    """Show a fact, and the write that brought it."""
    served, name = _addressed(request, "read")
    session = (await served.memories.get(name)).session
    return JSONResponse(_described(session, [_fact(session, _number(request))])[0])


async def history(request: Request) -> Response:
    """List every write and forget in order.

    Returns `data`: events, each with its `number`, the number of its `change`, which may have several,
    its `kind`, `fact`, `at`, `note` and `source`; `total`; `has_more`.
    """
    served, name = _addressed(request, "read")
    limit = problems.integer(request, "limit", _PAGE, _LONGEST_PAGE)
    after = problems.integer(request, "after", 0, 10**12)
    events = (await served.memories.get(name)).session.history()
    page = [
        dict(number=number, **dataclasses.asdict(event))
        for number, event in enumerate(events[after : after + limit], after + 1)
    ]
    more = after + limit < len(events)
    return JSONResponse(dict(data=page, total=len(events), has_more=more))


async def health(request: Request) -> Response:
    """Show the memory's diagnostics: condition number, load, expected error, whether it is full."""
    served, name = _addressed(request, "read")
    session = (await served.memories.get(name)).session
    diagnostics = await served.memories.run(session.health)
    return JSONResponse(
        dict(
            _finite(diagnostics._asdict()),
            facts=len(session.list()),
            slots=served.model.memory.slots,
        )
    )


async def export(request: Request) -> Response:
    """Return the facts as JSON lines, which `import` and `larimar edit --file` take."""
    served, name = _addressed(request, "read")
    session = (await served.memories.get(name)).session
    writes = _writes(session)
    lines = fact_lines.lines(writes[fact.id] for fact in session.list())
    return Response("".join(lines), media_type="application/jsonl")


def _addressed(request: Request, right: str) -> tuple[Served, str]:
    """Return what all requests share, and the memory's name, which the caller has a right to."""
    name = request.path_params["name"]
    tenants.require_name(name)
    request.scope["caller"].require(right, name)
    return request.app.state.served, name


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers as JSON has them: one that is not finite is null."""
    return {n: v if abs(v) < float("inf") else None for n, v in numbers.items()}


def _number(request: Request) -> int:
    text = request.path_params["fact"]
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Problem(404, "unknown_fact", "a fact's number stands behind /facts/.")
    return int(text)


def _require_count(served: Served, count: int) -> None:
    if count > served.limits.facts:
        message = f"a request has at most {served.limits.facts:,} facts; got {count:,}."
        raise Problem(413, "too_many_facts", message)
    if not count:
        raise Problem(400, "no_facts", "there is no fact in the request.")


def _require_room(served: Served, session: Session) -> None:
    if len(session.list()) >= served.limits.memory_facts:
        message = f"the memory has {served.limits.memory_facts:,} facts, and no room for more."
        raise Problem(409, "memory_full", message)


def _source(request: Request, served: Served, fields: Mapping[str, str]) -> dict[str, str]:
    """Return who writes: the client's fields, and the token's name as `by`, where there are tokens."""
    if len(fields) > _MOST_SOURCE:
        raise Problem(400, "invalid", f"source has at most {_MOST_SOURCE} fields.")
    for name, text in fields.items():
        served.require_text("a field of source", name)
        served.require_text("a field of source", text, empty=True)
    caller = request.scope["caller"].name
    return dict(fields) | ({"by": caller} if caller else {})


def _fact(session: Session, number: int) -> Fact:
    for fact in session.list():
        if fact.id == number:
            return fact
    raise Problem(404, "unknown_fact", f"there is no fact {number} in this memory.")


def _writes(session: Session) -> dict[int, Event]:
    """Return the event that wrote each fact."""
    return {event.fact.id: event for event in session.history() if event.kind == "write"}


def _described(session: Session, facts: Sequence[Fact]) -> list[dict[str, Any]]:
    """Return facts with when, by whom and in place of what they were written."""
    writes = _writes(session)
    return [
        dataclasses.asdict(fact)
        | dict(at=writes[fact.id].at, note=writes[fact.id].note, source=writes[fact.id].source)
        for fact in facts
    ]
