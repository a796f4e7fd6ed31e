"""Benchmarks, one experiment per file: each file defines a `task.Task`."""

from collections.abc import Mapping
from typing import Any

from larimar_jax import registry


def tasks() -> Mapping[str, Any]:
    """Return every task in this folder, {name: class}, in the order of their names."""
    from larimar_jax.bench.task import Task

    classes = (cls for _, cls in registry.defined_classes(__name__))
    own = (cls for cls in classes if issubclass(cls, Task) and cls.evaluate is not Task.evaluate)
    return {cls.name: cls for cls in sorted(own, key=lambda cls: cls.name)}
