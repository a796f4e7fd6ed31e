"""GGUF files of Llama, Mistral, Qwen2 and GPT-2, dequantised, under their Hugging Face names."""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from larimar_jax import rotary
from larimar_jax.weights import gguf_tokenizer
from larimar_jax.weights.gguf_file import TensorInfo, damaged, read_header, read_tensor
from larimar_jax.weights.key_table import WeightsError, require_file
from larimar_jax.weights.tokenizer import Tokenizer

# llama.cpp's names of tensors → Hugging Face's, and how it has their rows: as they are, (in, out)
# of (out, in), or the two halves of each query or key head interleaved. {layer} is a layer's number.
_LLAMA = {
    "token_embd": ("model.embed_tokens", "copy"),
    "blk.{layer}.attn_norm": ("model.layers.{layer}.input_layernorm", "copy"),
    "blk.{layer}.attn_q": ("model.layers.{layer}.self_attn.q_proj", "queries"),
    "blk.{layer}.attn_k": ("model.layers.{layer}.self_attn.k_proj", "keys"),
    "blk.{layer}.attn_v": ("model.layers.{layer}.self_attn.v_proj", "copy"),
    "blk.{layer}.attn_output": ("model.layers.{layer}.self_attn.o_proj", "copy"),
    "blk.{layer}.ffn_norm": ("model.layers.{layer}.post_attention_layernorm", "copy"),
    "blk.{layer}.ffn_gate": ("model.layers.{layer}.mlp.gate_proj", "copy"),
    "blk.{layer}.ffn_up": ("model.layers.{layer}.mlp.up_proj", "copy"),
    "blk.{layer}.ffn_down": ("model.layers.{layer}.mlp.down_proj", "copy"),
    "output_norm": ("model.norm", "copy"),
    "output": ("lm_head", "copy"),
}
_GPT2 = {
    "token_embd": ("transformer.wte", "copy"),
    "position_embd": ("transformer.wpe", "copy"),
    "blk.{layer}.attn_norm": ("transformer.h.{layer}.ln_1", "copy"),
    "blk.{layer}.attn_qkv": ("transformer.h.{layer}.attn.c_attn", "transpose"),
    "blk.{layer}.attn_output": ("transformer.h.{layer}.attn.c_proj", "transpose"),
    "blk.{layer}.ffn_norm": ("transformer.h.{layer}.ln_2", "copy"),
    "blk.{layer}.ffn_up": ("transformer.h.{layer}.mlp.c_fc", "transpose"),
    "blk.{layer}.ffn_down": ("transformer.h.{layer}.mlp.c_proj", "transpose"),
    "output_norm": ("transformer.ln_f", "copy"),
    "output": ("lm_head", "copy"),
}
_QWEN2 = {own: (name, "copy") for own, (name, _) in _LLAMA.items()}
NAMES = {"llama": _LLAMA, "qwen2": _QWEN2, "gpt2": _GPT2}
# Divisors of rotary frequencies, which Hugging Face names by the rule that they follow.
_DIVISORS = "rope_freqs.weight"
# What llama.cpp lets a file change beside the kind of scaling, and the values that change nothing.
_NEUTRAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


