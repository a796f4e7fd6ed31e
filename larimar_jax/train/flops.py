"""Floating-point operations of a traced function."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable, *arguments: Any) -> int:
    """Return the FLOPs of all matrix products of `function`, 2·m·n·k each, over all devices.

    Loops count as often as they run; of branches the most expensive one counts; factorisations,
    elementwise work and loops of unknown length count nothing and once. What the backward pass
    computes again counts again: count a model's utilisation without rematerialisation.

    Args:
        function: traceable.
        arguments: arrays or ShapeDtypeStructs.
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: core.Jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * depth
    if name == "cond":
        return max(_flops(branch.jaxpr) for branch in params["branches"])
    # Rules for derivatives and batching are other programs than the one that runs.
    rules = ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "rule")
    values = [value for key, value in params.items() if key not in rules]
    items = [x for v in values for x in (v if isinstance(v, (tuple, list)) else (v,))]
    bodies = [getattr(item, "jaxpr", item) for item in items]
    inner = sum(_flops(body) for body in bodies if hasattr(body, "eqns"))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        # Inside are one device's shapes; along axes that split nothing, devices repeat each other.
        axes = {*jax.tree.leaves([tuple(spec) for spec in params["in_specs"]])}
        return inner * math.prod(params["mesh"].shape[axis] for axis in axes)
    return inner
