"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU; SmolLM2 is one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import layers
from larimar_jax.layers import Cache, Prefix


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a model."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_head: bool = True

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv_heads evenly")
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_size, not {self.head_size}")


class Block(nnx.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.attention_norm = layers.RMSNorm(c.width, c.norm_eps)
        self.attention = layers.Attention(
            c.width, c.heads, c.kv_heads, c.head_size, bias=False, dtype=dtype, rngs=rngs
        )
        self.mlp_norm = layers.RMSNorm(c.width, c.norm_eps)
        self.gate = layers.linear(c.width, c.mlp, bias=False, dtype=dtype, rngs=rngs)
        self.up = layers.linear(c.width, c.mlp, bias=False, dtype=dtype, rngs=rngs)
        self.down = layers.linear(c.mlp, c.width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T S"], **context):
        """One layer; `context` is what `layers.Attention` takes. Also returns its cache."""
        mixed, past = self.attention(self.attention_norm(x), mask, **context)
        x = x + mixed
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), past


class Llama(nnx.Module):
    """A causal language model that a latent can condition through a `Prefix` (§2)."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        c, dtype = config, jnp.dtype(dtype)
        self.config, self.dtype, self.remat = config, dtype, remat
        table = nnx.initializers.normal(0.02)
        self.word = nnx.Embed(c.vocab_size, c.width, embedding_init=table, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.depth, rngs)
        self.norm = layers.RMSNorm(c.width, c.norm_eps)
        if not c.tied_head:
            self.head = layers.linear(
                c.width, c.vocab_size, bias=False, dtype=dtype, rngs=rngs
            )

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        start: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final, normalised hidden states in the compute dtype, and the cache with the tokens in.

        Token t of row b has index start[b] + t (start defaults to 0) and attends to every index up
        to its own and, in rows where `prefix` is active, to the P past slots. Its position is
        index + 1 in active rows (§2) and index in others. Padding goes on the right. A cached call
        passes the prefix again.

        Raises:
          ValueError: more tokens than max_length, or than the cache has room for.
        """
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens exceed this decoder's {c.max_length}")
        span = layers.locate(tokens, prefix, cache, start)
        x = layers.embed(self.embeddings, tokens, prefix, self.dtype)
        turn = layers.rotation(span.position, c.head_size, c.rope_theta)
        x, cache = layers.run_decoder(
            self.layers, x, span, prefix, cache, turn=turn, remat=self.remat
        )
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Next-token logits, float32. Gather the rows that are needed first: V is large."""
        kernel = self.embeddings.T if self.config.tied_head else self.head.kernel[...]
        return jnp.matmul(
            hidden.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32
        )

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `length` tokens in all, prompt and continuation.

        Raises:
          ValueError: length exceeds max_length.
        """
        c = self.config
        if length > c.max_length:
            raise ValueError(f"a cache of {length} exceeds this decoder's {c.max_length} tokens")
        return layers.empty_cache(
            c.depth, batch, length, c.kv_heads, c.head_size, self.dtype
        )

    @property
    def embeddings(self) -> Float[Array, "V D"]:
        """The token embedding table."""
        return self.word.embedding[...]


def from_huggingface(config: Mapping[str, Any]) -> LlamaConfig:
    """The sizes in a Hugging Face config.json of this family.

    Raises:
      ValueError: a setting that this implementation does not compute.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    act = config.get("hidden_act", "silu")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = [
        text
        for text, bad in (
            (f"rope scaling {kind!r}", kind != "default"),
            (f"hidden_act {act!r}", act != "silu"),
            ("attention_bias", config.get("attention_bias", False)),
            ("mlp_bias", config.get("mlp_bias", False)),
        )
        if bad
    ]
    if unsupported:
        raise ValueError(f"this Llama does not compute: {', '.join(unsupported)}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        width=width,
        depth=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or width // heads,
        mlp=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=config["rms_norm_eps"],
        tied_head=config.get("tie_word_embeddings", False),
    )


CONFIG = LlamaConfig
MODEL = Llama

_LAYER = r"model\.layers\.(?P<layer>\d+)\."

# (source name, target parameter, transform): the format is explained in weights/fill.py.
KEYS = (
    (r"model\.embed_tokens\.weight", "word.embedding", "copy"),
    (_LAYER + r"input_layernorm\.weight", "layers.attention_norm.scale", "copy"),
    (_LAYER + r"self_attn\.q_proj\.weight", "layers.attention.query.kernel", "transpose"),
    (_LAYER + r"self_attn\.k_proj\.weight", "layers.attention.key.kernel", "transpose"),
    (_LAYER + r"self_attn\.v_proj\.weight", "layers.attention.value.kernel", "transpose"),
    (_LAYER + r"self_attn\.o_proj\.weight", "layers.attention.output.kernel", "transpose"),
    (_LAYER + r"self_attn\.rotary_emb\.inv_freq", None, "copy"),  # follows from rope_theta
    (_LAYER + r"post_attention_layernorm\.weight", "layers.mlp_norm.scale", "copy"),
    (_LAYER + r"mlp\.gate_proj\.weight", "layers.gate.kernel", "transpose"),
    (_LAYER + r"mlp\.up_proj\.weight", "layers.up.kernel", "transpose"),
    (_LAYER + r"mlp\.down_proj\.weight", "layers.down.kernel", "transpose"),
    (r"model\.norm\.weight", "norm.scale", "copy"),
    (r"lm_head\.weight", "head.kernel?", "transpose"),
)
