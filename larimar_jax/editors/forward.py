"""The decoder with hands on its MLPs' last maps: their inputs and outputs, and changes of outputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from larimar_jax import layers
from larimar_jax.decoders.decoder import Decoder, embed
from larimar_jax.layers import Context
from larimar_jax.packing import LanguageModel, steps_bucket

# (key k, output y) of an MLP's last map → the output that counts.
Rewrite = Callable[[Float[Array, "B T I"], Float[Array, "B T D"]], Float[Array, "B T D"]]


class Tapped(nnx.Module):
    """A stack of linear maps, of which one layer's output is rewritten."""

    def __init__(self, down: nnx.Module, layer: int, depth: int, rewrite: Rewrite):
        self.down, self.rewrite = down, rewrite
        self.is_here = nnx.Variable(jnp.arange(depth) == layer)

    def __call__(self, key: Float[Array, "B T I"], context: Context) -> Float[Array, "B T D"]:
        """Apply a layer's map."""
        output = self.down(key, context)
        return jax.lax.cond(self.is_here[...], self.rewrite, lambda _, y: y, key, output)


def tap(decoder: Decoder, layer: int, rewrite: Rewrite) -> Decoder:
    """Return the decoder with a layer's outputs rewritten; for use within one trace."""
    copy = nnx.merge(*nnx.split(decoder))
    copy.layers.down = Tapped(copy.layers.down, layer, decoder.config.depth, rewrite)
    return copy


def run_layers(
    decoder: Decoder, tokens: Int[Array, "B T"], depth: int, pick: Callable[..., Any]
) -> Any:
    """Return `pick(k, y, h)` of the first `depth` layers, stacked: key, output and the hidden states
    behind the layer, [B T …] each, of rows of tokens without memory, cache or padding on the left."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = embed(decoder.word, tokens, None, decoder.dtype)
    if hasattr(decoder, "position"):
        x = x + layers.look_up(decoder.position, index).astype(x.dtype)
    distance = index[:, :, None] - index[:, None, :]
    rotation, windows = decoder.rotation(index), decoder.windows()

    def call(block, x, window):
        near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        down, parts = block.down, []

        def record(key, context):
            parts.extend((key, down(key, context)))
            return parts[1]

        block.down = record
        x, _ = block(x, Context(near, rotation, adapted=False))
        return x, pick(*parts, x)

    graph, state = nnx.split(decoder.layers)
    first = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[:depth], state))
    windows = None if windows is None else jnp.asarray(windows[:depth])
    return layers.scan_layers(first, call, x, windows, remat="none")[1]


class Places(NamedTuple):
    """Of B tokens in L layers: keys, outputs of the MLP, hidden states behind the layer; float32."""

    key: Float[np.ndarray, "L B I"]
    output: Float[np.ndarray, "L B D"]
    hidden: Float[np.ndarray, "L B D"]


def at_tokens(
    model: LanguageModel, rows: Sequence[Sequence[int]], at: Sequence[int], depth: int
) -> Places:
    """Return what the first `depth` layers have at one token of each of B rows, B > 0."""
    tokens = padded(rows)
    places = np.zeros(len(tokens), np.int32)
    places[: len(at)] = at
    graph, state = nnx.split(model.decoder)
    picked = _at_tokens(graph, state, tokens, places, depth)
    return Places(*(np.asarray(array, np.float32)[:, : len(rows)] for array in picked))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _at_tokens(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    places: Int[Array, " B"],
    depth: int,
) -> tuple[Float[Array, "L B I"], Float[Array, "L B D"], Float[Array, "L B D"]]:
    rows = jnp.arange(len(places))

    def pick(*arrays):
        return tuple(array[rows, places] for array in arrays)

    return run_layers(nnx.merge(graph, state), tokens, depth, pick)


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Int[np.ndarray, "B T"]:
    """Return rows of tokens with padding on the right and below, so that few shapes are compiled."""
    shape = steps_bucket(len(rows), 1), steps_bucket(max(map(len, rows)), 8)
    tokens = np.full(shape, fill, np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return tokens


def minimise(
    losses: Callable[[Float[Array, "N ..."]], Float[Array, " N"]],
    start: Float[Array, "N ..."],
    *,
    steps: int,
    rate: float,
    stop: float,
    project: Callable[[Float[Array, "N ..."]], Float[Array, "N ..."]] = lambda x: x,
) -> Float[Array, "N ..."]:
    """Return where Adam takes each of N independent losses, x ← project(x + step).

    Args:
        steps: the most. stop: a loss below it ends its own steps, and goes no further.
    """
    adam = optax.adam(rate)

    def is_open(carry):
        _, _, loss, step = carry
        return (step < steps) & (loss > stop).any()

    def advance(carry):
        x, moments, _, step = carry
        gradient, loss = jax.grad(lambda x: ((each := losses(x)).sum(), each), has_aux=True)(x)
        # Optax raises float decays to integer step counts, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            change, moments = adam.update(gradient, moments)
        moves = (loss > stop).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(moves, project(x + change), x), moments, loss, step + 1

    first = jnp.full(start.shape[:1], jnp.inf, jnp.float32)
    return jax.lax.while_loop(is_open, advance, (start, adam.init(start), first, 0))[0]