class Gguf:
    """A `key_table.Source` over a GGUF file, with its configuration and tokenizer.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: here or in a method, a file that is no GGUF of version 2 or 3, is cut short or
        damaged, holds tensors of an unknown kind, or a model or tokenizer that is not computed here.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = str(path)
        require_file(path)
        self.metadata, tensors = read_header(self.path)
        if (parts := self.metadata.get("split.count", 1)) != 1:
            raise WeightsError(
                f"{path} is one of the {parts} parts of a model: join them with llama.cpp's"
                " `llama-gguf-split --merge FIRST-PART OUT`, and give OUT"
            )
        self.architecture = self.metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in NAMES:
            raise WeightsError(
                f"{path} holds a {self.architecture!r} model; GGUF files of {', '.join(NAMES)} are"
                " what can be read"
            )
        self._tensors: dict[str, TensorInfo] = {}
        self._kinds: dict[str, str] = {}
        for name, tensor in tensors.items():
            renamed, kind = self._rename(name)
            if renamed in self._tensors:
                raise damaged(self.path, f"{name} and another tensor are both {renamed}")
            self._tensors[renamed], self._kinds[renamed] = tensor, kind
        self._divisors = self._tensors.pop(_DIVISORS, None)

    def tensors(self) -> "Gguf":
        """Return the file as a source of tensors."""
        return self

    def pooling(self) -> dict[str, Any]:
        """Return nothing: a decoder does not pool."""
        return {}

    def tokenizer(self) -> Tokenizer:
        """Return the file's tokenizer, which puts nothing around a text.

        The file's own bos and eos are not taken: an instruct model names its chat turns there.
        """
        return Tokenizer.from_backend(gguf_tokenizer.backend(self.metadata, self.path), self.path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return every tensor's shape as Hugging Face has it: (out, in), for GPT-2 (in, out)."""
        return {
            name: tensor.shape[::-1] if self._kinds[name] == "transpose" else tensor.shape
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, float32, query and key rows in Hugging Face's order."""
        values, kind = read_tensor(self.path, self._tensors[name]), self._kinds[name]
        if kind == "copy":
            return values
        if kind == "transpose":
            return values.T
        heads = self._setting("attention.head_count", int)
        if kind == "keys":
            heads = self._setting("attention.head_count_kv", int, heads)
        return self._unpermute(values, heads, name)

    def _rename(self, name: str) -> tuple[str, str]:
        """Return Hugging Face's name; an unknown name stays, and the strict fill reports it."""
        stem, _, suffix = name.rpartition(".")
        layer = re.match(r"blk\.(\d+)\.", stem)
        template = stem if layer is None else stem.replace(layer[0], "blk.{layer}.", 1)
        if suffix not in ("weight", "bias") or template not in NAMES[self.architecture]:
            return name, "copy"
        stem, kind = NAMES[self.architecture][template]
        return (stem if layer is None else stem.replace("{layer}", layer[1])) + "." + suffix, kind

    def _unpermute(self, values: np.ndarray, heads: int, name: str) -> np.ndarray:
        """Undo llama.cpp's interleaving: the rows of a head from (i, half) to (half, i)."""
        if heads < 1 or len(values) % (2 * heads):
            raise damaged(self.path, f"{len(values)} rows of {name} for {heads} heads")
        pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def config(self) -> dict[str, Any]:
        """Return the metadata as a Hugging Face config.json."""
        if self.metadata.get(f"{self.architecture}.expert_count"):
            raise WeightsError(f"{self.path} holds a mixture of experts, not computed here")
        return self._gpt2() if self.architecture == "gpt2" else self._llama()

    def _setting(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a size (int), number (float) or text (str) of the architecture's metadata; a
        WeightsError for another type, a number below 0 or not finite, or nothing without a default."""
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        if value is None:
            raise WeightsError(
                f"{self.path} does not say its {key}; it was written by an old converter or is"
                " damaged. Convert it anew, or load the model from a folder"
            )
        valid = isinstance(value, (int, float) if kind is float else kind)
        if valid and kind is not str:
            valid = not isinstance(value, bool) and 0 <= value < math.inf
        if not valid:
            raise damaged(self.path, f"{key} is {str(value)[:60]!r}")
        return value

    def _rows(self, name: str) -> int:
        if name not in self._tensors:
            raise damaged(self.path, f"it has no tensor {name}")
        return self._tensors[name].shape[0]

    def _repeats(self, name: str, table: str) -> bool:
        """Whether two tables hold the same rows: equal, or quantised from the same numbers."""
        tensors = [self._tensors[n] for n in (name, table)]
        x, y = (read_tensor(self.path, tensor).ravel() for tensor in tensors)
        if len({tensor.kind for tensor in tensors}) == 1:
            return np.array_equal(x, y)
        # The best two bits a number err by a third of the spread: a correlation of 0.94.
        return x.shape == y.shape and bool(x @ y >= 0.9 * math.sqrt((x @ x) * (y @ y)))

    def _llama(self) -> dict[str, Any]:
        setting, plain = self._setting, self.architecture == "llama"
        heads, width = setting("attention.head_count", int), setting("embedding_length", int)
        size = setting("attention.key_length", int, 0) or (width // heads if heads else 0)
        window = setting("attention.sliding_window", int, 0)
        turned = setting("rope.dimension_count", int, size)
        if turned != size:
            raise WeightsError(
                f"{self.path} turns {turned} of the {size} numbers of a head by their position; whole"
                " heads are turned here. It is damaged, or of a model that only resembles Llama"
            )
        return {
            # llama.cpp has Mistral under Llama's name.
            "model_type": "mistral" if window and plain else self.architecture,
            "vocab_size": self._rows("model.embed_tokens.weight"),
            "hidden_size": width,
            "num_hidden_layers": setting("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": setting("attention.head_count_kv", int, heads),
            "head_dim": size,
            "intermediate_size": setting("feed_forward_length", int),
            "max_position_embeddings": setting("context_length", int),
            "rope_parameters": self._rope(size),
            "rms_norm_eps": setting("attention.layer_norm_rms_epsilon", float),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": plain and "model.layers.0.self_attn.o_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
            **({"sliding_window": window} if window else {}),
            **({} if plain else {"use_sliding_window": False}),
        }

    def _rope(self, size: int) -> dict[str, Any]:
        setting = self._setting
        theta = setting("rope.freq_base", float, 10000.0)
        if theta < 1:
            raise damaged(self.path, f"a rope.freq_base of {theta}")
        # Files of 2023 have a factor without its kind, the oldest in a key of its own; 0 is none.
        factor = setting("rope.scaling.factor", float, 0) or setting("rope.scale_linear", float, 0)
        kind = setting("rope.scaling.type", str, "none" if factor in (0, 1) else "linear")
        if kind not in ("none", "linear", "yarn"):
            raise WeightsError(
                f"{self.path} stretches its rotary positions by {kind!r}; none, linear, yarn and"
                " Llama 3's rule are computed"
            )
        if kind != "none" and factor == 0:
            raise damaged(self.path, f"its {kind} rope.scaling.factor is missing or 0")
        changed = [key for key, usual in _NEUTRAL.items() if setting(key, float, usual) != usual]
        if changed:
            raise WeightsError(f"{self.path} sets {', '.join(changed)}, which is not computed here")
        if self._divisors is not None:
            divisors = read_tensor(self.path, self._divisors)
            return self._llama3(size, theta, divisors, alone=kind == "none")
        if kind == "none":
            return {"rope_theta": theta, "rope_type": "default"}
        rope = {"rope_theta": theta, "rope_type": kind, "factor": factor}
        rope["original_max_position_embeddings"] = setting(
            "rope.scaling.original_context_length", int, setting("context_length", int)
        )
        if kind == "yarn":
            rope["beta_fast"] = setting("rope.scaling.yarn_beta_fast", float, 32.0)
            rope["beta_slow"] = setting("rope.scaling.yarn_beta_slow", float, 1.0)
        return rope

    def _llama3(
        self, size: int, theta: float, divisors: np.ndarray, *, alone: bool
    ) -> dict[str, Any]:
        """Return the rule of Llama 3.1 and later: only its divisors are in the file."""
        if alone and divisors.shape == (size // 2,) and 1 <= divisors.min() <= divisors.max() < 1e6:
            rule = rotary.RopeScaling("llama3", float(divisors.max()), 8192, 1.0, 4.0, 1.0)
            usual = rotary.frequencies(size, theta) / rotary.frequencies(size, theta, rule)
            # Made in float32, by others in another order.
            if np.allclose(divisors, usual, rtol=1e-4, atol=0):
                return rotary.to_huggingface(theta, rule)
        raise WeightsError(
            f"{self.path} divides its rotary frequencies by a rule that is not known here; load the"
            " model from a folder whose config.json has it"
        )

    def _gpt2(self) -> dict[str, Any]:
        setting = self._setting
        untied = "lm_head.weight" in self._tensors and not self._repeats(
            "transformer.wte.weight", "lm_head.weight"
        )
        return {
            "model_type": "gpt2",
            "vocab_size": self._rows("transformer.wte.weight"),
            "n_embd": setting("embedding_length", int),
            "n_layer": setting("block_count", int),
            "n_head": setting("attention.head_count", int),
            "n_inner": setting("feed_forward_length", int),
            "n_positions": setting("context_length", int),
            "layer_norm_epsilon": setting("attention.layer_norm_epsilon", float),
            "tie_word_embeddings": not untied,
        }
