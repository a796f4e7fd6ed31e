"""What every causal decoder shares: where tokens stand, how a latent enters, the scan, the cache."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import layers, losses, rotary
from larimar_jax.layers import Context


def pytree(cls):
    """Make a class a frozen dataclass and a pytree of its fields.

    The pytree is rebuilt without the constructor: JAX rebuilds pytrees around placeholders, on which
    a constructor that checks shapes would fail.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten_with_keys(tree):
        return [(jax.tree_util.GetAttrKey(n), getattr(tree, n)) for n in names], None

    def unflatten(_, leaves):
        tree = object.__new__(cls)
        tree.__dict__.update(zip(names, leaves, strict=True))
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


@pytree
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
class Cache:
    """Keys and values of every layer by token index; M, the capacity in tokens, is static.

    Slots of a `Prefix` are not in the cache: they are passed again with every call.
    """

    key: Float[Array, "L B G d M"]
    value: Float[Array, "L B G M d"]


@pytree
class Tree:
    """Tokens of a row that branch, or are of several texts: continuations and prompts side by side.

    index: a token's place in its own text, counted from the text's start. visible: which tokens of
    the row a token attends to: its ancestors and itself. owner: where the texts of a row have latents of
    their own, which of the row's S a token is under; the prefix then has B·S rows, those of one row of
    tokens after each other. Without `owner` a row has one latent.
    """

    index: Int[Array, "B T"]
    visible: Bool[Array, "B T T"]
    owner: Int[Array, "B T"] | None = None


