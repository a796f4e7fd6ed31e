"""How a session of a thousand mixed facts answers, and how long its calls take: docs/session.md.

    python tests/long/session_of_many.py ZSRE --count 1000

Half of the facts are about people, half are of ZSRE, a file of KnowEdit, on which nothing was trained.
With --session FILE a run goes on.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from session_rates import ATTRIBUTES, FAMILY, FIRST

from larimar_jax.memory.finite import NotKept
from larimar_jax.session import Session

BATCH = 50


def facts(path: Path, count: int) -> list[tuple[str, str, str]]:
    """Return (prompt, answer, the prompt in other words) of distinct prompts."""
    names = (f"{a} {b}" for b in FAMILY for a in FIRST)
    people = [
        (written.format(name), answers.split()[number % len(answers.split())], other.format(name))
        for number, name in enumerate(names)
        for written, other, answers in ATTRIBUTES
    ]
    records = json.loads(path.read_text(encoding="utf-8"))
    zsre = [(r["prompt"], r["target_new"], r["rephrase_prompt"]) for r in records]
    return [*people[: count // 2], *{fact[0]: fact for fact in zsre}.values()][:count]


def main(path: Path, count: int, session: Path | None) -> None:
    warnings.simplefilter("ignore")
    model, refused, seconds = Session("smol").model, 0, []
    file = session or Path(tempfile.mkdtemp()) / "session.jsonl"
    session = Session(model, file)
    before = {fact.prompt for fact in session.list()}
    for prompt, answer, _ in (mixed := facts(path, count)):
        if prompt in before:
            continue
        begin = time.process_time()
        try:
            session.write(prompt, answer)
        except NotKept as error:
            refused += 1
            print("refused:", error)
        seconds.append(time.process_time() - begin)
    answers = {fact.prompt: (fact.id, fact.answer) for fact in session.list()}
    print(f"{len(answers)} facts, {refused} refused")
    for kind, place in (("verbatim", 0), ("in other words", 2)):
        asks = [(fact[place], *answers[fact[0]]) for fact in mixed if fact[0] in answers]
        results = []
        for start in range(0, len(asks), BATCH):
            results += session.ask_all([ask[0] for ask in asks[start : start + BATCH]])
        matched = [have.fact == own for have, (_, own, _) in zip(results, asks, strict=True)]
        pairs = zip(results, asks, strict=True)
        right = [h.fact == own and h.text.strip() == answer for h, (_, own, answer) in pairs]
        inside = sum(have.in_scope for have in results)
        print(
            f"{kind}: {inside} in scope of {len(asks)}, own fact {sum(matched)}, right {sum(right)}",
            flush=True,
        )

    def report(call: str, seconds: list[float]) -> None:
        median = 1e3 * statistics.median(seconds)
        print(f"{call}: {median:.0f} ms of CPU time, median of {len(seconds)}")

    def timed(function, *arguments) -> float:
        begin = time.process_time()
        function(*arguments)
        return time.process_time() - begin

    if seconds:
        report("write", seconds[-50:])
    report("ask, verbatim", [timed(session.ask, fact[0]) for fact in mixed[:20]])
    report("open", [timed(Session, model, file) for _ in range(3)])
    report("forget", [timed(session.forget, own) for own, _ in [*answers.values()][:5]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--session", type=Path)
    main(**vars(parser.parse_args()))
