"""GPT-2: LayerNorm, learned positions, a tied head; the decoder of Larimar-1.3B (§2)."""

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
class GPT2Config:
    """Sizes of a model."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    max_length: int = 1024
    norm_eps: float = 1e-5

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


class Block(nnx.Module):
    """Attention and a GELU MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.attention_norm = layers.LayerNorm(c.width, c.norm_eps)
        self.attention = layers.Attention(
            c.width, c.heads, c.heads, c.head_size, bias=True, dtype=dtype, rngs=rngs
        )
        self.mlp_norm = layers.LayerNorm(c.width, c.norm_eps)
        self.up = layers.linear(c.width, c.mlp, bias=True, dtype=dtype, rngs=rngs)
        self.down = layers.linear(c.mlp, c.width, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T S"], **context):
        """One layer; `context` is what `layers.Attention` takes. Also returns its cache."""
        mixed, past = self.attention(self.attention_norm(x), mask, **context)
        x = x + mixed
        # "gelu_new" is the tanh approximation.
        y = jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=True)
        return x + self.down(y), past


class GPT2(nnx.Module):
    """A causal language model that a latent can condition through a `Prefix` (§2).

    Calls are those of `decoders.llama.Llama`. The table of positions has max_length rows, so an
    active row, whose positions start at 1, has room for max_length − 1 tokens.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        c, dtype = config, jnp.dtype(dtype)
        self.config, self.dtype, self.remat = config, dtype, remat
        table = nnx.initializers.normal(0.02)
        self.word = nnx.Embed(c.vocab_size, c.width, embedding_init=table, rngs=rngs)
        self.position = nnx.Embed(c.max_length, c.width, embedding_init=table, rngs=rngs)
        self.layers = layers.stack(lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.depth, rngs)
        self.norm = layers.LayerNorm(c.width, c.norm_eps)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        prefix: Prefix | None = None,
        cache: Cache | None = None,
        start: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final, normalised hidden states in the compute dtype, and the cache with the tokens in.

        Indices, positions, slots and cache as in `Llama.hidden`.

        Raises:
          ValueError: more tokens than there are positions, or than the cache has room for.
        """
        c = self.config
        room = c.max_length - (prefix is not None)
        length = tokens.shape[1] if cache is None else cache.key.shape[2]
        if length > room:
            raise ValueError(
                f"{length} tokens exceed this decoder's {room} positions"
                " (a memory slot takes one of them)"
            )
        span = layers.locate(tokens, prefix, cache, start)
        x = layers.embed(self.embeddings, tokens, prefix, self.dtype)
        x = x + self.position.embedding[...][span.position].astype(x.dtype)
        x, cache = layers.run_decoder(
            self.layers, x, span, prefix, cache, turn=None, remat=self.remat
        )
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Next-token logits, float32. Gather the rows that are needed first: V is large."""
        kernel = self.embeddings.T
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


def from_huggingface(config: Mapping[str, Any]) -> GPT2Config:
    """The sizes in a Hugging Face config.json of this family.

    Raises:
      ValueError: a setting that this implementation does not compute.
    """
    unsupported = [
        text
        for text, bad in (
            (
                f"activation_function {config.get('activation_function')!r}",
                config.get("activation_function", "gelu_new") != "gelu_new",
            ),
            ("an untied head", not config.get("tie_word_embeddings", True)),
            ("unscaled attention", not config.get("scale_attn_weights", True)),
            ("scaling by layer", config.get("scale_attn_by_inverse_layer_idx", False)),
        )
        if bad
    ]
    if unsupported:
        raise ValueError(f"this GPT-2 does not compute: {', '.join(unsupported)}")
    return GPT2Config(
        vocab_size=config["vocab_size"],
        width=config["n_embd"],
        depth=config["n_layer"],
        heads=config["n_head"],
        mlp=config.get("n_inner") or 4 * config["n_embd"],
        max_length=config["n_positions"],
        norm_eps=config["layer_norm_epsilon"],
    )


CONFIG = GPT2Config
MODEL = GPT2

_TOP = r"(?:transformer\.)?"
_LAYER = _TOP + r"h\.(?P<layer>\d+)\."

# (source name, target parameter, transform): the format is explained in weights/fill.py.
# Conv1D weights are (in, out) already. c_attn holds query, key and value side by side.
KEYS = (
    (_TOP + r"wte\.weight", "word.embedding", "copy"),
    (_TOP + r"wpe\.weight", "position.embedding", "copy"),
    (_LAYER + r"ln_1\.weight", "layers.attention_norm.scale", "copy"),
    (_LAYER + r"ln_1\.bias", "layers.attention_norm.bias", "copy"),
    (_LAYER + r"attn\.c_attn\.weight", "layers.attention.query.kernel", "third_0"),
    (_LAYER + r"attn\.c_attn\.weight", "layers.attention.key.kernel", "third_1"),
    (_LAYER + r"attn\.c_attn\.weight", "layers.attention.value.kernel", "third_2"),
    (_LAYER + r"attn\.c_attn\.bias", "layers.attention.query.bias", "third_0"),
    (_LAYER + r"attn\.c_attn\.bias", "layers.attention.key.bias", "third_1"),
    (_LAYER + r"attn\.c_attn\.bias", "layers.attention.value.bias", "third_2"),
    (_LAYER + r"attn\.(?:masked_)?bias", None, "copy"),  # the causal mask
    (_LAYER + r"attn\.c_proj\.weight", "layers.attention.output.kernel", "copy"),
    (_LAYER + r"attn\.c_proj\.bias", "layers.attention.output.bias", "copy"),
    (_LAYER + r"ln_2\.weight", "layers.mlp_norm.scale", "copy"),
    (_LAYER + r"ln_2\.bias", "layers.mlp_norm.bias", "copy"),
    (_LAYER + r"mlp\.c_fc\.weight", "layers.up.kernel", "copy"),
    (_LAYER + r"mlp\.c_fc\.bias", "layers.up.bias", "copy"),
    (_LAYER + r"mlp\.c_proj\.weight", "layers.down.kernel", "copy"),
    (_LAYER + r"mlp\.c_proj\.bias", "layers.down.bias", "copy"),
    (_TOP + r"ln_f\.weight", "norm.scale", "copy"),
    (_TOP + r"ln_f\.bias", "norm.bias", "copy"),
    (r"lm_head\.weight", None, "copy"),  # tied: the same numbers as wte
)
