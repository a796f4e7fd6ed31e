"""Parts of every tower: linear maps, attention over slots, cache and tokens, norms, the layer stack.

Parameters are float32; a tower's `dtype` is its compute dtype. Softmax, norms and rotations are
computed in float32 whatever that is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import rotary

# Keys [B, G, d, S], values [B, G, S, d], and which queries attend to them [B, 1 or T, S]. S differs
# between parts. Both are laid out as a matrix product wants its second factor, so that no decoding
# step transposes the cache.
Part = tuple[Float[Array, "_ G d _"], Float[Array, "_ G _ d"], Bool[Array, "_ _ _"]]

Remat = Literal["none", "dots", "layers"]

# How a tower's parameters are split: (regex on the path in the tower, a mesh axis or None for each
# axis of the parameter); the first match counts. What reads the residual stream is split by its
# output, what writes to it by its input, so that "tensor" costs one all-reduce for attention and one
# for the MLP. A third item, "optional", marks a rule that some models of a family do not use.
SHARDING_RULES = (
    (r"/lora_(in|out)$", (), "optional"),  # small, and used as a whole
    (r"^layers/.*(output|down)/kernel$", (None, "tensor", "fsdp")),
    (r"^layers/.*kernel$", (None, "fsdp", "tensor")),
    (r"^layers/.*(bias|scale)$", ()),
    (r"^word/embedding$", ("tensor", "fsdp")),
    (r"^norm/", ()),
)

# Axes of a training mesh over which the rows of a batch are split.
ROW_AXES = ("data", "fsdp")

# Finite, so that a row with nothing to attend to gives a mean and not NaN.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Context:
    """All that a layer is called with beside its input.

    mask: which tokens of this call attend to which. rotation: their rotary positions, if any.
    before: what lies before the tokens, each part with its own mask: memory slots, the cache.
    adapted: on which tokens low-rank changes act (lora.py); a bool stands for all or none of them.
    product_dtype: what the factors of products with kernels are rounded to; None is their own dtype.
    """

    mask: Bool[Array, "B #T T"]
    rotation: rotary.Rotation | None = None
    before: tuple[Part, ...] = ()
    adapted: Bool[Array, "#B #T"] | bool = True
    product_dtype: DTypeLike | None = None


def split_rows(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Return x with its rows split over `ROW_AXES`, where JAX traces under a mesh that has them.

    XLA would else be free to split activations as it splits a neighbouring parameter, by their
    width, and to gather all rows of a batch for it.
    """
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES)) if row_ways() else x


def gather(array: Array) -> Array:
    """Return the array whole on every device, where JAX traces under a mesh with `ROW_AXES`."""
    return jax.lax.with_sharding_constraint(array, PartitionSpec()) if row_ways() else array


def row_ways() -> int:
    """Return over how many devices JAX's mesh splits rows; 0 without one, or on one of its devices."""
    mesh = jax.sharding.get_abstract_mesh()
    is_split = set(ROW_AXES) <= set(mesh.shape) - set(mesh.manual_axes)
    return mesh.shape["data"] * mesh.shape["fsdp"] if is_split else 0


