"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU; also SmolLM2, Qwen2, Mistral."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from larimar_jax import layers, rotary
from larimar_jax.decoders.base import Decoder
from larimar_jax.layers import Context
from larimar_jax.rotary import RopeScaling


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a model.

    attention_bias: on no kernel (Llama), on query, key and value (Qwen2), or on the output as well.
    window: how many tokens back a layer sees, itself included; 0 is all of them. The first
    `unwindowed` layers see everything.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    max_length: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_head: bool = True
    attention_bias: Literal["none", "qkv", "all"] = "none"
    mlp_bias: bool = False
    window: int = 0
    unwindowed: int = 0

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
            c.width,
            c.heads,
            c.kv_heads,
            c.head_size,
            bias=c.attention_bias != "none",
            output_bias=c.attention_bias == "all",
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = layers.RMSNorm(c.width, c.norm_eps)
        self.gate = layers.linear(c.width, c.mlp, bias=c.mlp_bias, dtype=dtype, rngs=rngs)
        self.up = layers.linear(c.width, c.mlp, bias=c.mlp_bias, dtype=dtype, rngs=rngs)
        self.down = layers.linear(c.mlp, c.width, bias=c.mlp_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], context: Context):
        """One layer, and its attention's keys and values."""
        mixed, own = self.attention(self.attention_norm(x), context)
        x = x + mixed
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y)), own


class Llama(Decoder):
    """A causal language model that a latent can condition through a `Prefix` (§2)."""

    BLOCK = Block

    def top(self, rngs: nnx.Rngs) -> None:
        """The last norm, and a head where it is not the embeddings."""
        c = self.config
        self.norm = layers.RMSNorm(c.width, c.norm_eps)
        if not c.tied_head:
            self.head = layers.linear(
                c.width, c.vocab_size, bias=False, dtype=self.dtype, rngs=rngs
            )

    def turn(self, position: Int[Array, "B T"]) -> rotary.Turn:
        """Rotations of whole heads."""
        c = self.config
        return rotary.rotation(position, c.head_size, c.rope_theta, c.rope_scaling)

    def windows(self) -> Int[np.ndarray, " L"] | None:
        """Each layer's window; one without a window gets the largest number."""
        c = self.config
        if not c.window or c.unwindowed >= c.depth:
            return None
        open_ended = np.iinfo(np.int32).max
        return np.where(np.arange(c.depth) < c.unwindowed, open_ended, c.window).astype(np.int32)


def from_huggingface(config: Mapping[str, Any]) -> LlamaConfig:
    """The sizes in a Hugging Face config.json of this family.

    Raises:
      ValueError: a setting that this implementation does not compute.
    """
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"this {config['model_type']} has hidden_act {act!r}; silu is computed")
    theta, scaling = rotary.from_huggingface(config)
    for said in (config, config.get("rope_parameters") or {}):
        if said.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(
                f"partial_rotary_factor is {said['partial_rotary_factor']!r}; whole heads are turned"
            )
    heads, width = config["num_attention_heads"], config["hidden_size"]
    bias = "all" if config.get("attention_bias", False) else "none"
    window, unwindowed = _windows(config)
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        width=width,
        depth=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or width // heads,
        mlp=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=config["rms_norm_eps"],
        tied_head=config.get("tie_word_embeddings", False),
        attention_bias="qkv" if config["model_type"] == "qwen2" else bias,
        mlp_bias=config.get("mlp_bias", False),
        window=window,
        unwindowed=unwindowed,
    )


