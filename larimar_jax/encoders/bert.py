"""BERT (§2): the encoder of Larimar, and of MiniLM for the scope detector (§6)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import layers


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a model, and how it pools.

    pooling: 'cls' is the tanh pooler over [CLS] of the paper; 'mean' averages the real tokens.
    normalize: scale the pooled vector to unit length, as MiniLM's cosine store wants.
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

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"unknown pooling {self.pooling!r}; known: mean, cls")


class Block(nnx.Module):
    """Attention, then a GELU MLP, each followed by its residual and a LayerNorm (post-norm)."""

    def __init__(self, config: BertConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.attention = layers.Attention(
            c.width, c.heads, c.heads, c.width // c.heads, bias=True, dtype=dtype, rngs=rngs
        )
        self.attention_norm = layers.LayerNorm(c.width, c.norm_eps)
        self.up = layers.linear(c.width, c.mlp, bias=True, dtype=dtype, rngs=rngs)
        self.down = layers.linear(c.mlp, c.width, bias=True, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.LayerNorm(c.width, c.norm_eps)

    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B 1 S"]
    ) -> Float[Array, "B S D"]:
        mixed, _ = self.attention(x, layers.Context(mask))
        x = self.attention_norm(x + mixed)
        return self.mlp_norm(x + self.down(layers.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    """Tokens to one vector per text."""

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
        table = nnx.initializers.normal(0.02)
        self.word = nnx.Embed(c.vocab_size, c.width, embedding_init=table, rngs=rngs)
        self.position = nnx.Embed(c.max_length, c.width, embedding_init=table, rngs=rngs)
        self.kind = nnx.Embed(c.type_vocab, c.width, embedding_init=table, rngs=rngs)
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
        self.layers = layers.stack(lambda rngs: Block(c, dtype=dtype, rngs=rngs), c.depth, rngs)
        if c.pooling == "cls":
            self.pooler = layers.linear(c.width, c.width, bias=True, dtype=dtype, rngs=rngs)

    def hidden(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """The last layer's output for every token, in the compute dtype.

        mask is True on real tokens; what stands at the others is meaningless.

        Raises:
          ValueError: S exceeds the positions that the model has.
        """
        length = tokens.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"{length} tokens, but this encoder has {self.config.max_length} positions;"
                " split the text or encode it with truncate=True"
            )
        looked_up = (
            layers.look_up(self.word, tokens),
            layers.look_up(self.position, jnp.arange(length)),
            layers.look_up(self.kind, jnp.zeros((), jnp.int32)),
        )
        x = self.norm(sum(row.astype(jnp.float32) for row in looked_up)).astype(self.dtype)

        def call(block, x, _):
            return block(x, mask[:, None, :]), None

        return layers.scan_layers(self.layers, call, x, None, remat=self.remat)[0]

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]
    ) -> Float[Array, "B D"]:
        """One float32 vector per text (§2); see `BertConfig` for pooling. Raises as `hidden`."""
        x = self.hidden(tokens, mask)
        if self.config.pooling == "cls":
            pooled = jnp.tanh(self.pooler(x[:, 0])).astype(jnp.float32)
        else:
            weight = mask.astype(jnp.float32)[:, :, None]
            total = jnp.sum(x.astype(jnp.float32) * weight, axis=1)
            pooled = total / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
        if self.config.normalize:
            square = jnp.sum(jnp.square(pooled), axis=1, keepdims=True)
            pooled = pooled * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return pooled

    @property
    def embeddings(self) -> Float[Array, "V D"]:
        """The word embedding table."""
        return self.word.embedding[...]


def from_huggingface(config: Mapping[str, Any]) -> BertConfig:
    """The sizes in a Hugging Face config.json of this family, with the paper's [CLS] pooling.

    Raises:
      ValueError: a setting that this implementation does not compute.
    """
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"BERT with hidden_act {config['hidden_act']!r} is not supported: gelu is")
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"BERT with {kind} positions is not supported: absolute is")
    return BertConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        # Hugging Face leaves out what is as usual.
        type_vocab=config.get("type_vocab_size", 2),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )


def to_huggingface(config: BertConfig) -> dict[str, Any]:
    """The config.json of a model of these sizes; how it pools is not said there."""
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.type_vocab,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
    }


CONFIG = BertConfig
MODEL = Bert
SHARDING = (
    *layers.SHARDING,
    (r"^(position|kind)/embedding$", (None, "fsdp")),
    (r"^pooler/kernel$", ("fsdp", "tensor"), "optional"),
    (r"^pooler/bias$", (), "optional"),
)

_WORDS = "[bert.]embeddings."
_LAYER = "[bert.]encoder.layer.{layer}."
_SELF = _LAYER + "attention.self."
_MIXED = _LAYER + "attention.output."

# (source name, target parameter, transform): the format is explained in weights/fill.py.
KEYS = (
    (_WORDS + "word_embeddings.weight", "word.embedding", "copy"),
    (_WORDS + "position_embeddings.weight", "position.embedding", "copy"),
    (_WORDS + "token_type_embeddings.weight", "kind.embedding", "copy"),
    (_WORDS + "LayerNorm.(weight|gamma)", "norm.scale", "copy"),
    (_WORDS + "LayerNorm.(bias|beta)", "norm.bias", "copy"),
    (_WORDS + "(position|token_type)_ids", None, "copy"),  # 0, 1, 2, …
    (_SELF + "query.weight", "layers.attention.query.kernel", "transpose"),
    (_SELF + "query.bias", "layers.attention.query.bias", "copy"),
    (_SELF + "key.weight", "layers.attention.key.kernel", "transpose"),
    (_SELF + "key.bias", "layers.attention.key.bias", "copy"),
    (_SELF + "value.weight", "layers.attention.value.kernel", "transpose"),
    (_SELF + "value.bias", "layers.attention.value.bias", "copy"),
    (_MIXED + "dense.weight", "layers.attention.output.kernel", "transpose"),
    (_MIXED + "dense.bias", "layers.attention.output.bias", "copy"),
    (_MIXED + "LayerNorm.(weight|gamma)", "layers.attention_norm.scale", "copy"),
    (_MIXED + "LayerNorm.(bias|beta)", "layers.attention_norm.bias", "copy"),
    (_LAYER + "intermediate.dense.weight", "layers.up.kernel", "transpose"),
    (_LAYER + "intermediate.dense.bias", "layers.up.bias", "copy"),
    (_LAYER + "output.dense.weight", "layers.down.kernel", "transpose"),
    (_LAYER + "output.dense.bias", "layers.down.bias", "copy"),
    (_LAYER + "output.LayerNorm.(weight|gamma)", "layers.mlp_norm.scale", "copy"),
    (_LAYER + "output.LayerNorm.(bias|beta)", "layers.mlp_norm.bias", "copy"),
    ("[bert.]pooler.dense.weight", "pooler.kernel?", "transpose"),
    ("[bert.]pooler.dense.bias", "pooler.bias?", "copy"),
    ("cls.*", None, "copy"),  # heads of BERT's own pre-training
)