def look_up(table: nnx.Embed, index: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Return rows of an embedding table, which is gathered first."""
    return gather(table.embedding[...])[index]


def product(
    x: Float[Array, "*rows I"], kernel: Float[Array, "I O"], dtype: DTypeLike | None = None
) -> Float[Array, "*rows O"]:
    """Return x W in the dtype of x, with factors rounded to `dtype`; so are those of its gradients.

    A CPU with bfloat16 instructions multiplies bfloat16 factors, adding up in float32, about twice
    as fast as float32 ones; norms, activations and sums lose by bfloat16 there. So activations
    stay in the compute dtype, and only what is multiplied is rounded. The gradient of W has its
    dtype: that of a float32 parameter is summed in float32, over rows and over devices.
    """
    return _product(jnp.dtype(x.dtype if dtype is None else dtype), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(low: DTypeLike, x: Array, kernel: Array) -> Array:
    return _dot(x.astype(low), kernel.astype(low), ((x.ndim - 1,), (0,)), x.dtype)


def _product_forward(low: DTypeLike, x, kernel):
    # Rounded once: what is stored for the backward pass is half as large.
    rounded = x.value.astype(low)
    contract = ((rounded.ndim - 1,), (0,))
    y = _dot(rounded, kernel.value.astype(low), contract, x.value.dtype)
    return y, (rounded if kernel.perturbed else None, kernel.value, x.perturbed)


def _product_backward(low: DTypeLike, residuals, slope):
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return None, None
    x, kernel, x_perturbed = residuals
    rounded = slope.astype(low)
    of_x = of_kernel = None
    if x_perturbed:
        of_x = _dot(rounded, kernel.astype(low), ((rounded.ndim - 1,), (1,)), slope.dtype)
    if x is not None:
        # In this order: the transposed product is several times slower where one factor is narrow.
        rows = tuple(range(x.ndim - 1))
        of_kernel = _dot(x, rounded, (rows, rows), kernel.dtype)
    return of_x, of_kernel


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _dot(left: Array, right: Array, contract, dtype: DTypeLike) -> Array:
    return jax.lax.dot_general(left, right, (contract, ((), ())), preferred_element_type=dtype)


class Dense(nnx.Linear):
    """An affine map x W + b, with kernel (inputs, outputs) in float32, drawn from N(0, 0.02²)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        draw = nnx.initializers.normal(0.02)
        super().__init__(inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=draw, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows I"], context: Context) -> Float[Array, "*rows O"]:
        """Apply the map in its compute dtype."""
        y = self.times(x, self.kernel, context)
        if self.bias is None:
            return y
        # Rounded after it is spread over the rows, so that its gradient is summed in float32.
        return y + jnp.broadcast_to(self.bias[...], y.shape).astype(self.dtype)

    def times(
        self, x: Float[Array, "*rows I"], factor: nnx.Param, context: Context
    ) -> Float[Array, "*rows O"]:
        """Return x times a parameter, in the compute dtype."""
        return product(x.astype(self.dtype), factor[...], context.product_dtype)


def attend(query: Float[Array, "B T H d"], parts: Sequence[Part]) -> Float[Array, "B T O"]:
    """Return softmax attention over all parts together; a key head serves H / G query heads.

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

    def part_scores(part: Part) -> Float[Array, "B G n T S"]:
        key, _, mask = part
        raw = jnp.einsum("bgrd,bgds->bgrs", grouped, key, preferred_element_type=jnp.float32)
        raw = raw.reshape(*lead, key.shape[3]) * size**-0.5
        return jnp.where(mask[:, None, None, :, :], raw, MASKED)

    scores = [part_scores(part) for part in parts]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1) if scores[1:] else scores[0], axis=-1)
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
    """Return whether cuDNN's fused attention takes this call: half precision on an NVIDIA GPU.

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
    masks = [jnp.broadcast_to(mask, (batch, length, mask.shape[2])) for *_, mask in parts]
    mask = jnp.concatenate(masks, axis=2)
    # The fused gradient wants even lengths. No query attends to an added key; an added query is cut.
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

    kernels: query (D, H·d), key and value (D, G·d), output (H·d, D), by the width, heads, kv_heads and
    head_size of `sizes`. bias: of query, key and value. output_bias: of the output; None is as `bias`.
    interleaved: the layout of rotary pairs (rotary.py).
    """

    def __init__(
        self,
        sizes: Any,
        *,
        bias: bool,
        output_bias: bool | None = None,
        interleaved: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.head_size, self.interleaved = sizes.head_size, interleaved
        width, outer = sizes.width, sizes.heads * sizes.head_size
        inner = sizes.kv_heads * sizes.head_size
        self.query = Dense(width, outer, bias=bias, dtype=dtype, rngs=rngs)
        self.key = Dense(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.value = Dense(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        output_bias = bias if output_bias is None else output_bias
        self.output = Dense(outer, width, bias=output_bias, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B G d T"], Float[Array, "B G T d"]]]:
        """Return the tokens' outputs, and their keys (rotated) and values, as a cache stores them."""
        shape = (*x.shape[:2], -1, self.head_size)
        query, key, value = (
            linear(x, context).reshape(shape) for linear in (self.query, self.key, self.value)
        )
        if context.rotation is not None:
            query, key = (
                rotary.rotate(a, context.rotation, interleaved=self.interleaved)
                for a in (query, key)
            )
        key, value = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
        parts = [(k.astype(key.dtype), v.astype(key.dtype), m) for k, v, m in context.before]
        mixed = attend(query, [*parts, (key, value, context.mask)])
        return self.output(mixed, context), (key, value)


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale, computed in float32, returned in the dtype of x."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return self.normalize(x.astype(jnp.float32)).astype(x.dtype)

    def normalize(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise in float32."""
        power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(power + self.eps) * self.scale[...].astype(jnp.float32)


class LayerNorm(RMSNorm):
    """(x − mean) / √(variance + eps) · scale + bias, in float32, returned in the dtype of x."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def normalize(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise in float32."""
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return super().normalize(centred) + self.bias[...].astype(jnp.float32)


def gelu(x: Float[Array, "*rows D"], *, approximate: bool) -> Float[Array, "*rows D"]:
    """Return GELU of x; its backward pass stores x alone, and computes the rest again.

    It is the widest activation of a layer: the four others of its size that JAX would store cost
    more to write and to read back than to compute.
    """

    activation = functools.partial(jax.nn.gelu, approximate=approximate)
    # The scan over layers already separates both passes.
    return jax.checkpoint(activation, prevent_cse=False)(x)


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Return `depth` independent layers as one module whose parameters have a leading layer axis."""
    split = nnx.split_rngs(splits=depth)
    return split(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def scan_layers(
    layers: nnx.Module,
    call: Callable[[nnx.Module, Array, Any], tuple[Array, Any]],
    x: Float[Array, "B T D"],
    inputs: Any,
    *,
    remat: Remat,
) -> tuple[Float[Array, "B T D"], Any]:
    """Run stacked layers in order; `inputs` and what `call` returns beside x lead with L.

    One scan, so that compile time does not grow with depth. The backward pass recomputes, by
    `remat`: nothing ("none"), all but products with parameters ("dots": attention, norms and
    activations), or each layer from its input ("layers").
    """
    graph, state = nnx.split(layers)

    def step(x, layer):
        state, inputs = layer
        x, out = call(nnx.merge(graph, state), split_rows(x), inputs)
        return split_rows(x), out

    if remat != "none":
        policies = jax.checkpoint_policies
        saved = policies.dots_with_no_batch_dims_saveable
        policy = saved if remat == "dots" else policies.nothing_saveable
        # The scan already separates both passes.
        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    return jax.lax.scan(step, split_rows(x), (state, inputs))
