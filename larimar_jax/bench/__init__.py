"""Benchmarks, one experiment per file: each file defines a `task.Task`."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any


def tasks() -> Mapping[str, Any]:
    """Return every task in this folder, {name: class}, in the order of their names."""
    from larimar_jax.bench.task import Task

    classes = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Task)
                and value.__module__ == module.__name__
                and value.evaluate is not Task.evaluate
            ):
                classes[value.name] = value
    return dict(sorted(classes.items()))
