"""What every tower is made of: attention with past slots and a cache, rotary positions, the stack.

Parameters are float32; a tower's `dtype` is what it computes in. Softmax, norms and rotations stay
in float32 whatever that is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

Slots = tuple[Float[Array, "B P G d"], Float[Array, "B P G d"]]
Past = tuple[Float[Array, "B M G d"], Float[Array, "B M G d"]]
Turn = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]

# Finite, so that a row with nothing to attend to gives a mean and not NaN.
MASKED = -1e30


# Both dataclasses are registered by hand: JAX rebuilds pytrees around placeholders, on which a
# checked constructor would fail.
def _pytree(cls):
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten_with_keys(tree):
        return [(jax.tree_util.GetAttrKey(n), getattr(tree, n)) for n in names], None

    def unflatten(_, leaves):
        tree = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(tree, name, leaf)
        return tree

    jax.tree_util.register_pytree_with_keys(
        cls, flatten_with_keys, unflatten, lambda tree: ([getattr(tree, n) for n in names], None)
    )
    return cls


@_pytree
@dataclasses.dataclass(frozen=True)
class Prefix:
    """How one latent per row enters a decoder (§2): a vector on every token, and past slots.

    `key` and `value` are P past positions of each layer with the layer's key/value head layout,
    unrotated, at position 0; tokens of an active row start at position 1. A row with `active`
    False is decoded exactly as by the untouched base LM. A zero latent is not that: its slot is
    there and holds zeros.
    """

    embedding: Float[Array, "B D"]
    key: Float[Array, "L B P H d"]
    value: Float[Array, "L B P H d"]
    active: Bool[Array, "B"]


@_pytree
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer by token index; M, the room for tokens, is static.

    Slots of a `Prefix` are not in it: they are passed again with every call.
    """

    key: Float[Array, "L B M H d"]
    value: Float[Array, "L B M H d"]


@_pytree
@dataclasses.dataclass(frozen=True)
class Span:
    """Where the tokens of one decoder call stand: what every layer needs and none changes."""

    index: Int[Array, "B T"]  # place in the row, and in the cache
    position: Int[Array, "B T"]  # what positional encodings see
    mask: Bool[Array, "B T S"]  # S = past slots, then cache or tokens
    active: Bool[Array, "B"] | None  # None: no prefix


def locate(
    tokens: Int[Array, "B T"],
    prefix: Prefix | None,
    cache: Cache | None,
    start: Int[Array, "B"] | None,
) -> Span:
    """Indices, positions (§2: from 1 where a slot is active) and the attention mask.

    Causality is by index, so padding on the right is never seen, nor is what an earlier and longer
    text left in the cache.

    Raises:
      ValueError: more tokens than the cache has room for. A dynamic `start` that runs past the
        cache cannot be seen here; callers size the cache.
    """
    batch, length = tokens.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if cache is None:
        seen = index[:, :, None] >= index[:, None, :]
    if start is not None:
        index = index + start.astype(jnp.int32)[:, None]
    if cache is not None:
        room = cache.key.shape[2]
        if length > room:
            raise ValueError(
                f"{length} tokens do not fit a cache made for {room}; make it with"
                f" empty_cache(batch, length) for prompt and continuation together"
            )
        seen = index[:, :, None] >= jnp.arange(room, dtype=jnp.int32)
    if prefix is None:
        return Span(index, index, seen, None)
    slots = jnp.broadcast_to(
        prefix.active[:, None, None], (batch, length, prefix.key.shape[2])
    )
    return Span(
        index=index,
        position=index + prefix.active.astype(jnp.int32)[:, None],
        mask=jnp.concatenate([slots, seen], axis=2),
        active=prefix.active,
    )


def embed(
    table: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    prefix: Prefix | None,
    dtype: DTypeLike,
) -> Float[Array, "B T D"]:
    """Token embeddings, plus the latent's vector on every token of an active row (§2)."""
    x = table[tokens].astype(dtype)
    if prefix is None:
        return x
    # Selected, not multiplied: an inactive row stays untouched even by a latent that is not finite.
    vector = jnp.where(prefix.active[:, None], prefix.embedding, jnp.zeros_like(prefix.embedding))
    return x + vector.astype(dtype)[:, None, :]


