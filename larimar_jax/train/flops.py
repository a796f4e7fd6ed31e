"""How many floating-point operations a function's matrix products take, read off its jaxpr."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *arguments: Any) -> int:
    """FLOPs of all matrix products of `function`, 2·m·n·k each, over all devices together.

    Loops count as often as they run; of branches the most expensive one counts; factorisations,
    elementwise work and loops of unknown length count nothing and once. What the backward pass
    computes again counts again: for a model's utilisation, count it without rematerialisation.

    Args:
        function: traceable.
        arguments: arrays or ShapeDtypeStructs.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * depth
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inner = sum(_count(body) for body in _bodies(params))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        # Inside are one device's shapes; along axes that split nothing, devices repeat each other.
        split = {axis for spec in params["in_specs"] for axis in _axes(spec)}
        return inner * math.prod(params["mesh"].shape[axis] for axis in split)
    return inner


def _axes(spec: jax.P) -> list[str]:
    parts = (part if isinstance(part, tuple) else (part,) for part in spec)
    return [axis for part in parts for axis in part if axis is not None]


def _bodies(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs that an equation runs, once each."""
    found = []
    for key, value in params.items():
        # Rules for derivatives and batching are other programs than the one that runs.
        if key in ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "rule"):
            continue
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found
