"""GPT-2: LayerNorm, learned positions, a tied head; the decoder of Larimar-1.3B (§2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from larimar_jax import layers
from larimar_jax.decoders.decoder import Decoder
from larimar_jax.layers import Context
from larimar_jax.registry import HuggingFaceSizes, WholeHeads, linear_keys, norm_keys


class GPTSizes(WholeHeads, HuggingFaceSizes):
    """What the sizes of GPT-2 and GPT-J share; to Hugging Face, no `n_inner` is four times the width."""

    hf_names = {
        "vocab_size": "vocab_size",
        "width": "n_embd",
        "depth": "n_layer",
        "heads": "n_head",
        "mlp": "n_inner",
        "max_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
    }

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "HuggingFaceSizes":
        """Return the sizes; as `HuggingFaceSizes.from_huggingface`."""
        inner = config.get("n_inner") or 4 * config["n_embd"]
        return super().from_huggingface({**config, "n_inner": inner})


@dataclasses.dataclass(frozen=True)
class GPT2Config(GPTSizes):
    """Sizes of a GPT-2."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    max_length: int = 1024
    norm_eps: float = 1e-5

    hf_type = ("gpt2", "GPT2LMHeadModel")
    hf_fixed = {
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }

    def to_huggingface(self) -> dict[str, Any]:
        """Return the config.json; llama.cpp reads the length under another name."""
        return super().to_huggingface() | {"n_ctx": self.max_length}


class GPT2Block(nnx.Module):
    """Attention and a GELU MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.attention_norm = layers.LayerNorm(c.width, c.norm_eps)
        self.attention = layers.Attention(c, bias=True, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.LayerNorm(c.width, c.norm_eps)
        self.up = layers.Dense(c.width, c.mlp, bias=True, dtype=dtype, rngs=rngs)
        self.down = layers.Dense(c.mlp, c.width, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], context: Context):
        """Apply one layer; return its output, and its attention's keys and values."""
        mixed, own = self.attention(self.attention_norm(x), context)
        x = x + mixed
        # "gelu_new" is the tanh approximation.
        y = layers.gelu(self.up(self.mlp_norm(x), context), approximate=True)
        return x + self.down(y, context), own


_LAYER = "[transformer.]h.{layer}."


class GPT2(Decoder):
    """GPT-2 as a decoder that a latent conditions through a `Prefix` (§2).

    The table of positions has max_length rows, so an active row, whose positions start at 1, takes at
    most max_length − 1 tokens.
    """

    CONFIG, BLOCK = GPT2Config, GPT2Block
    model_types = ("gpt2",)
    added_tokens = ("<PAD>", "<BOS>", "<EOS>")
    sharding_rules = (*layers.SHARDING_RULES, (r"^position/embedding$", (None, "fsdp")))
    # (source name, target parameter, transform), as weights/key_table.py reads it. Conv1D
    # weights are (in, out) already. c_attn holds query, key and value side by side.
    hf_keys = (
        ("[transformer.]wte.weight", "word.embedding", "copy"),
        ("[transformer.]wpe.weight", "position.embedding", "copy"),
        *norm_keys(_LAYER + "ln_1", "layers.attention_norm"),
        *linear_keys(_LAYER + "attn.c_attn", "layers.attention.query", "third_0"),
        *linear_keys(_LAYER + "attn.c_attn", "layers.attention.key", "third_1"),
        *linear_keys(_LAYER + "attn.c_attn", "layers.attention.value", "third_2"),
        (_LAYER + "attn.[masked_]bias", None, "copy"),  # the causal mask
        *linear_keys(_LAYER + "attn.c_proj", "layers.attention.output", "copy"),
        *norm_keys(_LAYER + "ln_2", "layers.mlp_norm"),
        *linear_keys(_LAYER + "mlp.c_fc", "layers.up", "copy"),
        *linear_keys(_LAYER + "mlp.c_proj", "layers.down", "copy"),
        *norm_keys("[transformer.]ln_f", "norm"),
        ("lm_head.weight", None, "copy"),  # tied: the same numbers as wte
    )

    def init_output(self, rngs: nnx.Rngs) -> None:
        """Create the table of positions and the last norm."""
        c, draw = self.config, nnx.initializers.normal(0.02)
        self.position = nnx.Embed(c.max_length, c.width, embedding_init=draw, rngs=rngs)
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
