"""Benchmarks, one experiment per file: each defines `arguments` and `experiment`.

`arguments(parser)` declares the command line of `larimar bench <file name>`; `experiment(args)`
makes what `runner.run` takes. The first line of the file's docstring is its help.
"""

from collections.abc import Mapping
from types import ModuleType

from larimar_jax import registry


def benchmarks() -> Mapping[str, ModuleType]:
    """Every experiment in this folder, by file name."""
    return registry.scan(__name__, "arguments", "experiment")


def benchmark(name: str) -> ModuleType:
    """The experiment file of that name; ValueError lists the known ones."""
    return registry.lookup(benchmarks(), name, "benchmark")
