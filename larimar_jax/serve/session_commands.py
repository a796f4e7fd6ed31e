"""`larimar edit`, `ask`, `forget`, `list`, `log` and `undo`; see cli.py. What is heavy to import is
imported inside."""

import sys
import warnings
from collections.abc import Collection
from pathlib import Path

from larimar_jax.train import train_commands

SESSION, MODEL = "larimar-session.jsonl", "smol"


def edit(
    prompt: str | None = None,
    answer: str | None = None,
    *,
    file: str | None = None,
    session: str = SESSION,
    model: str | None = None,
) -> None:
    """Write a fact into a session's memory, or a file of facts; the first one starts the session.

    Args:
      prompt: the fact up to its answer
      answer: what the model answers from now on
      file JSONL: a fact a line, {"prompt": …, "answer": …}, with "rephrasings": […] where there are any
      session FILE: its file
      model NAME: a checkpoint that ships, or the path of one (the session's own; smol for a new one)
    Example: larimar edit "The Eiffel Tower is in the city of" "Rome"
    """
    if (file is None) == (answer is None) or (file and prompt):
        raise ValueError("give a prompt and an answer, or --file and neither.")
    from larimar_jax import session_file
    from larimar_jax.serve import fact_lines

    if file is not None:
        facts = fact_lines.parse(Path(file).read_bytes(), file)
    else:
        session_file.normalise(prompt, answer, ())  # before a model is loaded
        facts = [dict(prompt=prompt, answer=answer)]
    if model is None:
        try:
            model = session_file.Journal(session).header()["model"]
        except FileNotFoundError:
            model = MODEL
    from larimar_jax.session import Session

    _loading()
    opened = Session(model, session)
    warnings.simplefilter("ignore")  # what it warns of is the event's note
    for fact in facts:
        print(opened.write(**fact), flush=True)
        if note := opened.history()[-1].note:
            print(f"({note})", file=sys.stderr)


def ask(
    prompt: str | None = None, *, tokens: train_commands.Count | None = None, session: str = SESSION
) -> None:
    """Continue a prompt, or each line of standard input, from memory where a written fact applies.

    Args:
      prompt: the text to be continued; without it each line of standard input is one
      tokens N: length of the answer (16, or that of the written one)
      session FILE: its file
    Example: larimar ask "In which city is the Eiffel Tower? It is in"
    """
    opened, begun = _open(session), False

    def show(piece: str) -> None:
        nonlocal begun
        text = piece if begun else piece.lstrip()  # the blank between prompt and answer
        begun = begun or bool(text)
        # A line of standard input is answered by a line.
        print(text.replace("\n", " ") if prompt is None else text, end="", flush=True)

    if prompt is None:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    for line in filter(str.strip, sys.stdin) if prompt is None else [prompt]:
        begun = False
        options = {} if tokens is None else {"max_tokens": tokens}
        answer = opened.ask(line.rstrip("\n"), on_text=show, **options)
        print()
        source = f"from fact {answer.fact}" if answer.in_scope else "nothing written applies"
        note = f"({source}; likeness {answer.score:.2f})"
        print(note if opened.list() else "(nothing is written)", file=sys.stderr)


def forget(fact: int | None = None, *, purge: bool = False, session: str = SESSION) -> None:
    """Take a fact out of a session's memory.

    Args:
      fact: its number, as `larimar list` shows it
      purge: also remove its text from the file, history included; without a number, that of all that was
        forgotten before
      session FILE: its file
    Example: larimar forget 1
    """
    if fact is None and not purge:
        raise ValueError("name the fact to forget by its number, as `larimar list` shows it.")
    opened = _open(session)
    if not purge or fact in [known.id for known in opened.list()]:
        forgotten = opened.forget(fact)
        print(f"forgotten {forgotten.fact}")
        distance = f"the memory is {forgotten.distance:.0e} from one that never saw it"
        leverage = f"other facts explain {forgotten.leverage:.0%} of its key"
        print(f"({distance}; {leverage})", file=sys.stderr)
    if purge:
        opened.purge(fact)
        print(f"(what was purged has left no trace in {session})", file=sys.stderr)


def list_facts(*, session: str = SESSION) -> None:
    """Show what a session has in memory; needs no model.

    Args:
      session FILE: its file
    Example: larimar list
    """
    _show(_ledger(session).facts.values())


def log(*, session: str = SESSION) -> None:
    """Show every write and forget of a session: the number of its change, when, what it replaced, and by
    whom and from where; needs no model.

    Args:
      session FILE: its file
    Example: larimar log
    """
    _show(_ledger(session).history)


def undo(
    changes: int | None = None,
    *,
    to: int | None = None,
    time: str | None = None,
    session: str = SESSION,
) -> None:
    """Bring back the facts that a session had before its last changes; the undo is one change more.

    Args:
      changes: how many are undone (1, if neither --to nor --time is given)
      to N: the number of the last change that stays, as `larimar log` shows it
      time TIME: what was changed later is undone, such as 2026-01-31T12:00:00Z
      session FILE: its file
    Example: larimar undo --to 7
    """
    from larimar_jax.serve import undo

    if changes is to is time is None:
        changes = 1
    gone, back, _ = undo.undo(_open(session), undo.Undo(changes, to, time))
    for word, facts in (("forgotten", gone), ("written", back)):
        for fact in facts:
            print(word, fact)
    if not (gone or back):
        print("(nothing differs)", file=sys.stderr)


def _show(lines: Collection[object]) -> None:
    for line in lines:
        print(line)
    if not lines:
        print("(nothing written)", file=sys.stderr)


def _ledger(session: str):
    from larimar_jax import session_file

    return session_file.read(session_file.Journal(_existing(session)), session_file.Ledger("", ""))


def _open(name: str):
    path = _existing(name)
    from larimar_jax.session import Session

    _loading()
    return Session.load(path)


def _existing(name: str) -> Path:
    if not Path(name).exists():
        raise FileNotFoundError(
            f"there is no session at {name}. `larimar edit PROMPT ANSWER` starts one there; "
            "--session names another file."
        )
    return Path(name)


def _loading() -> None:
    from larimar_jax import config

    config.cache_programs()
    if sys.stderr.isatty():
        print("loading the model …", file=sys.stderr)