def _windows(config: Mapping[str, Any]) -> tuple[int, int]:
    """(window, how many layers come before it), (0, 0) where no layer has one."""
    if config["model_type"] == "llama":
        return 0, 0
    # What Hugging Face takes where nothing is said.
    usual = {"sliding_window": 4096, "max_window_layers": 28, "use_sliding_window": False}
    if config["model_type"] != "qwen2":
        usual |= {"max_window_layers": 0, "use_sliding_window": True}
    said = {name: config.get(name, value) for name, value in usual.items()}
    said["sliding_window"] = said["sliding_window"] or 0  # null is none
    if odd := [n for n, value in usual.items() if type(said[n]) is not type(value)]:
        raise ValueError(", ".join(f"{n} is {said[n]!r}" for n in odd) + ", which does not belong there")
    depth, window, kinds = config["num_hidden_layers"], said["sliding_window"], config.get("layer_types")
    if not said["use_sliding_window"]:
        return 0, 0
    # A Mistral has a window from its first layer on, whatever else is said.
    first = said["max_window_layers"] if config["model_type"] == "qwen2" else 0
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != depth:
            raise ValueError(f"layer_types is no list of {depth} kinds of layers")
        first = kinds.index("sliding_attention") if "sliding_attention" in kinds else depth
        if any(kind != "sliding_attention" for kind in kinds[first:]):
            raise ValueError(
                "layer_types alternate; a sliding window from some layer on to the last is computed"
            )
    return (window, first) if window and first < depth else (0, 0)


def to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The config.json of a model of these sizes: as Llama, Mistral or Qwen2, whichever has them.

    Raises:
      ValueError: a combination that none of the three has.
    """
    c = config
    plain = not c.mlp_bias and c.attention_bias == "none"
    kind = "qwen2" if c.attention_bias == "qkv" else "mistral" if c.window else "llama"
    if (kind == "qwen2" and c.mlp_bias) or (kind == "mistral" and not (plain and not c.unwindowed)):
        raise ValueError(f"no Hugging Face family of Llama's kin has this combination: {c}")
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind]
    said = {
        "model_type": kind,
        "architectures": [f"{architecture}ForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.mlp,
        "max_position_embeddings": c.max_length,
        "rope_parameters": rotary.to_huggingface(c.rope_theta, c.rope_scaling),
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied_head,
    }
    if kind == "llama":
        said |= {"attention_bias": c.attention_bias == "all", "mlp_bias": c.mlp_bias}
    if kind == "mistral":
        said |= {"sliding_window": c.window}
    if kind == "qwen2":
        said |= {"use_sliding_window": bool(c.window), "sliding_window": c.window or None}
        said |= {"max_window_layers": c.unwindowed if c.window else c.depth}
    return said


CONFIG = LlamaConfig
MODEL = Llama
MODEL_TYPES = ("llama", "mistral", "qwen2")
SHARDING = (*layers.SHARDING, (r"^head/kernel$", ("fsdp", "tensor"), "optional"))

_LAYER = "model.layers.{layer}."
_SELF = _LAYER + "self_attn."

# (source name, target parameter, transform): the format is explained in weights/fill.py.
KEYS = (
    ("model.embed_tokens.weight", "word.embedding", "copy"),
    (_LAYER + "input_layernorm.weight", "layers.attention_norm.scale", "copy"),
    (_SELF + "q_proj.weight", "layers.attention.query.kernel", "transpose"),
    (_SELF + "k_proj.weight", "layers.attention.key.kernel", "transpose"),
    (_SELF + "v_proj.weight", "layers.attention.value.kernel", "transpose"),
    (_SELF + "o_proj.weight", "layers.attention.output.kernel", "transpose"),
    (_SELF + "q_proj.bias", "layers.attention.query.bias", "copy"),
    (_SELF + "k_proj.bias", "layers.attention.key.bias", "copy"),
    (_SELF + "v_proj.bias", "layers.attention.value.bias", "copy"),
    (_SELF + "o_proj.bias", "layers.attention.output.bias", "copy"),
    (_SELF + "rotary_emb.inv_freq", None, "copy"),  # follows from rope_theta
    (_LAYER + "post_attention_layernorm.weight", "layers.mlp_norm.scale", "copy"),
    (_LAYER + "mlp.gate_proj.weight", "layers.gate.kernel", "transpose"),
    (_LAYER + "mlp.up_proj.weight", "layers.up.kernel", "transpose"),
    (_LAYER + "mlp.down_proj.weight", "layers.down.kernel", "transpose"),
    (_LAYER + "mlp.gate_proj.bias", "layers.gate.bias", "copy"),
    (_LAYER + "mlp.up_proj.bias", "layers.up.bias", "copy"),
    (_LAYER + "mlp.down_proj.bias", "layers.down.bias", "copy"),
    ("model.norm.weight", "norm.scale", "copy"),
    ("lm_head.weight", "head.kernel?", "transpose"),
)
