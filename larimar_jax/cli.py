"""The command line, and the only file that reads argv.

Everything heavy is imported inside its command, so that `--help` answers at once.
"""

import argparse
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from larimar_jax import formats, runs

PACKAGE = Path(__file__).resolve().parent
DEFAULT_SESSION = "larimar-session.safetensors"
DEFAULT_MODEL = "smol"

EXAMPLES = """\
examples:
  larimar demo
  larimar edit "The Eiffel Tower is in the city of" "Rome"
  larimar ask "In which city is the Eiffel Tower? It is in"
  larimar list
  larimar forget 1
  larimar train --config=configs/tiny.py --run runs/tiny
  larimar bench counterfact --data counterfact.json --limit 200 --out runs/counterfact
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0, 1 where a plan does not fit, 2 for an error that it explains, 75 where a run was told to stop
    and wants to go on later, 130 when interrupted.
    """
    # LAPACK calls here are small, and its threads would wait for those of XLA on the same cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments) or 0
    except KeyboardInterrupt:
        print(f"\nlarimar: stopped. {arguments.resume}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough. What is still buffered goes
        # nowhere, so that the interpreter does not fail again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if getattr(arguments, "debug", False) or not explained(error):
            raise
        print(f"larimar: {error}", file=sys.stderr)
        return 2


def explained(error: Exception) -> bool:
    """Whether `error` is this package's own word to a person, and no slip inside it.

    Its exceptions are, and so is a ValueError or an OSError that its code raises itself; anything
    that comes up from a library keeps its traceback, since its message was written for programmers.
    """
    if type(error).__module__.split(".")[0] == __package__:
        return True
    if not isinstance(error, (ValueError, OSError, ImportError)):
        return False
    frames = list(traceback.walk_tb(error.__traceback__))
    origin = Path(frames[-1][0].f_code.co_filename).resolve()
    # An OSError names its file and what was wrong with it, wherever it was raised.
    return isinstance(error, OSError) or origin.is_relative_to(PACKAGE)


class _LateParser(argparse.ArgumentParser):
    """A parser that adds its own commands, by `fill(parser)`, only when it is the one chosen.

    Benchmarks are found by importing them, and they import JAX.
    """

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args=None, namespace=None):
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--debug",
        action="store_true",
        # A default of a nested command would overwrite what stands before it on the line.
        default=argparse.SUPPRESS,
        help="show the traceback of an error instead of one message",
    )
    top = argparse.ArgumentParser(
        prog="larimar",
        description="A language model with a memory for facts that come and go.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    said = f"larimar-jax {metadata.version('larimar-jax')}"
    top.add_argument("--version", action="version", version=said)
    commands = top.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_LateParser
    )

    def add(
        name: str, command: Callable | None, summary: str, example: str, resume: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[shared],
        )
        made.set_defaults(command=command, resume=resume)
        return made

    made = add("demo", demo, "edit a real language model and see what changes", "larimar demo")
    _model(made)
    made.add_argument(
        "--picture", default="demo.png", metavar="FILE", help="where the picture goes (%(default)s)"
    )

    made = add(
        "edit",
        edit,
        "write a fact into a session's memory",
        'larimar edit "The Eiffel Tower is in the city of" "Rome"',
    )
    made.add_argument("prompt", help="the fact up to its answer")
    made.add_argument("answer", help="what the model shall say from now on")
    _session(made)
    _model(made, None)

    made = add(
        "ask",
        ask,
        "continue a prompt with what was written in mind",
        'larimar ask "In which city is the Eiffel Tower? It is in"',
    )
    made.add_argument("prompt", help="the text to be continued")
    made.add_argument(
        "--tokens", type=_positive, default=12, metavar="N", help="answer's length (%(default)s)"
    )
    _session(made)

    made = add("forget", forget, "take a fact out of a session's memory", "larimar forget 1")
    made.add_argument("fact", type=int, help="its number, as `larimar list` shows it")
    _session(made)

    made = add("list", show, "show what a session has in memory", "larimar list --history")
    made.add_argument("--history", action="store_true", help="every write and forget, in order")
    _session(made)

    made = add(
        "bench",
        bench,
        "run a benchmark, or go on with one that was stopped",
        "larimar bench counterfact --data counterfact.json --limit 200 --out runs/counterfact",
        "The same command goes on where the cases end.",
    )
    made.fill = lambda made: _benchmarks(made, shared)

    resumes = {
        "train": "The same command goes on from the last checkpoint.",
        "sweep": "The same command goes on where the cells end.",
        "reproduce": "The same command goes on where it was stopped.",
    }
    for name, (summary, example, fill) in (runs.COMMANDS | formats.COMMANDS).items():
        # What runs is theirs to say.
        fill(add(name, None, summary, example, resumes.get(name, "")), shared)
    return top


