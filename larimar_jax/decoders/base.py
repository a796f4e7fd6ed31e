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
from larimar_jax.layers import Cache, Context, Prefix


@layers.pytree
@dataclasses.dataclass(frozen=True)
class Tree:
    """Tokens of a row that branch, or are of several texts: continuations and prompts side by side.

    index: a token's place in its own text, counted from the text's start. seen: which tokens of
    the row a token attends to: its ancestors and itself. owner: where texts of a row have latents of
    their own, which of the row's S a token is under; the prefix then has B·S rows, those of one row of
    tokens after each other. Without it a row has one.
    """

    index: Int[Array, "B T"]
    seen: Bool[Array, "B T T"]
    owner: Int[Array, "B T"] | None = None


class WholeHeads:
    """Of a config: heads that share the width evenly, each with its own key and value."""

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")

    @property
    def kv_heads(self) -> int:
        """Every query head has its own key and value."""
        return self.heads

    @property
    def head_size(self) -> int:
        """The width of one head."""
        return self.width // self.heads


class Decoder(nnx.Module):
    """A causal language model that a latent can condition through a `Prefix` (§2).

    A family names its BLOCK, called as `block(x, context)` and returning x and what its
    `layers.Attention` returned beside it; makes its `norm` (and `head`, where that is not tied to
    the embeddings) in `top`; and says by `room`, `place`, `turn` and `windows` what its positions
    do. Its config has width, depth, kv_heads, head_size, vocab_size and max_length.

    Args:
      config: the family's.
      dtype: what it computes in; parameters are float32.
      remat: what the backward pass computes again (`layers.scan_layers`).
    """

    BLOCK: ClassVar[type[nnx.Module]]

    def __init__(
        self,
        config: Any,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: layers.Remat = "none",
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat = config, jnp.dtype(dtype), remat
        table = nnx.initializers.normal(0.02)
        self.word = nnx.Embed(config.vocab_size, config.width, embedding_init=table, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: self.BLOCK(config, dtype=dtype, rngs=rngs), config.depth, rngs
        )
        self.top(rngs)

    def top(self, rngs: nnx.Rngs) -> None:
        """Makes what comes before the first layer beside the embeddings, and after the last."""
        raise NotImplementedError(f"{type(self).__name__} does not make its norm")

    def room(self, prefix: Prefix | None) -> int:
        """How many tokens a row may have."""
        return self.config.max_length

    def place(
        self, x: Float[Array, "B T D"], position: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Adds learned positions, where the family has any."""
        return x

    def turn(self, position: Int[Array, "B T"]) -> rotary.Turn | None:
        """Rotary positions, where the family has any."""
        return None

    def windows(self) -> Int[np.ndarray, " L"] | None:
        """How many tokens back each layer sees, itself included; None where all see everything."""
        return None

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        start: Int[Array, "B"] | None = None,
        tree: Tree | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final, normalised hidden states in the compute dtype, and the cache with the tokens in.

        Token t of row b has index start[b] + t and attends to every index up to its own (within its
        layer's window) and, in rows where `prefix` is active, to the P past slots, however far.
        Its position is index + 1 in active rows (§2) and index in others. Padding goes on the right.
        Low-rank changes (lora.py) act on tokens with an active latent alone.
        A cached call passes the prefix again. Without `start` rows begin at 0, and the cache is only
        filled.

        Args:
          tree: tokens that branch instead of following each other; then without cache and start, and
            the cache that is returned holds them as they lie in their row. Where it has an `owner`,
            rows of the prefix are those of `Tree`, and what is said of rows holds for the tokens under
            each.

        Raises:
          ValueError: more tokens than there are positions, or than the cache has room for; a dynamic
            `start` that runs past the cache cannot be seen here: callers size the cache.
        """
        self._check(tokens.shape[1], prefix, cache, tree)
        batch, length = tokens.shape
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        seen = index[:, :, None] >= index[:, None, :]
        if tree is not None:
            index, seen = tree.index, tree.seen
        if start is not None:
            index = index + start.astype(jnp.int32)[:, None]
        owner = None if tree is None else tree.owner
        active, shown = _latents(prefix, owner)
        position = index + active.astype(jnp.int32)

        x = embed(self.word, tokens, prefix, self.dtype, owner)
        x = self.place(x, position)
        turn, windows = self.turn(position), self.windows()
        slots = None if prefix is None else _slots(prefix, batch)
        past = None if start is None or cache is None else (cache.key, cache.value)

        def near(mask, key_index, window):
            if window is None:
                return mask
            return mask & (index[:, :, None] - key_index < window)

        def call(block, x, layer):
            slots, past, window = layer
            before = ()
            if slots is not None:
                before += ((*slots, shown),)
            if past is not None:
                stored = jnp.arange(past[1].shape[2], dtype=jnp.int32)
                old = jnp.broadcast_to(
                    stored < start[:, None, None], (batch, length, stored.shape[0])
                )
                before += ((*past, near(old, stored, window)),)
            return block(x, Context(near(seen, index[:, None, :], window), turn, before))

        with layers.changing(None if prefix is None else active):
            x, new = layers.scan_layers(
                self.layers,
                call,
                x,
                (slots, past, None if windows is None else jnp.asarray(windows)),
                remat=self.remat,
            )
        if tree is not None:
            return self.norm(x), Cache(*new)
        return self.norm(x), None if cache is None else _extend(cache, *new, start)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Next-token logits, float32. Gather the rows that are needed first: V is large."""
        return losses.logits(self.to_logits, hidden)

    @property
    def to_logits(self) -> losses.Head:
        """What makes logits of hidden states."""
        head = getattr(self, "head", None)
        if head is None:
            return losses.Head(self.embeddings, None, True, self.dtype)
        bias = None if head.bias is None else head.bias[...]
        return losses.Head(head.kernel[...], bias, False, self.dtype)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in all, prompt and continuation.

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
        """Itself: generating and scoring take a bare decoder, the base LM, where they take a Larimar."""
        return self

    @property
    def embeddings(self) -> Float[Array, "V D"]:
        """The token embedding table."""
        return self.word.embedding[...]

    def _check(self, length: int, prefix, cache: Cache | None, tree: Tree | None) -> None:
        room = self.room(prefix)
        if cache is not None:
            held = cache.value.shape[3]
            if tree is not None:
                raise ValueError("tokens that branch follow no cache: a cache is one sequence")
            if length > held:
                raise ValueError(
                    f"{length} tokens do not fit a cache made for {held}; make it with"
                    f" empty_cache(batch, length) for prompt and continuation together"
                )
            length = held
        if tree is None and length > room:
            taken = f" (a memory slot takes one of {self.config.max_length})"
            raise ValueError(
                f"{length} tokens exceed this decoder's {room} positions"
                + (taken if room < self.config.max_length else "")
            )


def embed(
    table: nnx.Embed,
    tokens: Int[Array, "B T"],
    prefix: Prefix | None,
    dtype: DTypeLike,
    owner: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Token embeddings, plus its latent's vector on every token of an active row (§2)."""
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
    """Which tokens have an active latent, and which of their row's slots they see."""
    if prefix is None:
        return jnp.zeros((1, 1), bool), None
    slots = prefix.key.shape[2]
    if owner is None:
        active = prefix.active[:, None]
        return active, jnp.repeat(active[:, None], slots, axis=2)
    active = prefix.active.reshape(owner.shape[0], -1)
    mine = (owner[:, :, None] == jnp.arange(active.shape[1])) & active[:, None]
    return mine.any(axis=2), jnp.repeat(mine, slots, axis=2)


def _slots(
    prefix: Prefix, batch: int
) -> tuple[Float[Array, "L B G d S"], Float[Array, "L B G S d"]]:
    """The slots of each of so many rows of tokens, after each other."""
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
    """All layers' new keys and values in one write: the scan over layers only reads the cache."""
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
