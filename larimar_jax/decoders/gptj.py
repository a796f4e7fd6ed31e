"""GPT-J: attention and MLP in parallel, partial rotary positions; the decoder of Larimar-6B (§2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from larimar_jax import layers, rotary
from larimar_jax.decoders.base import Decoder, WholeHeads
from larimar_jax.layers import Context


@dataclasses.dataclass(frozen=True)
class GPTJConfig(WholeHeads):
    """Sizes of a model. rotary: how many numbers of a head positions rotate."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    rotary: int
    max_length: int
    norm_eps: float

    def __post_init__(self):
        super().__post_init__()
        if self.rotary % 2 or not 0 < self.rotary <= self.head_size:
            raise ValueError(f"rotary must be even and at most {self.head_size}, not {self.rotary}")


class Block(nnx.Module):
    """Attention and a GELU MLP, both on the same normalised copy of the residual stream."""

    def __init__(self, config: GPTJConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
        self.attention = layers.Attention(
            c.width,
            c.heads,
            c.heads,
            c.head_size,
            bias=False,
            interleaved=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.up = layers.linear(c.width, c.mlp, bias=True, dtype=dtype, rngs=rngs)
        self.down = layers.linear(c.mlp, c.width, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], context: Context):
        """One layer, and its attention's keys and values."""
        y = self.norm(x)
        mixed, own = self.attention(y, context)
        # "gelu_new" is the tanh approximation.
        return x + mixed + self.down(layers.gelu(self.up(y), approximate=True)), own


class GPTJ(Decoder):
    """A causal language model that a latent can condition through a `Prefix` (§2)."""

    BLOCK = Block

    def top(self, rngs: nnx.Rngs) -> None:
        """The last norm and a head of its own."""
        c = self.config
        self.norm = layers.LayerNorm(c.width, c.norm_eps)
        self.head = layers.linear(c.width, c.vocab_size, bias=True, dtype=self.dtype, rngs=rngs)

    def turn(self, position: Int[Array, "B T"]) -> rotary.Turn:
        """Rotations of the first `rotary` numbers of every head; θ is 10,000."""
        return rotary.rotation(position, self.config.rotary, 10000.0)


def from_huggingface(config: Mapping[str, Any]) -> GPTJConfig:
    """The sizes in a Hugging Face config.json of this family.

    Raises:
      ValueError: a setting that this implementation does not compute.
    """
    act = config.get("activation_function", "gelu_new")
    if act != "gelu_new" or config.get("tie_word_embeddings", False):
        raise ValueError(
            f"this GPT-J computes gelu_new and an untied head, not {act!r} and"
            f" tie_word_embeddings={config.get('tie_word_embeddings', False)}"
        )
    return GPTJConfig(
        vocab_size=config["vocab_size"],
        width=config["n_embd"],
        depth=config["n_layer"],
        heads=config["n_head"],
        mlp=config.get("n_inner") or 4 * config["n_embd"],
        rotary=config["rotary_dim"],
        max_length=config["n_positions"],
        norm_eps=config["layer_norm_epsilon"],
    )


def to_huggingface(config: GPTJConfig) -> dict[str, Any]:
    """The config.json of a model of these sizes."""
    return {
        "model_type": "gptj",
        "architectures": ["GPTJForCausalLM"],
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp,
        "rotary_dim": config.rotary,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    }


CONFIG = GPTJConfig
MODEL = GPTJ
ADDED_TOKENS = ("<PAD>", "<BOS>", "<EOS>")
SHARDING = (
    *layers.SHARDING,
    (r"^head/kernel$", ("fsdp", "tensor")),
    (r"^head/bias$", ("tensor",)),
)

_LAYER = "[transformer.]h.{layer}."

# (source name, target parameter, transform): the format is explained in weights/fill.py.
KEYS = (
    ("[transformer.]wte.weight", "word.embedding", "copy"),
    (_LAYER + "ln_1.weight", "layers.norm.scale", "copy"),
    (_LAYER + "ln_1.bias", "layers.norm.bias", "copy"),
    (_LAYER + "attn.q_proj.weight", "layers.attention.query.kernel", "transpose"),
    (_LAYER + "attn.k_proj.weight", "layers.attention.key.kernel", "transpose"),
    (_LAYER + "attn.v_proj.weight", "layers.attention.value.kernel", "transpose"),
    (_LAYER + "attn.out_proj.weight", "layers.attention.output.kernel", "transpose"),
    (_LAYER + "attn.[masked_]bias", None, "copy"),  # the causal mask, and what it masks with
    (_LAYER + "attn.embed_positions", None, "copy"),  # follows from rotary_dim
    (_LAYER + "mlp.fc_in.weight", "layers.up.kernel", "transpose"),
    (_LAYER + "mlp.fc_in.bias", "layers.up.bias", "copy"),
    (_LAYER + "mlp.fc_out.weight", "layers.down.kernel", "transpose"),
    (_LAYER + "mlp.fc_out.bias", "layers.down.bias", "copy"),
    ("[transformer.]ln_f.weight", "norm.scale", "copy"),
    ("[transformer.]ln_f.bias", "norm.bias", "copy"),
    ("lm_head.weight", "head.kernel", "transpose"),
    ("lm_head.bias", "head.bias", "copy"),
)
