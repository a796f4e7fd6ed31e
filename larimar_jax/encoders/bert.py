"""BERT (§2): the encoder of Larimar, and of MiniLM for the scope detector (§6)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import layers
from larimar_jax.layers import Context
from larimar_jax.registry import HuggingFaceSizes, WholeHeads, linear_keys, norm_keys


@dataclasses.dataclass(frozen=True)
class BertConfig(WholeHeads, HuggingFaceSizes):
    """Sizes of a model, and how it pools.

    pooling: 'cls' is the tanh pooler over [CLS] of the paper; 'mean' averages the real tokens.
    normalize: scale the pooled vector to unit length, as MiniLM's cosine store wants. A config.json
    holds neither.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    max_length: int = 512
    type_vocab: int = 2
    norm_eps: float = 1e-12
    pooling: str = "cls"
    normalize: bool = False

    hf_type = ("bert", "BertModel")
    hf_names = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
        "max_length": "max_position_embeddings",
        "type_vocab": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
    }
    hf_fixed = {"hidden_act": "gelu", "position_embedding_type": "absolute"}

    def __post_init__(self):
        super().__post_init__()
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"unknown pooling {self.pooling!r}; known: mean, cls")


class BertBlock(nnx.Module):
    """Attention, then a GELU MLP, each followed by its residual and a LayerNorm (post-norm)."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.attention = layers.Attention(c, bias=True, dtype=dtype, rngs=rngs)
        self.attention_norm = layers.LayerNorm(c.width, c.norm_eps)
        self.up = layers.Dense(c.width, c.mlp, bias=True, dtype=dtype, rngs=rngs)
        self.down = layers.Dense(c.mlp, c.width, bias=True, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.LayerNorm(c.width, c.norm_eps)

    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        """Apply one layer."""
        mixed, _ = self.attention(x, context)
        x = self.attention_norm(x + mixed)
        wide = layers.gelu(self.up(x, context), approximate=False)
        return self.mlp_norm(x + self.down(wide, context))


_EMBEDDINGS = "[bert.]embeddings."
_LAYER = "[bert.]encoder.layer.{layer}."


def _norm_keys(source: str, target: str):
    return norm_keys(source + "LayerNorm", target, scale="(weight|gamma)", bias="(bias|beta)")


class Bert(nnx.Module):
    """Tokens to one vector per text."""

    CONFIG = BertConfig
    model_types = ("bert",)
    sharding_rules = (
        *layers.SHARDING_RULES,
        (r"^(position|kind)/embedding$", (None, "fsdp")),
        (r"^pooler/kernel$", ("fsdp", "tensor"), "optional"),
        (r"^pooler/bias$", (), "optional"),
    )
    # (source name, target parameter, transform), as weights/key_table.py reads it.
    hf_keys = (
        (_EMBEDDINGS + "word_embeddings.weight", "word.embedding", "copy"),
        (_EMBEDDINGS + "position_embeddings.weight", "position.embedding", "copy"),
        (_EMBEDDINGS + "token_type_embeddings.weight", "kind.embedding", "copy"),
        *_norm_keys(_EMBEDDINGS, "norm"),
        (_EMBEDDINGS + "(position|token_type)_ids", None, "copy"),  # 0, 1, 2, …
        *linear_keys(_LAYER + "attention.self.query", "layers.attention.query"),
        *linear_keys(_LAYER + "attention.self.key", "layers.attention.key"),
        *linear_keys(_LAYER + "attention.self.value", "layers.attention.value"),
        *linear_keys(_LAYER + "attention.output.dense", "layers.attention.output"),
        *_norm_keys(_LAYER + "attention.output.", "layers.attention_norm"),
        *linear_keys(_LAYER + "intermediate.dense", "layers.up"),
        *linear_keys(_LAYER + "output.dense", "layers.down"),
        *_norm_keys(_LAYER + "output.", "layers.mlp_norm"),
        ("[bert.]pooler.dense.weight", "pooler.kernel?", "transpose"),
        ("[bert.]pooler.dense.bias", "pooler.bias?", "copy"),
        ("cls.*", None, "copy"),  # heads of BERT's own pre-training
    )

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: layers.Remat = "none",
        rngs: nnx.Rngs,
    ):
        c, dtype = config, jnp.dtype(dtype)
        self.config, self.dtype, self.remat = config, dtype, remat
        draw = nnx.initializers.normal(0.02)
        self.word = nnx.Embed(c.vocab_size, c.width, embedding_init=draw, rngs=rngs)
        self.position = nnx.Embed(c.max_length, c.width, embedding_init=draw, rngs=rngs)
        self.kind = nnx.Embed(c.type_vocab, c.width, embedding_init=draw, rngs=rngs)
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
        self.layers = layers.stack(lambda rngs: BertBlock(c, dtype=dtype, rngs=rngs), c.depth, rngs)
        if c.pooling == "cls":
            self.pooler = layers.Dense(c.width, c.width, bias=True, dtype=dtype, rngs=rngs)

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        product_dtype: DTypeLike | None = None,
    ) -> Float[Array, "B S D"]:
        """Return the last layer's output for every token, in the compute dtype.

        Args:
          mask: True on real tokens; the output at the others is meaningless.
          product_dtype: what the factors of products with kernels are rounded to (`layers.product`).

        Raises:
          ValueError: S exceeds the positions that the model has.
        """
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"{length} tokens, but this encoder has {self.config.max_length} positions;"
                " split the text or encode it with truncate=True"
            )
        embeddings = (
            layers.look_up(self.word, tokens),
            layers.look_up(self.position, jnp.arange(length)),
            layers.look_up(self.kind, jnp.zeros((), jnp.int32)),
        )
        x = self.norm(sum(rows.astype(jnp.float32) for rows in embeddings)).astype(self.dtype)
        context = Context(mask[:, None, :], product_dtype=product_dtype)

        def call(block, x, _):
            return block(x, context), None

        return layers.scan_layers(self.layers, call, x, None, remat=self.remat)[0]

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        mask: Bool[Array, "B S"],
        product_dtype: DTypeLike | None = None,
    ) -> Float[Array, "B D"]:
        """Return one float32 vector per text (§2), pooled by `BertConfig`; as `hidden`."""
        return self.pool(self.hidden(tokens, mask, product_dtype), mask, product_dtype)

    def pool(
        self,
        hidden: Float[Array, "B S D"],
        mask: Bool[Array, "B S"],
        product_dtype: DTypeLike | None = None,
    ) -> Float[Array, "B D"]:
        """Return what `hidden` returned as one float32 vector per text, as a call does."""
        if self.config.pooling == "mean":
            return self.mean(hidden, mask)
        context = Context(mask[:, None, :], product_dtype=product_dtype)
        return self._scaled(jnp.tanh(self.pooler(hidden[:, 0], context)).astype(jnp.float32))

    def mean(
        self, hidden: Float[Array, "B S D"], chosen: Bool[Array, "B S"]
    ) -> Float[Array, "B D"]:
        """Return the float32 mean over chosen tokens, of length 1 if `normalize`; of none it is 0."""
        weight = chosen.astype(jnp.float32)[:, :, None]
        total = jnp.sum(hidden.astype(jnp.float32) * weight, axis=1)
        return self._scaled(total / jnp.maximum(jnp.sum(weight, axis=1), 1.0))

    def _scaled(self, pooled: Float[Array, "B D"]) -> Float[Array, "B D"]:
        if self.config.normalize:
            square = jnp.sum(jnp.square(pooled), axis=1, keepdims=True)
            pooled = pooled * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return pooled

    @property
    def embeddings(self) -> Float[Array, "V D"]:
        """The word embedding table."""
        return self.word.embedding[...]
