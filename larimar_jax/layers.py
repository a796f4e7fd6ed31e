"""What every tower is made of: attention over slots, cache and tokens; norms; the stack of layers.

Parameters are float32; a tower's `dtype` is what it computes in. Softmax, norms and rotations stay
in float32 whatever that is.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import products, rotary

# Keys [B, G, d, S], values [B, G, S, d], and which queries see them [B, 1 or T, S]. S differs between
# parts. Both are as a matrix product wants its second factor, so that a cache is not transposed at
# every step.
Part = tuple[Float[Array, "_ G d _"], Float[Array, "_ G _ d"], Bool[Array, "_ _ _"]]

Remat = Literal["none", "dots", "layers"]

# Where a tower's parameters are split: (regex on the path in the tower, an axis of the mesh or None
# for each of its axes); the first that is found counts. What reads the residual stream is split by
# its output, what writes to it by its input, so that one all-reduce for attention and one for the MLP
# is all that "tensor" costs. A third item, "optional": not every model of the family has it.
SHARDING = (
    (r"/lora_(in|out)$", (), "optional"),  # small, and used as a whole
    (r"^layers/.*(output|down)/kernel$", (None, "tensor", "fsdp")),
    (r"^layers/.*kernel$", (None, "fsdp", "tensor")),
    (r"^layers/.*(bias|scale)$", ()),
    (r"^word/embedding$", ("tensor", "fsdp")),
    (r"^norm/", ()),
)

# Finite, so that a row with nothing to attend to gives a mean and not NaN.
MASKED = -1e30


# The dataclasses here are registered by hand: JAX rebuilds pytrees around placeholders, on which a
# checked constructor would fail.
def pytree(cls):
    """Registers a frozen dataclass, all fields data, to be rebuilt without its constructor."""
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


@pytree
@dataclasses.dataclass(frozen=True)
class Prefix:
    """How one latent per row enters a decoder (§2): a vector on every token, and past slots.

    `key` and `value` are P past positions of each layer with the layer's key/value head layout,
    unrotated, at position 0; tokens of an active row start at position 1. A row with `active`
    False is decoded as by the untouched base LM, whatever its latent holds (to rounding: sums over
    masked places run in another order; to the bit where no prefix is given). A zero latent is not
    that: its slot is there and holds zeros.
    """

    embedding: Float[Array, "B D"]
    key: Float[Array, "L B P H d"]
    value: Float[Array, "L B P H d"]
    active: Bool[Array, "B"]


@pytree
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer by token index; M, the room for tokens, is static.

    Slots of a `Prefix` are not in it: they are passed again with every call.
    """

    key: Float[Array, "L B G d M"]
    value: Float[Array, "L B G M d"]


@pytree
@dataclasses.dataclass(frozen=True)
class Context:
    """What one layer's attention is given beside its input.

    mask: which tokens of this call see which. turn: their rotary positions, if they have any.
    before: what lies before them, each with its own mask: memory slots, the cache.
    """

    mask: Bool[Array, "B #T T"]
    turn: rotary.Turn | None = None
    before: tuple[Part, ...] = ()


class Placement(NamedTuple):
    """Where a training step wants activations and tables, as functions of an array.

    ways: over how many devices rows are split.
    """

    rows: Callable[[Array], Array]
    whole: Callable[[Array], Array]
    ways: int


# Models never see a mesh; what traces them may say where things are to live.
_PLACEMENT: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
    "placement", default=None
)


@contextlib.contextmanager
def placed_by(placement: Placement) -> Iterator[None]:
    """While it is open, what is traced places its activations and tables by `placement`.

    XLA would else be free to split activations as it splits a neighbouring parameter, by their width,
    and to gather all rows of a batch for it.
    """
    token = _PLACEMENT.set(placement)
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


def rows(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x, with its rows where they belong."""
    placement = _PLACEMENT.get()
    return x if placement is None else placement.rows(x)


def whole(array: Array) -> Array:
    """The array, whole on every device."""
    placement = _PLACEMENT.get()
    return array if placement is None else placement.whole(array)


def rows_are_split() -> bool:
    """Whether rows are on several devices."""
    placement = _PLACEMENT.get()
    return placement is not None and placement.ways > 1


# Which tokens the low-rank changes of a tower's maps act on (lora.py).
ALL, NONE = "all", "none"
_CHANGED: contextvars.ContextVar[Any] = contextvars.ContextVar("changed", default=ALL)


@contextlib.contextmanager
def changing(tokens: Bool[Array, "#B #T"] | None) -> Iterator[None]:
    """While it is open, low-rank changes act on these tokens of what is traced; on none for None."""
    token = _CHANGED.set(NONE if tokens is None else tokens)
    try:
        yield
    finally:
        _CHANGED.reset(token)


def changed() -> Bool[Array, "#B #T"] | str:
    """The tokens of `changing`, or ALL, or NONE."""
    return _CHANGED.get()


def look_up(table: nnx.Embed, index: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Rows of an embedding table, which is whole while they are looked up."""
    return whole(table.embedding[...])[index]


def attend(query: Float[Array, "B T H d"], parts: Sequence[Part]) -> Float[Array, "B T O"]:
    """Softmax attention over all parts together; each of G key heads serves H / G query heads.

    O is H·d, all heads side by side. Parts are not joined: a decoding step would copy the whole
    cache to add one token to it.
    """
    if flash_applies(query):
        return _flash(query, parts)
    batch, length, heads, size = query.shape
    groups = parts[0][0].shape[1]
    lead = (batch, groups, heads // groups, length)
    # Batch axes first, as matrix products want them: otherwise every call would transpose keys.
    grouped = query.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, groups, -1, size)

    def scores(part: Part) -> Float[Array, "B G n T S"]:
        key, _, mask = part
        found = jnp.einsum("bgrd,bgds->bgrs", grouped, key, preferred_element_type=jnp.float32)
        found = found.reshape(*lead, key.shape[3]) * size**-0.5
        return jnp.where(mask[:, None, None, :, :], found, MASKED)

    found = [scores(part) for part in parts]
    weights = jax.nn.softmax(jnp.concatenate(found, axis=-1) if found[1:] else found[0], axis=-1)
    weights = weights.astype(query.dtype).reshape(batch, groups, -1, weights.shape[-1])
    ends = [0]
    for key, _, _ in parts:
        ends.append(ends[-1] + key.shape[3])
    mixed = sum(
        jnp.einsum("bgrs,bgsd->bgrd", weights[..., ends[i] : ends[i + 1]], value)
        for i, (_, value, _) in enumerate(parts)
    )
    return mixed.reshape(*lead, size).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads * size)


