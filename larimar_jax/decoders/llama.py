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
from larimar_jax.decoders.decoder import Decoder
from larimar_jax.layers import Context
from larimar_jax.registry import HuggingFaceSizes, linear_keys
from larimar_jax.rotary import RopeScaling


@dataclasses.dataclass(frozen=True)
class LlamaConfig(HuggingFaceSizes):
    """Sizes of a model of Llama's kin.

    attention_bias: on no kernel (Llama), on query, key and value (Qwen2), or on the output as well.
    window: how many tokens back a layer attends, itself included; 0 is all of them. The first
    `unwindowed` layers attend to everything.
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

    hf_type = ("llama", "LlamaForCausalLM")
    hf_names = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "mlp": "intermediate_size",
        "max_length": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tied_head": "tie_word_embeddings",
    }
    hf_fixed = {"hidden_act": "silu"}

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} kv_heads evenly")
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_size, not {self.head_size}")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "HuggingFaceSizes":
        """Return the sizes; as `HuggingFaceSizes.from_huggingface`."""
        head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        theta, scaling = rotary.from_huggingface(config)
        window, unwindowed = _windows(config)
        bias = "all" if config.get("attention_bias", False) else "none"
        return dataclasses.replace(
            super().from_huggingface({**config, "head_dim": head_size}),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias="qkv" if config["model_type"] == "qwen2" else bias,
            mlp_bias=config.get("mlp_bias", False),
            window=window,
            unwindowed=unwindowed,
        )

    def to_huggingface(self) -> dict[str, Any]:
        """Return the config.json: as Llama, Mistral or Qwen2, whichever has these sizes.

        Raises:
          ValueError: a combination that none of the three has.
        """
        plain = not self.mlp_bias and self.attention_bias == "none" and not self.unwindowed
        kind = "mistral" if self.window else "llama"
        kind = "qwen2" if self.attention_bias == "qkv" else kind
        if (kind == "qwen2" and self.mlp_bias) or (kind == "mistral" and not plain):
            raise ValueError(f"no Hugging Face family of Llama's kin has this combination: {self}")
        full = self.unwindowed if self.window else self.depth
        kinds = ["full_attention"] * full + ["sliding_attention"] * (self.depth - full)
        own = {
            "llama": {"attention_bias": self.attention_bias == "all", "mlp_bias": self.mlp_bias},
            "mistral": {"sliding_window": self.window},
            "qwen2": {
                "use_sliding_window": bool(self.window),
                "sliding_window": self.window or None,
                "max_window_layers": full,
                "layer_types": kinds,
            },
        }
        return {
            **super().to_huggingface(),
            "model_type": kind,
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "rope_parameters": rotary.to_huggingface(self.rope_theta, self.rope_scaling),
            **own[kind],
        }


def _windows(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (window, how many layers come before it), (0, 0) where no layer has one."""
    depth, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    kinds = config.get("layer_types") or ["sliding_attention"] * depth
    first = kinds.index("sliding_attention") if "sliding_attention" in kinds else depth
    windowed = config["model_type"] != "llama" and config.get("use_sliding_window", True)
    if not (window and windowed and first < depth):
        return 0, 0
    if any(kind != "sliding_attention" for kind in kinds[first:]):
        raise ValueError(
            "layer_types alternate; a sliding window from some layer on to the last is computed"
        )
    return window, first


class LlamaBlock(nnx.Module):
    """Attention and a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, shared = config, dict(dtype=dtype, rngs=rngs)
        self.attention_norm = layers.RMSNorm(c.width, c.norm_eps)
        biases = dict(bias=c.attention_bias != "none", output_bias=c.attention_bias == "all")
        self.attention = layers.Attention(c, **biases, **shared)
        self.mlp_norm = layers.RMSNorm(c.width, c.norm_eps)
        self.gate = layers.Dense(c.width, c.mlp, bias=c.mlp_bias, **shared)
        self.up = layers.Dense(c.width, c.mlp, bias=c.mlp_bias, **shared)
        self.down = layers.Dense(c.mlp, c.width, bias=c.mlp_bias, **shared)

    def __call__(self, x: Float[Array, "B T D"], context: Context):
        """Apply one layer; return its output, and its attention's keys and values."""
        mixed, own = self.attention(self.attention_norm(x), context)
        x = x + mixed
        y = self.mlp_norm(x)
        y = jax.nn.silu(self.gate(y, context)) * self.up(y, context)
        return x + self.down(y, context), own


_LAYER = "model.layers.{layer}."


class Llama(Decoder):
    """Llama and its kin as a decoder that a latent conditions through a `Prefix` (§2)."""

    CONFIG, BLOCK = LlamaConfig, LlamaBlock
    model_types = ("llama", "mistral", "qwen2")
    sharding_rules = (*layers.SHARDING_RULES, (r"^head/kernel$", ("fsdp", "tensor"), "optional"))
    # (source name, target parameter, transform), as weights/key_table.py reads it.
    hf_keys = (
        ("model.embed_tokens.weight", "word.embedding", "copy"),
        (_LAYER + "input_layernorm.weight", "layers.attention_norm.scale", "copy"),
        *linear_keys(_LAYER + "self_attn.q_proj", "layers.attention.query"),
        *linear_keys(_LAYER + "self_attn.k_proj", "layers.attention.key"),
        *linear_keys(_LAYER + "self_attn.v_proj", "layers.attention.value"),
        *linear_keys(_LAYER + "self_attn.o_proj", "layers.attention.output"),
        (_LAYER + "self_attn.rotary_emb.inv_freq", None, "copy"),  # follows from rope_theta
        (_LAYER + "post_attention_layernorm.weight", "layers.mlp_norm.scale", "copy"),
        *linear_keys(_LAYER + "mlp.gate_proj", "layers.gate"),
        *linear_keys(_LAYER + "mlp.up_proj", "layers.up"),
        *linear_keys(_LAYER + "mlp.down_proj", "layers.down"),
        ("model.norm.weight", "norm.scale", "copy"),
        ("lm_head.weight", "head.kernel?", "transpose"),
    )

    def init_output(self, rngs: nnx.Rngs) -> None:
        """Create the last norm, and a head where it is not tied to the embeddings."""
        c, dtype = self.config, self.dtype
        self.norm = layers.RMSNorm(c.width, c.norm_eps)
        if not c.tied_head:
            self.head = layers.Dense(c.width, c.vocab_size, bias=False, dtype=dtype, rngs=rngs)

    def rotation(self, position: Int[Array, "B T"]) -> rotary.Rotation:
        """Return rotations of whole heads."""
        c = self.config
        return rotary.rotation(position, c.head_size, c.rope_theta, c.rope_scaling)

    def windows(self) -> Int[np.ndarray, " L"] | None:
        """Return each layer's window; a layer without one gets the largest number."""
        c = self.config
        if not c.window or c.unwindowed >= c.depth:
            return None
        open_ended = np.iinfo(np.int32).max
        return np.where(np.arange(c.depth) < c.unwindowed, open_ended, c.window).astype(np.int32)
