"""GGUF files of Llama, Mistral, Qwen2 and GPT-2, dequantised, under their Hugging Face names."""

import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from larimar_jax import rotary
from larimar_jax.weights import gguf_header
from larimar_jax.weights.fill import WeightsError
from larimar_jax.weights.gguf_header import TensorInfo

# Divisors of rotary frequencies, which Hugging Face says by the rule that they follow.
_DIVISORS = "rope_freqs.weight"


class _Architecture(NamedTuple):
    """llama.cpp's names of tensors, and of a layer's, → Hugging Face's; and how to read them.

    {layer} is a layer's number; a suffix .weight or .bias is kept. transposed: names whose tensors
    Hugging Face stores (in, out).
    """

    layer: str
    parts: Mapping[str, str]
    top: Mapping[str, str]
    permuted: bool = False
    transposed: tuple[str, ...] = ()


_LLAMA = _Architecture(
    layer="model.layers.{layer}.",
    parts={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    top={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    permuted=True,
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA._replace(permuted=False),
    "gpt2": _Architecture(
        layer="transformer.h.{layer}.",
        parts={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}


class Gguf:
    """A `fill.Source` over a GGUF file, with its metadata and configuration.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: a file that is no GGUF of version 2 or 3, is cut short or damaged, holds tensors
        of an unknown kind, or a model of another architecture.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = str(path)
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"there is no weights file at {path}")
        try:
            header = gguf_header.read(self.path)
        except gguf_header.BadHeader as error:
            raise self._damaged(error) from error
        self.metadata, self._start = header.metadata, header.start
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise WeightsError(
                f"{path} holds a {self.architecture!r} model; GGUF files of"
                f" {', '.join(ARCHITECTURES)} are what can be read"
            )
        self._names = ARCHITECTURES[self.architecture]
        self._tensors: dict[str, TensorInfo] = {}
        for name, tensor in header.tensors.items():
            said = self._rename(name)
            if said in self._tensors:
                raise self._damaged(f"{name} and another tensor are both {said}")
            self._tensors[said] = tensor
        self._check(header.size)
        self._divisors = self._tensors.pop(_DIVISORS, None)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape as Hugging Face has it: (out, in), for GPT-2 (in, out)."""
        return {
            name: tensor.shape[::-1] if name.endswith(self._names.transposed) else tensor.shape
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, query and key rows in Hugging Face's order.

        Raises:
          WeightsError: the file was cut short since it was opened, or its head counts do not fit.
        """
        values = self._read(name, self._tensors[name])
        if name.endswith(self._names.transposed):
            return values.T
        if self._names.permuted and re.search(r"[qk]_proj\.(weight|bias)$", name):
            kind = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            return self._unpermute(values, self.config()[kind], name)
        return values

    @functools.cached_property
    def _blocks(self) -> Mapping[int, tuple[int, int]]:
        """Kinds that are read here → (numbers of a block, bytes of a block)."""
        import gguf

        plain = ("F32", "F16", "BF16")
        quantised = gguf.quants._type_traits  # what `gguf.dequantize` knows
        return {
            int(kind): size
            for kind, size in gguf.GGML_QUANT_SIZES.items()
            if kind.name in plain or kind in quantised
        }

    def _check(self, size: int) -> None:
        ends = []
        for name, tensor in self._tensors.items():
            if tensor.kind not in self._blocks:
                raise WeightsError(
                    f"{self.path}: tensor {name} is of kind {tensor.kind}, which is not read here; it"
                    " is damaged, or quantised in another way. Take an F16, Q8_0, Q4_0, Q4_1 or"
                    " K-quant file of the model"
                )
            block, _ = self._blocks[tensor.kind]
            if not tensor.shape or tensor.shape[-1] % block or 0 in tensor.shape:
                raise self._damaged(f"tensor {name} of shape {tensor.shape} in blocks of {block}")
            begin = self._start + tensor.offset
            ends.append((begin, begin + self._size(tensor), name))
            if ends[-1][1] > size:
                raise self._damaged(f"tensor {name} ends after the file does")
        ends.sort()
        for (_, end, name), (begin, _, other) in zip(ends, ends[1:], strict=False):
            if begin < end:
                raise self._damaged(f"tensors {name} and {other} overlap")

    def _size(self, tensor: TensorInfo) -> int:
        block, size = self._blocks[tensor.kind]
        return gguf_header.elements(tensor) // block * size

    def _read(self, name: str, tensor: TensorInfo) -> np.ndarray:
        import gguf

        size = self._size(tensor)
        # Read and not mapped: pages of a mapped file would count beside what is made of them.
        data = np.fromfile(self.path, np.uint8, size, offset=self._start + tensor.offset)
        if data.size != size:
            raise self._damaged(f"tensor {name} ends after the file does")
        # It goes by 16 rows, which are short here; longer ones, of whole blocks still, take half
        # the time.
        rows = math.prod(tensor.shape[:-1])
        values = gguf.dequantize(
            data.reshape(rows // math.gcd(rows, 32), -1), gguf.GGMLQuantizationType(tensor.kind)
        )
        return np.asarray(values, np.float32).reshape(tensor.shape)

    def _rename(self, name: str) -> str:
        """Hugging Face's name; an unknown one stays, and the strict fill will name it."""
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)(\.weight|\.bias)", name):
            layer, part, suffix = match.groups()
            if part in self._names.parts:
                return self._names.layer.format(layer=layer) + self._names.parts[part] + suffix
        if match := re.fullmatch(r"(\w+)(\.weight|\.bias)", name):
            return self._names.top.get(match[1], match[1]) + match[2]
        return name

    def _unpermute(self, values: np.ndarray, heads: int, name: str) -> np.ndarray:
        """Undoes llama.cpp's interleaving: the rows of a head from (i, half) to (half, i)."""
        if heads < 1 or len(values) % (2 * heads):
            raise self._damaged(f"{len(values)} rows of {name} for {heads} heads")
        pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face config.json would say it.

        Raises:
          WeightsError: a size that is missing, or a model of experts.
        """
        made = _CONFIGS[self.architecture]
        if self.metadata.get(f"{self.architecture}.expert_count"):
            raise WeightsError(f"{self.path} holds a mixture of experts, which is not computed here")
        try:
            return made(self)
        except KeyError as error:
            raise WeightsError(f"{self.path} does not say its {error}") from error

    def said(self, key: str, default: Any = None) -> Any:
        """A number of the architecture's own metadata; KeyError without one and without default."""
        key = f"{self.architecture}.{key}"
        value = self.metadata[key] if default is None else self.metadata.get(key, default)
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            raise self._damaged(f"{key} is a {type(value).__name__}")
        return value

    def rows(self, name: str) -> int:
        """The number of rows of a tensor; KeyError without it."""
        return self._tensors[name].shape[0]

    def has(self, name: str) -> bool:
        """Whether a tensor of that Hugging Face name is there."""
        return name in self._tensors

    def divisors(self) -> np.ndarray | None:
        """What the file divides rotary frequencies by, a number per pair, or None."""
        return None if self._divisors is None else self._read(_DIVISORS, self._divisors)

    def _damaged(self, reason: object) -> WeightsError:
        return WeightsError(
            f"{self.path} cannot be read as GGUF ({reason}); it is damaged or was cut short while"
            " being fetched. Fetch it again"
        )


@functools.lru_cache(maxsize=2)
def open_gguf(path: str) -> Gguf:
    """The file at `path`, parsed once for its tensors and its tokenizer."""
    return Gguf(path)


def _llama(file: Gguf) -> dict[str, Any]:
    heads, width = file.said("attention.head_count"), file.said("embedding_length")
    size = file.said("attention.key_length", 0) or file.said("rope.dimension_count", 0)
    window = file.said("attention.sliding_window", 0)
    return {
        # llama.cpp has Mistral under Llama's name.
        "model_type": "mistral" if window and file.architecture == "llama" else file.architecture,
        "vocab_size": file.rows("model.embed_tokens.weight"),
        "hidden_size": width,
        "num_hidden_layers": file.said("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.said("attention.head_count_kv", heads),
        "head_dim": size or (width // heads if heads else 0),
        "intermediate_size": file.said("feed_forward_length"),
        "max_position_embeddings": file.said("context_length"),
        "rope_parameters": _rope(file, size or (width // heads if heads else 0)),
        "rms_norm_eps": file.said("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not file.has("lm_head.weight"),
        **({"sliding_window": window} if window else {}),
        **({"use_sliding_window": False} if file.architecture == "qwen2" else {}),
    }


def _rope(file: Gguf, size: int) -> dict[str, Any]:
    theta = file.said("rope.freq_base", 10000.0)
    kind = file.said("rope.scaling.type", "none")
    said = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    if kind != "none":
        said["factor"] = file.said("rope.scaling.factor")
        said["original_max_position_embeddings"] = file.said(
            "rope.scaling.original_context_length", file.said("context_length")
        )
    if kind == "yarn":
        said["beta_fast"] = file.said("rope.scaling.yarn_beta_fast", 32.0)
        said["beta_slow"] = file.said("rope.scaling.yarn_beta_slow", 1.0)
    divisors = file.divisors()
    if divisors is None:
        return said
    # Llama 3.1 and later: the rule is not in the file, but only one has made such divisors so far.
    rule = rotary.RopeScaling("llama3", float(divisors.max()), 8192, 1.0, 4.0, 1.0)
    usual = rotary.frequencies(size, theta) / rotary.frequencies(size, theta, rule)
    if divisors.shape != usual.shape or not np.allclose(divisors, usual, rtol=1e-3):
        raise WeightsError(
            f"{file.path} divides its rotary frequencies by a rule that is not known here; load the"
            " model from a folder whose config.json says it"
        )
    return rotary.to_huggingface(theta, rule)


def _gpt2(file: Gguf) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": file.rows("transformer.wte.weight"),
        "n_embd": file.said("embedding_length"),
        "n_layer": file.said("block_count"),
        "n_head": file.said("attention.head_count"),
        "n_inner": file.said("feed_forward_length"),
        "n_positions": file.said("context_length"),
        "layer_norm_epsilon": file.said("attention.layer_norm_epsilon"),
    }


_CONFIGS: Mapping[str, Callable[[Gguf], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _llama,
    "gpt2": _gpt2,
}
