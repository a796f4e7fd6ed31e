"""GPT-J: attention and MLP in parallel, partial rotary positions; the decoder of Larimar-6B (§2)."""

import dataclasses

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from larimar_jax import layers, rotary
from larimar_jax.decoders.decoder import Decoder
from larimar_jax.decoders.gpt2 import GPTSizes
from larimar_jax.layers import Context
from larimar_jax.registry import linear_keys, norm_keys


@dataclasses.dataclass(frozen=True)
class GPTJConfig(GPTSizes):
    """Sizes of a GPT-J. rotary: how many numbers of a head positions rotate."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    rotary: int
    max_length: int
    norm_eps: float

    hf_type = ("gptj", "GPTJForCausalLM")
    hf_names = GPTSizes.hf_names | {"rotary": "rotary_dim"}
    hf_fixed = {"activation_function": "gelu_new", "tie_word_embeddings": False}

    def __post_init__(self):
        super().__post_init__()
        if self.rotary % 2 or not 0 < self.rotary <= self.head_size:
            raise ValueError(f"rotary must be even and at most {self.head_size}, not {self.rotary}")


class GPTJBlock(nnx.Module):
    """Attention and a GELU MLP, both on the same normalised copy of the residual stream."""

    def __init__(self, config: GPTJConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, shared = config, dict(dtype=dtype, rngs=rngs)
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
        self.attention = layers.Attention(c, bias=False, interleaved=True, **shared)
        self.up = layers.Dense(c.width, c.mlp, bias=True, **shared)
        self.down = layers.Dense(c.mlp, c.width, bias=True, **shared)

    def __call__(self, x: Float[Array, "B T D"], context: Context):
        """Apply one layer; return its output, and its attention's keys and values."""
        y = self.norm(x)
        mixed, own = self.attention(y, context)
        # "gelu_new" is the tanh approximation.
        wide = layers.gelu(self.up(y, context), approximate=True)
        return x + mixed + self.down(wide, context), own


_LAYER = "[transformer.]h.{layer}."


class GPTJ(Decoder):
    """GPT-J as a decoder that a latent conditions through a `Prefix` (§2)."""

    CONFIG, BLOCK = GPTJConfig, GPTJBlock
    model_types = ("gptj",)
    added_tokens = ("<PAD>", "<BOS>", "<EOS>")
    # The published tokenizer has 143 of these, up to the embedding table's last row.
    spare_tokens = tuple(f"<|extratoken_{i}|>" for i in (1, 2, 3))
    sharding_rules = (
        *layers.SHARDING_RULES,
        (r"^head/kernel$", ("fsdp", "tensor")),
        (r"^head/bias$", ("tensor",)),
    )
    # (source name, target parameter, transform), as weights/key_table.py reads it.
    hf_keys = (
        ("[transformer.]wte.weight", "word.embedding", "copy"),
        *norm_keys(_LAYER + "ln_1", "layers.norm"),
        (_LAYER + "attn.q_proj.weight", "layers.attention.query.kernel", "transpose"),
        (_LAYER + "attn.k_proj.weight", "layers.attention.key.kernel", "transpose"),
        (_LAYER + "attn.v_proj.weight", "layers.attention.value.kernel", "transpose"),
        (_LAYER + "attn.out_proj.weight", "layers.attention.output.kernel", "transpose"),
        (_LAYER + "attn.[masked_]bias", None, "copy"),  # the causal mask, and what it masks with
        (_LAYER + "attn.embed_positions", None, "copy"),  # follows from rotary_dim
        *linear_keys(_LAYER + "mlp.fc_in", "layers.up"),
        *linear_keys(_LAYER + "mlp.fc_out", "layers.down"),
        *norm_keys("[transformer.]ln_f", "norm"),
        *linear_keys("lm_head", "head"),
    )

    def init_output(self, rngs: nnx.Rngs) -> None:
        """Create the last norm and the untied head."""
        c = self.config
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
        self.head = layers.Dense(c.width, c.vocab_size, bias=True, dtype=self.dtype, rngs=rngs)

    def rotation(self, position: Int[Array, "B T"]) -> rotary.Rotation:
        """Return rotations of the first `rotary` numbers of every head; θ is 10,000."""
        return rotary.rotation(position, self.config.rotary, 10000.0)