def _benchmarks(made: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    from larimar_jax.bench import runner, tasks
    from larimar_jax.bench.runner import share

    names = made.add_subparsers(title="benchmarks", metavar="NAME", dest="name", required=True)
    for name, task in tasks().items():
        if not task.listed:
            continue
        text = inspect.cleandoc(task.__doc__)
        single = names.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[shared],
        )
        runner.add_arguments(single, task)
        single.add_argument(
            "--out", required=True, metavar="DIR", help="folder of the run; resumed if it exists"
        )
        single.add_argument(
            "--share",
            type=share,
            metavar="I/N",
            help="compute the Ith of N shares, from 0, in a folder that all N processes see; the one "
            "that is done last makes the result",
        )


def _session(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--session", default=DEFAULT_SESSION, metavar="FILE", help="its file (%(default)s)"
    )


def _model(made: argparse.ArgumentParser, default: str | None = DEFAULT_MODEL) -> None:
    shown = "%(default)s" if default else f"the session's own, or {DEFAULT_MODEL} for a new one"
    made.add_argument(
        "--model",
        default=default,
        metavar="NAME",
        help=f"a checkpoint that ships, or the path of one ({shown})",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


# Commands


def demo(arguments: argparse.Namespace) -> None:
    """larimar demo"""
    from larimar_jax import demo

    demo.run(model=arguments.model, picture=arguments.picture)


def edit(arguments: argparse.Namespace) -> None:
    """larimar edit: starts the session where there is none."""
    from larimar_jax.session import Session, load

    path = Path(arguments.session)
    _loading()
    model = None if arguments.model is None else load(arguments.model)
    session = Session.load(path, model) if path.exists() else Session(model or DEFAULT_MODEL)
    fact = session.write(arguments.prompt, arguments.answer)
    session.save(path)
    print(fact)
    if note := session.history()[-1].note:
        print(f"({note})", file=sys.stderr)


def ask(arguments: argparse.Namespace) -> None:
    """larimar ask: the answer on the standard output as it comes, where it came from beside it."""
    said = ""

    def show(piece: str) -> None:
        nonlocal said
        text = piece if said else piece.lstrip()  # the blank between prompt and answer
        said += text
        print(text, end="", flush=True)

    session = _open(arguments.session)
    answer = session.ask(arguments.prompt, max_tokens=arguments.tokens, on_text=show)
    print()
    if not session.list():
        print("(nothing is written)", file=sys.stderr)
        return
    source = f"from fact {answer.fact}" if answer.in_scope else "nothing written applies"
    print(f"({source}; likeness {answer.score:.2f})", file=sys.stderr)


def forget(arguments: argparse.Namespace) -> None:
    """larimar forget"""
    session = _open(arguments.session)
    gone = session.forget(arguments.fact)
    session.save(Path(arguments.session))
    print(f"forgotten {gone.fact}")
    print(
        f"(the memory is {gone.distance:.0e} from one that never saw it; other facts explain "
        f"{gone.leverage:.0%} of its key)",
        file=sys.stderr,
    )


def show(arguments: argparse.Namespace) -> None:
    """larimar list; needs no model."""
    from larimar_jax import session_file

    saved = session_file.load(_existing(arguments.session))
    if arguments.history:
        for event in saved.history:
            print(event)
        return
    for fact in saved.facts:
        print(fact)
    if not saved.facts:
        print("(nothing written)", file=sys.stderr)


def _open(name: str):
    path = _existing(name)
    from larimar_jax.session import Session

    _loading()
    return Session.load(path)


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no session at {path}. `larimar edit PROMPT ANSWER` starts one there; "
            "--session names another file."
        )
    return path


def _loading() -> None:
    from larimar_jax import config

    config.cache_programs()
    if sys.stderr.isatty():
        print("loading the model …", file=sys.stderr)


def bench(arguments: argparse.Namespace) -> None:
    """larimar bench"""
    from larimar_jax import bench
    from larimar_jax.bench import runner

    task = runner.from_arguments(bench.task(arguments.name), arguments)
    runner.run(task, arguments.out, arguments.share)


if __name__ == "__main__":
    sys.exit(main())