class Decoder(nnx.Module):
    """A causal language model that a latent can condition through a `Prefix` (§2).

    A family (registry.py) names its BLOCK, called as `block(x, context)` and returning x and what its
    `layers.Attention` returned beside it; creates its `norm`, a table `position` of learned positions
    where it has one, and a `head` that is not tied to the embeddings, in `init_output`; and overrides
    `rotation` and `windows` where it has any. Its sizes have width, depth, kv_heads, head_size,
    vocab_size and max_length.

    Args:
      config: the family's sizes.
      dtype: the compute dtype; parameters are float32.
      remat: what the backward pass recomputes (`layers.scan_layers`).
    """

    BLOCK: ClassVar[type[nnx.Module]]
    added_tokens: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: Any,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: layers.Remat = "none",
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        draw = nnx.initializers.normal(0.02)
        self.word = nnx.Embed(config.vocab_size, config.width, embedding_init=draw, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: self.BLOCK(config, dtype=dtype, rngs=rngs), config.depth, rngs
        )
        self.init_output(rngs)

    def init_output(self, rngs: nnx.Rngs) -> None:
        """Create what comes before the first layer beside the embeddings, and after the last."""
        raise NotImplementedError(f"{type(self).__name__} does not create its norm")

    def max_tokens(self, prefix: Prefix | None) -> int:
        """Return how many tokens a row takes; a table of positions has to hold the slot's as well."""
        return self.config.max_length - (prefix is not None and hasattr(self, "position"))

    def rotation(self, position: Int[Array, "B T"]) -> rotary.Rotation | None:
        """Return rotary positions, where the family has any."""
        return None

    def windows(self) -> Int[np.ndarray, " L"] | None:
        """Return how many tokens back each layer attends, itself included; None for all of them."""
        return None

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        start: Int[Array, "B"] | None = None,
        tree: Tree | None = None,
        product_dtype: DTypeLike | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Return final, normalised hidden states in the compute dtype, and the cache with the tokens in.

        Token t of row b has index start[b] + t and attends to every index up to its own (within its
        layer's window) and, in rows where `prefix` is active, to the P past slots, however far.
        Its position is index + 1 in active rows (§2) and index in others. Padding goes on the right.
        Low-rank changes (lora.py) act on tokens with an active latent alone.
        A cached call passes the prefix again. Without `start` rows begin at 0, and the cache is only
        filled.

        Args:
          tree: tokens that branch instead of following each other; then without cache and start, and
            the cache that is returned holds them as they lie in their row. Where it has an `owner`,
            rows of the prefix are those of `Tree`, and what holds for rows above holds for the tokens
            under each.
          product_dtype: what the factors of products with kernels are rounded to (`layers.product`).

        Raises:
          ValueError: more tokens than there are positions, or than the cache takes; a dynamic `start`
            that runs past the cache is not detected here: callers size the cache.
        """
        self._check(tokens.shape[1], prefix, cache, tree)
        batch, length = tokens.shape
        if tree is None:
            index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
            visible, owner = index[:, :, None] >= index[:, None, :], None
        else:
            index, visible, owner = tree.index, tree.visible, tree.owner
        if start is not None:
            index = index + start.astype(jnp.int32)[:, None]
        active, visible_slots = _latents(prefix, owner)
        position = index + active.astype(jnp.int32)

        x = embed(self.word, tokens, prefix, self.dtype, owner)
        if hasattr(self, "position"):
            x = x + layers.look_up(self.position, position).astype(x.dtype)
        rotation, windows = self.rotation(position), self.windows()
        slots = None if prefix is None else _slots(prefix, batch)
        past = None if start is None or cache is None else (cache.key, cache.value)

        def near(mask, key_index, window):
            return mask if window is None else mask & (index[:, :, None] - key_index < window)

        def call(block, x, layer):
            slots, past, window = layer
            before = ()
            if slots is not None:
                before += ((*slots, visible_slots),)
            if past is not None:
                stored = jnp.arange(past[1].shape[2], dtype=jnp.int32)
                written = stored < start[:, None, None]
                written = jnp.broadcast_to(written, (batch, length, stored.shape[0]))
                before += ((*past, near(written, stored, window)),)
            context = Context(
                mask=near(visible, index[:, None, :], window),
                rotation=rotation,
                before=before,
                adapted=prefix is not None and active,
                product_dtype=product_dtype,
            )
            return block(x, context)

        inputs = (slots, past, None if windows is None else jnp.asarray(windows))
        x, new = layers.scan_layers(self.layers, call, x, inputs, remat=self.remat)
        if tree is not None:
            return self.norm(x), Cache(*new)
        return self.norm(x), None if cache is None else _extend(cache, *new, start)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Return next-token logits, float32. Gather the rows that are needed first: V is large."""
        return losses.logits(self.to_logits, hidden)

    @property
    def to_logits(self) -> losses.Head:
        """The map from hidden states to logits."""
        head = getattr(self, "head", None)
        if head is None:
            return losses.Head(self.embeddings, None, True, self.dtype)
        bias = None if head.bias is None else head.bias[...]
        return losses.Head(head.kernel[...], bias, False, self.dtype)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Return a cache for `length` tokens in all, prompt and continuation.

        Raises:
          ValueError: length exceeds max_length.
        """
        c = self.config
        if length > c.max_length:
            raise ValueError(f"a cache of {length} exceeds this decoder's {c.max_length} tokens")
        value = jnp.zeros((c.depth, batch, c.kv_heads, length, c.head_size), self.dtype)
        return Cache(value.swapaxes(3, 4), value)

    @property
    def decoder(self) -> "Decoder":
        """The decoder itself: generation and scoring take it, the base LM, in the place of a Larimar."""
        return self

    @property
    def embeddings(self) -> Float[Array, "V D"]:
        """The token embedding table."""
        return self.word.embedding[...]

    def _check(self, length: int, prefix, cache: Cache | None, tree: Tree | None) -> None:
        limit = self.max_tokens(prefix)
        if cache is not None:
            capacity = cache.value.shape[3]
            if tree is not None:
                raise ValueError("tokens that branch follow no cache: a cache is one sequence")
            if length > capacity:
                raise ValueError(
                    f"{length} tokens do not fit a cache made for {capacity}; make it with"
                    " empty_cache(batch, length) for prompt and continuation together"
                )
            length = capacity
        if tree is None and length > limit:
            slot = f" (a memory slot takes one of {self.config.max_length})"
            raise ValueError(
                f"{length} tokens exceed this decoder's {limit} positions"
                + (slot if limit < self.config.max_length else "")
            )


def embed(
    table: nnx.Embed,
    tokens: Int[Array, "B T"],
    prefix: Prefix | None,
    dtype: DTypeLike,
    owner: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Return token embeddings, plus its latent's vector on every token of an active row (§2)."""
    x = layers.look_up(table, tokens).astype(dtype)
    if prefix is None:
        return x
    # Selected, not multiplied: an inactive row stays untouched even by a latent that is not finite.
    vector = jnp.where(prefix.active[:, None], prefix.embedding, jnp.zeros_like(prefix.embedding))
    vector = vector.astype(dtype).reshape(x.shape[0], -1, x.shape[-1])
    return x + (vector if owner is None else jnp.take_along_axis(vector, owner[..., None], axis=1))


def _latents(
    prefix: Prefix | None, owner: Int[Array, "B T"] | None
) -> tuple[Bool[Array, "#B #T"], Bool[Array, "#B #T S"] | None]:
    """Return which tokens have an active latent, and which of their row's slots they attend to."""
    if prefix is None:
        return jnp.zeros((1, 1), bool), None
    slots = prefix.key.shape[2]
    if owner is None:
        active = prefix.active[:, None]
        return active, jnp.repeat(active[:, None], slots, axis=2)
    active = prefix.active.reshape(owner.shape[0], -1)
    own = (owner[:, :, None] == jnp.arange(active.shape[1])) & active[:, None]
    return own.any(axis=2), jnp.repeat(own, slots, axis=2)


def _slots(
    prefix: Prefix, batch: int
) -> tuple[Float[Array, "L B G d S"], Float[Array, "L B G S d"]]:
    """Return the slots of each of `batch` rows of tokens, after each other."""
    active = prefix.active[None, :, None, None, None]
    # A masked slot gets weight 0, but 0 times what is not finite would still spread.
    key, value = (jnp.where(active, a, jnp.zeros_like(a)) for a in (prefix.key, prefix.value))
    shape = (key.shape[0], batch, key.shape[1] * key.shape[2] // batch, *key.shape[3:])
    key, value = key.reshape(shape), value.reshape(shape)
    return key.transpose(0, 1, 3, 4, 2), value.swapaxes(2, 3)


def _extend(
    cache: Cache,
    key: Float[Array, "L B G d T"],
    value: Float[Array, "L B G T d"],
    start: Int[Array, "B"] | None,
) -> Cache:
    """Write all layers' new keys and values at once: the scan over layers only reads the cache."""
    key, value = key.astype(cache.key.dtype), value.astype(cache.value.dtype)
    if start is None:
        insert = jax.lax.dynamic_update_slice_in_dim
        return Cache(insert(cache.key, key, 0, axis=4), insert(cache.value, value, 0, axis=3))
    # One scatter, in place where the cache is donated or carried. (Mapping a slice's update over
    # rows instead costs a hundred times as much on CPU.)
    rows = jnp.arange(value.shape[1])[:, None]
    places = start.astype(jnp.int32)[:, None] + jnp.arange(value.shape[3], dtype=jnp.int32)
    return Cache(
        cache.key.at[:, rows, :, :, places].set(key.transpose(1, 4, 0, 2, 3), mode="drop"),
        cache.value.at[:, rows, :, places].set(value.transpose(1, 3, 0, 2, 4), mode="drop"),
    )
