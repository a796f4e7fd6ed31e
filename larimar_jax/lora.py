"""Low-rank changes of frozen kernels (LoRA, arXiv 2106.09685), on any linear map of either tower.

Those of the decoder belong to its memory: they act on tokens that a memory conditions, and the base LM
stays what it was, to the bit (`layers.changing`).
"""

import re

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from larimar_jax import layers, products
from larimar_jax.config import LoraConfig

# Names of the factors; a parameter path that ends in one of them is always trained.
FACTORS = ("lora_in", "lora_out")


class LoraLinear(nnx.Module):
    """x W + b + scale · (x A) B: a linear map with its parameters, and the factors A and B.

    The factors keep the leading axes of the kernel, so that a stack of layers has a change for each.
    At the start B is zero, and the map is what it was. Under `layers.changing` only its tokens change.
    """

    def __init__(self, base: nnx.Linear, rank: int, scale: float, rngs: nnx.Rngs):
        self.kernel, self.bias, self.dtype = base.kernel, base.bias, base.dtype
        self.scale = scale
        *stack, inputs, outputs = self.kernel[...].shape
        draw = nnx.initializers.normal(inputs**-0.5)
        self.lora_in = nnx.Param(draw(rngs.params(), (*stack, inputs, rank), jnp.float32))
        self.lora_out = nnx.Param(jnp.zeros((*stack, rank, outputs), jnp.float32))

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        """Applies the map, in its compute dtype."""
        x = x.astype(self.dtype)

        def times(rows, parameter):
            return products.product(rows, parameter[...].astype(self.dtype))

        y = times(x, self.kernel)
        changed = layers.changed()
        if changed is not layers.NONE:
            change = self.scale * times(times(x, self.lora_in), self.lora_out)
            if changed is not layers.ALL:
                # Selected, not multiplied: others stay untouched by what is not finite.
                change = jnp.where(changed[..., None], change, jnp.zeros_like(change))
            y = y + change
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def attach(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives every linear map whose path the config's regex is found in its two factors, in place.

    Raises:
      ValueError: the regex is found in no linear map's path; names those that there are.
    """
    found = _linears(model)
    chosen = [path for path in found if re.search(config.modules, path)]
    if not chosen:
        raise ValueError(
            f"model.lora.modules {config.modules!r} is found in no linear map. There are:\n  "
            + "\n  ".join(sorted(found))
        )
    for path in chosen:
        parent, name = found[path]
        setattr(parent, name, LoraLinear(getattr(parent, name), config.rank, config.scale, rngs))


def merge(model: nnx.Module) -> None:
    """Adds every change to its kernel and leaves plain linear maps, in place."""
    for node, parent, name in _nodes(model, LoraLinear):
        *_, inputs, outputs = node.kernel[...].shape
        change = jnp.matmul(node.lora_in[...], node.lora_out[...], precision="highest")
        plain = nnx.eval_shape(
            lambda i=inputs, o=outputs, n=node: nnx.Linear(
                i, o, use_bias=n.bias is not None, dtype=n.dtype, rngs=nnx.Rngs(0)
            )
        )
        plain.kernel = nnx.Param(node.kernel[...] + node.scale * change.astype(node.kernel.dtype))
        plain.bias = node.bias
        setattr(parent, name, plain)


def is_factor(path: str) -> bool:
    """Whether a '/'-joined parameter path is that of a factor."""
    return path.rpartition("/")[2] in FACTORS


def changed(paths) -> set[str]:
    """Of these parameter paths, kernels and biases of maps that have factors: they are frozen."""
    owners = {path.rpartition("/")[0] for path in paths if is_factor(path)}
    return {path for path in paths if path.rpartition("/")[0] in owners and not is_factor(path)}


def _linears(model: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """Linear maps of the towers by path: (the module that holds it, under which name).

    A decoder's untied head is none of them: its logits are of the kernel itself (cross_entropy.py).
    """
    towers = {name: getattr(model, name) for name in ("encoder", "decoder")}
    return {
        f"{tower}/{'/'.join(map(str, path))}": _holder(module, path)
        for tower, module in towers.items()
        for path, node in nnx.iter_modules(module)
        if isinstance(node, nnx.Linear) and (tower, path) != ("decoder", ("head",))
    }


def _nodes(model: nnx.Module, kind: type) -> list[tuple[nnx.Module, nnx.Module, str]]:
    found = [(path, node) for path, node in nnx.iter_modules(model) if isinstance(node, kind)]
    return [(node, *_holder(model, path)) for path, node in found]


def _holder(module: nnx.Module, path: tuple) -> tuple[nnx.Module, str]:
    for part in path[:-1]:
        module = getattr(module, part)
    return module, path[-1]
