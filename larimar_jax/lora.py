"""Low-rank changes of frozen kernels (LoRA, arXiv 2106.09685), on any linear map of either tower.

Those of the decoder belong to its memory: they act on tokens that a memory conditions, and the base LM
stays what it was, to the bit (`layers.Context.adapted`).
"""

import dataclasses
import re

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from larimar_jax.layers import Context, Dense
from larimar_jax.schema import Count, Regex


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank changes of frozen kernels: x W + scale · (x A) B, with A [in, rank], B [rank, out]."""

    rank: Count
    modules: Regex  # paths of linear maps, such as "^decoder/layers/attention/(query|value)$"
    scale: float = 1.0


# Names of the factors; a parameter path that ends in one of them is always trained.
FACTORS = ("lora_in", "lora_out")


class LoraDense(Dense):
    """x W + b + scale · (x A) B: a linear map with its parameters, and the factors A and B.

    The factors keep the leading axes of the kernel, so that each layer of a stack has its own. B is
    zero at first, so that the map starts unchanged. The change acts on `context.adapted` alone.
    """

    def __init__(self, base: Dense, rank: int, scale: float, rngs: nnx.Rngs):
        self.kernel, self.bias, self.dtype, self.scale = base.kernel, base.bias, base.dtype, scale
        *stack, inputs, outputs = self.kernel[...].shape
        draw = nnx.initializers.normal(inputs**-0.5)
        self.lora_in = nnx.Param(draw(rngs.params(), (*stack, inputs, rank), jnp.float32))
        self.lora_out = nnx.Param(jnp.zeros((*stack, rank, outputs), jnp.float32))

    def __call__(self, x: Float[Array, "*rows I"], context: Context) -> Float[Array, "*rows O"]:
        """Apply the map in its compute dtype."""
        y = super().__call__(x, context)
        if context.adapted is False:
            return y
        change = self.times(self.times(x, self.lora_in, context), self.lora_out, context)
        change = self.scale * change
        if context.adapted is not True:
            # Selected, not multiplied: other tokens stay untouched by what is not finite.
            change = jnp.where(context.adapted[..., None], change, jnp.zeros_like(change))
        return y + change


def attach(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Give every linear map whose path `config.modules` matches its two factors, in place.

    Raises:
      ValueError: the regex matches no linear map's path; names the paths that there are.
    """
    linears = _linears(model)
    chosen = [path for path in linears if re.search(config.modules, path)]
    if not chosen:
        raise ValueError(
            f"model.lora.modules {config.modules!r} is found in no linear map. There are:\n  "
            + "\n  ".join(sorted(linears))
        )
    for path in chosen:
        parent, name = linears[path]
        setattr(parent, name, LoraDense(getattr(parent, name), config.rank, config.scale, rngs))


def merge(model: nnx.Module) -> None:
    """Add every change to its kernel and leave plain linear maps, in place."""
    adapted = [(p, node) for p, node in nnx.iter_modules(model) if isinstance(node, LoraDense)]
    for path, node in adapted:
        *_, inputs, outputs = node.kernel[...].shape
        change = jnp.matmul(node.lora_in[...], node.lora_out[...], precision="highest")
        plain = nnx.eval_shape(
            lambda i=inputs, o=outputs, n=node: Dense(
                i, o, bias=n.bias is not None, dtype=n.dtype, rngs=nnx.Rngs(0)
            )
        )
        plain.kernel = nnx.Param(node.kernel[...] + node.scale * change.astype(node.kernel.dtype))
        plain.bias = node.bias
        setattr(*_holder(model, path), plain)


def is_factor(path: str) -> bool:
    """Return whether a '/'-joined parameter path is that of a factor."""
    return path.rpartition("/")[2] in FACTORS


def changed(paths) -> set[str]:
    """Return the paths of kernels and biases whose maps have factors: they are frozen."""
    owners = {path.rpartition("/")[0] for path in paths if is_factor(path)}
    return {path for path in paths if path.rpartition("/")[0] in owners and not is_factor(path)}


def _linears(model: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """Return the towers' linear maps by path: (the module that holds it, under which name).

    A decoder's untied head is left out: its logits come from the kernel itself (losses.py).
    """
    towers = {name: getattr(model, name) for name in ("encoder", "decoder")}
    return {
        f"{tower}/{'/'.join(map(str, path))}": _holder(module, path)
        for tower, module in towers.items()
        for path, node in nnx.iter_modules(module)
        if isinstance(node, Dense) and (tower, path) != ("decoder", ("head",))
    }


def _holder(module: nnx.Module, path: tuple) -> tuple[nnx.Module, str]:
    for part in path[:-1]:
        module = getattr(module, part)
    return module, path[-1]