def rotation(
    position: Int[Array, "B T"], size: int, theta: float
) -> Turn:
    """Cosines and sines of rotary positions for heads of `size`, float32."""
    frequency = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
    angle = position.astype(jnp.float32)[:, :, None] * jnp.asarray(frequency, jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "B T H d"],
    turn: Turn,
) -> Float[Array, "B T H d"]:
    """Rotates the pairs (i, i + d/2) of every head, the layout of Hugging Face's Llama."""
    cos, sin = (angle[:, :, None, :] for angle in turn)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    query: Float[Array, "B T H d"],
    key: Float[Array, "B S G d"],
    value: Float[Array, "B S G d"],
    mask: Bool[Array, "B #T S"],
) -> Float[Array, "B T H*d"]:
    """Attention, softmax in float32; each of the G key/value heads serves H / G query heads."""
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("btgnd,bsgd->bgnts", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None, :, :], scores * size**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bgnts,bsgd->btgnd", weights, value)
    return mixed.reshape(batch, length, heads * size)


def _insert(
    past: Float[Array, "B M G d"], new: Float[Array, "B T G d"], start: Int[Array, "B"]
) -> Float[Array, "B M G d"]:
    def row(past, new, start):
        return jax.lax.dynamic_update_slice_in_dim(past, new, start, axis=0)

    return jax.vmap(row)(past, new.astype(past.dtype), start)


class Attention(nnx.Module):
    """Multi-head attention over the tokens, the cache, and the past slots of a prefix.

    kernels: query (D, H·d), key and value (D, G·d), output (H·d, D), with or without biases.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        outer, inner = heads * head_size, kv_heads * head_size
        self.query = linear(width, outer, bias=bias, dtype=dtype, rngs=rngs)
        self.key = linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.value = linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.output = linear(outer, width, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B #T S"],
        *,
        turn: Turn | None = None,
        slots: Slots | None = None,
        past: Past | None = None,
        start: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Past | None]:
        """Attends over slots, then cache (or the tokens themselves); also the cache with them in.

        `past` is one layer's cache and needs `start`, the index of each row's first token. The
        second result is the new (key, value) of the cache, or None without one.
        """
        shape = (*x.shape[:2], -1, self.head_size)
        query = self.query(x).reshape(shape)
        key = self.key(x).reshape(shape)
        value = self.value(x).reshape(shape)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        if past is not None:
            past = key, value = _insert(past[0], key, start), _insert(past[1], value, start)
        if slots is not None:
            key = jnp.concatenate([slots[0].astype(key.dtype), key], axis=1)
            value = jnp.concatenate([slots[1].astype(value.dtype), value], axis=1)
        return self.output(attend(query, key, value, mask)), past


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale, computed in float32, returned in the dtype of x."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        y = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        return (y * jax.lax.rsqrt(power + self.eps) * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / √(variance + eps) · scale + bias, in float32, returned in the dtype of x."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


def linear(
    inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """An affine map with kernel (inputs, outputs), float32, drawn from N(0, 0.02²)."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(0.02),
        rngs=rngs,
    )


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` independent layers as one module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make(rngs)

    return build(rngs)


def scan_layers(
    layers: nnx.Module,
    call: Callable[[nnx.Module, Array, Any], tuple[Array, Any]],
    x: Float[Array, "B T D"],
    inputs: Any,
    *,
    remat: bool,
) -> tuple[Float[Array, "B T D"], Any]:
    """Runs stacked layers in order; `inputs` and what `call` returns beside x lead with L.

    One scan, so that compile time does not grow with depth. With `remat` the backward pass
    recomputes each layer from its input.
    """
    graph, state = nnx.split(layers)

    def step(x, layer):
        state, inputs = layer
        return call(nnx.merge(graph, state), x, inputs)

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)  # the scan already keeps them apart
    return jax.lax.scan(step, x, (state, inputs))


def run_decoder(
    layers: nnx.Module,
    x: Float[Array, "B T D"],
    span: Span,
    prefix: Prefix | None,
    cache: Cache | None,
    *,
    turn: Turn | None,
    remat: bool,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Scans decoder blocks `block(x, mask, turn=, slots=, past=, start=)` with slots and cache."""
    slots = None
    if prefix is not None:
        active = prefix.active[None, :, None, None, None]
        # A masked slot gets weight 0, but 0 times what is not finite would still spread.
        slots = tuple(jnp.where(active, a, jnp.zeros_like(a)) for a in (prefix.key, prefix.value))
    past = None if cache is None else (cache.key, cache.value)

    def call(block, x, layer):
        slots, past = layer
        return block(x, span.mask, turn=turn, slots=slots, past=past, start=span.index[:, 0])

    x, past = scan_layers(layers, call, x, (slots, past), remat=remat)
    return x, None if past is None else Cache(*past)


def empty_cache(
    depth: int, batch: int, length: int, heads: int, size: int, dtype: DTypeLike
) -> Cache:
    """A cache of zeros for `length` tokens; the mask keeps unwritten places out of sight."""
    zeros = jnp.zeros((depth, batch, length, heads, size), dtype)
    return Cache(zeros, zeros)
