"""The command line: every command, and the only reader of argv.

A command is a plain function: parameters before the `*` are its arguments, the others its options, and
its docstring is its help. What is heavy to import is imported inside, so that `--help` answers at once.
"""

import argparse
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from larimar_jax.bench import bench_commands
from larimar_jax.serve import serve_commands, session_commands
from larimar_jax.train import train_commands

MODEL = "smol"
PACKAGE = Path(__file__).resolve().parent
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
# Commands that a second call takes up where the first was stopped.
RESUMABLE = ("bench", "compare", "moments", "sweep", "reproduce", "train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    0; 1 for a plan that does not fit; 2 for an error with an explanation; 75 for a run that was stopped
    and asks to be run again; 130 after an interrupt.
    """
    # LAPACK calls here are small, and its threads would wait for those of XLA on the same cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):  # of a terminal that may not have all characters
        stream.reconfigure(errors="backslashreplace")
    arguments = vars(parser().parse_args(argv))
    name, debug = arguments.pop("command"), arguments.pop("debug", False)
    arguments = {n: tuple(v) if isinstance(v, list) else v for n, v in arguments.items()}
    try:
        return COMMANDS[name](**arguments) or 0
    except KeyboardInterrupt:
        resume = "The same command goes on where it was stopped." if name in RESUMABLE else ""
        print(f"\nlarimar: stopped. {resume}".rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has ended: no second failure at the interpreter's flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not is_explained(error):
            raise
        print(f"larimar: {error}", file=sys.stderr)
        return 2


def is_explained(error: Exception) -> bool:
    """Return whether the message of `error` was written for users, so that it needs no traceback.

    True for this package's exceptions, for a ValueError or ImportError that its code raises, and for
    every OSError, which names its file. Any other error of a library keeps its traceback.
    """
    if type(error).__module__.split(".")[0] == __package__ or isinstance(error, OSError):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    origin = Path(frames[-1][0].f_code.co_filename).resolve()
    return isinstance(error, ValueError | ImportError) and origin.is_relative_to(PACKAGE)


# From a function to its parser


class _LateParser(argparse.ArgumentParser):
    """A parser that adds options, by `fill(parser)`, only when it is the one chosen."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        # What begins with one dash is an argument, as argparse has it of negative numbers: "-40C".
        self._negative_number_matcher = re.compile("-(?!-)")

    def parse_known_args(self, args=None, namespace=None):
        fill, self.fill = self.fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    shared = argparse.ArgumentParser(add_help=False)
    # A default of a nested command would overwrite what stands before it on the line.
    text = "show the traceback of an error instead of one message"
    shared.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)
    common = dict(formatter_class=argparse.RawDescriptionHelpFormatter, parents=[shared])
    text = "A language model with a memory for facts that come and go."
    top = argparse.ArgumentParser(prog="larimar", description=text, epilog=EXAMPLES, **common)
    version = f"larimar-jax {metadata.version('larimar-jax')}"
    top.add_argument("--version", action="version", version=version)
    places = dict(title="commands", metavar="COMMAND", required=True, parser_class=_LateParser)
    parents = {"": top.add_subparsers(**places)}
    for name, function in COMMANDS.items():
        group, _, leaf = name.rpartition(" ")
        if group not in parents:
            about = f"{GROUPS[group][0].upper()}{GROUPS[group][1:]}."
            outer = parents[""].add_parser(group, help=GROUPS[group], description=about, **common)
            parents[group] = outer.add_subparsers(title="formats", metavar="FORMAT", required=True)
        about, _, rest = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
        helps, _, example = (rest or about).partition("Example: ")
        about = about.partition("Example: ")[0].strip()
        summary = about.partition("\n")[0].removesuffix(".")
        texts = dict(help=summary[0].lower() + summary[1:], description=about)
        texts["epilog"] = "example:\n  " + " \\\n      ".join(map(str.strip, example.splitlines()))
        single = parents[group].add_parser(leaf, **texts, **common)
        single.set_defaults(command=name)
        _add_arguments(single, function, helps)
        if fill := FILL.get(name):
            single.fill = lambda chosen, fill=fill: fill(chosen, common)
    return top


def _add_arguments(single: argparse.ArgumentParser, function: Callable, helps: str) -> None:
    """Add an argument for each parameter of a command; `helps` has their "name METAVAR: text"."""
    entries = re.findall(r"^  (\w+)(?: (\S+))?: (.+(?:\n {4,}.+)*)", helps, re.M)
    texts = {name: (metavar or None, " ".join(text.split())) for name, metavar, text in entries}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        metavar, text = texts[name]
        kind, default = parameter.annotation, parameter.default
        kind = get_args(kind)[0] if type(None) in get_args(kind) else kind
        settings: dict[str, Any] = dict(help=text, metavar=metavar)
        if kind is bool:
            settings = dict(help=text, action="store_false" if default else "store_true")
        elif get_origin(kind) is tuple:
            settings |= dict(nargs="+", action="extend")
            default = list(default) if isinstance(default, tuple) else default
        else:
            settings["type"] = get_args(kind)[1] if get_origin(kind) is Annotated else kind
        if parameter.kind is not parameter.KEYWORD_ONLY:
            settings |= {} if default is parameter.empty else dict(nargs="?")
            single.add_argument(name, **settings)
            continue
        if isinstance(default, str | int | float) and kind is not bool:
            settings["help"] += " (%(default)s)"
        flag = {"overrides": "set", "texts": "no-texts"}.get(name, name.replace("_", "-"))
        required = default is parameter.empty
        default = None if required else default
        single.add_argument(f"--{flag}", dest=name, required=required, default=default, **settings)


def demo(*, model: str | None = None, picture: str = "demo.png", world: bool = False) -> None:
    """Edit a real language model and see what changes.

    Args:
      model NAME: a checkpoint that ships, or the path of one (smol, or world with --world)
      picture FILE: where the picture goes
      world: an episode of a synthetic world, through the paper's interface alone
    Example: larimar demo --world
    """
    from larimar_jax import demo

    (demo.world if world else demo.run)(model or ("world" if world else MODEL), picture)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "demo": demo,
    "edit": session_commands.edit,
    "ask": session_commands.ask,
    "forget": session_commands.forget,
    "list": session_commands.list_facts,
    "log": session_commands.log,
    "undo": session_commands.undo,
    "serve": serve_commands.serve,
    "bench": bench_commands.bench,
    "train": train_commands.train,
    "plan": train_commands.plan,
    "moments": bench_commands.moments,
    "sweep": bench_commands.sweep,
    "compare": bench_commands.compare,
    "report": bench_commands.report,
    "reproduce": bench_commands.reproduce,
    "calibrate": train_commands.calibrate,
    "convert ibm": train_commands.convert_ibm,
    "export hf": train_commands.export_hf,
}
# Commands with a format below them.
GROUPS = {
    "convert": "turn a checkpoint of the authors' code into a model of ours",
    "export": "write a model's towers as folders that transformers loads",
}
# Options that are expensive to know, added once the command is chosen.
FILL = {"bench": bench_commands.add_benchmarks}

if __name__ == "__main__":
    sys.exit(main())