def flash_applies(query: Float[Array, "B T H d"]) -> bool:
    """Whether cuDNN's fused attention takes this call: half precision on an NVIDIA GPU.

    A decoding step (T = 1) has one row of scores, which need no fusing.
    """
    return (
        jax.default_backend() == "gpu"
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[1] > 1
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 128
    )


def _flash(query: Float[Array, "B T H d"], parts: Sequence[Part]) -> Float[Array, "B T O"]:
    batch, length, heads, size = query.shape
    key = jnp.concatenate([key.swapaxes(2, 3) for key, _, _ in parts], axis=2)
    value = jnp.concatenate([value for _, value, _ in parts], axis=2)
    seen = [jnp.broadcast_to(mask, (batch, length, mask.shape[2])) for *_, mask in parts]
    mask = jnp.concatenate(seen, axis=2)
    # The fused gradient wants even lengths. A key added is seen by nobody, a query is cut off.
    odd_t, odd_s = length % 2, key.shape[2] % 2
    query = jnp.pad(query, ((0, 0), (0, odd_t), (0, 0), (0, 0)))
    key, value = (jnp.pad(a, ((0, 0), (0, 0), (0, odd_s), (0, 0))) for a in (key, value))
    mask = jnp.pad(mask, ((0, 0), (0, odd_t), (0, odd_s)))
    mixed = jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask=mask[:, None],
        implementation="cudnn",
    )
    return mixed[:, :length].reshape(batch, length, heads * size)


class Attention(nnx.Module):
    """Multi-head attention over the tokens and what lies before them.

    kernels: query (D, H·d), key and value (D, G·d), output (H·d, D). bias: of query, key and value.
    output_bias: of the output; None is as `bias`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        *,
        bias: bool,
        output_bias: bool | None = None,
        interleaved: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.head_size, self.interleaved = head_size, interleaved
        outer, inner = heads * head_size, kv_heads * head_size
        last = bias if output_bias is None else output_bias
        self.query = linear(width, outer, bias=bias, dtype=dtype, rngs=rngs)
        self.key = linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.value = linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.output = linear(outer, width, bias=last, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B G d T"], Float[Array, "B G T d"]]]:
        """What the tokens gather, and their own keys (rotated) and values, as a cache keeps them."""
        shape = (*x.shape[:2], -1, self.head_size)
        query = self.query(x).reshape(shape)
        key = self.key(x).reshape(shape)
        value = self.value(x).reshape(shape)
        if context.turn is not None:
            query, key = (
                rotary.rotate(a, context.turn, interleaved=self.interleaved) for a in (query, key)
            )
        key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        before = [(k.astype(key.dtype), v.astype(key.dtype), m) for k, v, m in context.before]
        return self.output(attend(query, [*before, (key, value, context.mask)])), (key, value)


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale, computed in float32, returned in the dtype of x."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        y = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(power + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


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
        y = y * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (a[...].astype(jnp.float32) for a in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


def gelu(x: Float[Array, "*rows D"], *, approximate: bool) -> Float[Array, "*rows D"]:
    """GELU; its backward pass keeps x alone, and computes the rest again.

    It is the widest activation of a layer: the four others of its size that JAX would keep cost more
    to write and to read back than to compute.
    """

    def activation(x: Array) -> Array:
        return jax.nn.gelu(x, approximate=approximate)

    # The scan over layers already keeps both passes apart.
    return jax.checkpoint(activation, prevent_cse=False)(x)


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
        dot_general=products.dot_general,
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
    remat: Remat,
) -> tuple[Float[Array, "B T D"], Any]:
    """Runs stacked layers in order; `inputs` and what `call` returns beside x lead with L.

    One scan, so that compile time does not grow with depth. `remat` says what the backward pass
    computes again: nothing ("none"), all but products with parameters ("dots": attention, norms and
    activations), or each layer from its input ("layers").
    """
    graph, state = nnx.split(layers)

    def step(x, layer):
        state, inputs = layer
        x, out = call(nnx.merge(graph, state), rows(x), inputs)
        return rows(x), out

    if remat != "none":
        kept = jax.checkpoint_policies
        policy = kept.dots_with_no_batch_dims_saveable if remat == "dots" else kept.nothing_saveable
        # The scan already keeps them apart.
        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    return jax.lax.scan(step, rows(x), (state, inputs))
