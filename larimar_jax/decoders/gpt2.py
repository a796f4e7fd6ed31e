"""GPT-2: LayerNorm, learned positions, a tied head; the decoder of Larimar-1.3B (§2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from larimar_jax import layers
from larimar_jax.decoders.base import Decoder, WholeHeads
from larimar_jax.layers import Context, Prefix


@dataclasses.dataclass(frozen=True)
class GPT2Config(WholeHeads):
    """Sizes of a model."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    max_length: int = 1024
    norm_eps: float = 1e-5


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

    def __call__(self, x: Float[Array, "B T D"], context: Context):
        """One layer, and its attention's keys and values."""
        mixed, own = self.attention(self.attention_norm(x), context)
        x = x + mixed
        # "gelu_new" is the tanh approximation.
        y = layers.gelu(self.up(self.mlp_norm(x)), approximate=True)
        return x + self.down(y), own


class GPT2(Decoder):
    """A causal language model that a latent can condition through a `Prefix` (§2).

    The table of positions has max_length rows, so an active row, whose positions start at 1, has
    room for max_length − 1 tokens.
    """

    BLOCK = Block

    def top(self, rngs: nnx.Rngs) -> None:
        """The table of positions, and the last norm."""
        c, table = self.config, nnx.initializers.normal(0.02)
        self.position = nnx.Embed(c.max_length, c.width, embedding_init=table, rngs=rngs)
        self.norm = layers.LayerNorm(c.width, c.norm_eps)

    def room(self, prefix: Prefix | None) -> int:
        """Tokens of a row; the table of positions has to hold the slot's as well."""
        return self.config.max_length - (prefix is not None)

    def place(
        self, x: Float[Array, "B T D"], position: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Adds learned positions."""
        return x + layers.look_up(self.position, position).astype(x.dtype)


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


def to_huggingface(config: GPT2Config) -> dict[str, Any]:
    """The config.json of a model of these sizes."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp,
        "n_positions": config.max_length,
        "n_ctx": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


CONFIG = GPT2Config
MODEL = GPT2
ADDED_TOKENS = ("<PAD>", "<BOS>", "<EOS>")
SHARDING = (*layers.SHARDING, (r"^position/embedding$", (None, "fsdp")))

_LAYER = "[transformer.]h.{layer}."
_FUSED = _LAYER + "attn.c_attn."

# (source name, target parameter, transform): the format is explained in weights/fill.py.
# Conv1D weights are (in, out) already. c_attn holds query, key and value side by side.
KEYS = (
    ("[transformer.]wte.weight", "word.embedding", "copy"),
    ("[transformer.]wpe.weight", "position.embedding", "copy"),
    (_LAYER + "ln_1.weight", "layers.attention_norm.scale", "copy"),
    (_LAYER + "ln_1.bias", "layers.attention_norm.bias", "copy"),
    (_FUSED + "weight", "layers.attention.query.kernel", "third_0"),
    (_FUSED + "weight", "layers.attention.key.kernel", "third_1"),
    (_FUSED + "weight", "layers.attention.value.kernel", "third_2"),
    (_FUSED + "bias", "layers.attention.query.bias", "third_0"),
    (_FUSED + "bias", "layers.attention.key.bias", "third_1"),
    (_FUSED + "bias", "layers.attention.value.bias", "third_2"),
    (_LAYER + "attn.[masked_]bias", None, "copy"),  # the causal mask
    (_LAYER + "attn.c_proj.weight", "layers.attention.output.kernel", "copy"),
    (_LAYER + "attn.c_proj.bias", "layers.attention.output.bias", "copy"),
    (_LAYER + "ln_2.weight", "layers.mlp_norm.scale", "copy"),
    (_LAYER + "ln_2.bias", "layers.mlp_norm.bias", "copy"),
    (_LAYER + "mlp.c_fc.weight", "layers.up.kernel", "copy"),
    (_LAYER + "mlp.c_fc.bias", "layers.up.bias", "copy"),
    (_LAYER + "mlp.c_proj.weight", "layers.down.kernel", "copy"),
    (_LAYER + "mlp.c_proj.bias", "layers.down.bias", "copy"),
    ("[transformer.]ln_f.weight", "norm.scale", "copy"),
    ("[transformer.]ln_f.bias", "norm.bias", "copy"),
    ("lm_head.weight", None, "copy"),  # tied: the same numbers as wte
)
