"""GGUF files of Llama models, dequantised, under their Hugging Face names.

The header is parsed here: the `gguf` package's reader makes a numpy view per vocabulary entry,
which takes seconds where this takes a fraction of one. Its dequantisation is used as it is.
"""

import functools
import math
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from larimar_jax.weights.fill import WeightsError

# GGUF's value types as `struct` codes.
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
_STRING, _ARRAY = 8, 9

# llama.cpp's tensor names → Hugging Face's.
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    offset: int


class Gguf:
    """A `fill.Source` over a GGUF file, with its metadata and configuration.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: a file that is no GGUF of version 2 or 3, is cut short, or holds no Llama.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = str(path)
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"there is no weights file at {path}")
        try:
            self._data = np.memmap(path, np.uint8, mode="r")
            self.metadata, tensors, start = _header(memoryview(self._data))
        except (struct.error, UnicodeDecodeError, ValueError, KeyError, MemoryError) as error:
            raise self._damaged(error) from error
        if self.metadata.get("general.architecture") != "llama":
            raise WeightsError(
                f"{path} holds a {self.metadata.get('general.architecture')!r} model; GGUF files of"
                " Llama models are what can be read"
            )
        self._tensors = {_rename(name): tensor for name, tensor in tensors.items()}
        self._start = start
        for name, tensor in self._tensors.items():
            if start + tensor.offset + self._size(tensor) > self._data.size:
                raise self._damaged(f"tensor {name} ends after the file does")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape in Hugging Face's order, (out, in)."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, query and key rows in Hugging Face's order."""
        import gguf

        tensor = self._tensors[name]
        begin = self._start + tensor.offset
        # A plain array: every slice of a memmap costs more, and dequantisation makes many.
        data = np.asarray(self._data)[begin : begin + self._size(tensor)]
        # It goes by 16 rows, which are short here; longer ones, of whole blocks still, take half
        # the time.
        count = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        rows = data.reshape(count // math.gcd(count, 32), -1)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType(tensor.kind))
        values = np.asarray(values, np.float32).reshape(tensor.shape)
        config = self.config()
        if name.endswith("q_proj.weight"):
            return _unpermute(values, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            return _unpermute(values, config["num_key_value_heads"])
        return values

    def config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face config.json would say it."""
        get = self.metadata.get
        try:
            heads = self.metadata["llama.attention.head_count"]
            width = self.metadata["llama.embedding_length"]
            size = get("llama.attention.key_length") or get("llama.rope.dimension_count")
            scaling = get("llama.rope.scaling.type", "none")
            return {
                "model_type": "llama",
                "vocab_size": self._tensors["model.embed_tokens.weight"].shape[0],
                "hidden_size": width,
                "num_hidden_layers": self.metadata["llama.block_count"],
                "num_attention_heads": heads,
                "num_key_value_heads": get("llama.attention.head_count_kv", heads),
                "head_dim": size or width // heads,
                "intermediate_size": self.metadata["llama.feed_forward_length"],
                "max_position_embeddings": self.metadata["llama.context_length"],
                "rope_parameters": {
                    "rope_theta": get("llama.rope.freq_base", 10000.0),
                    "rope_type": "default" if scaling == "none" else scaling,
                },
                "rms_norm_eps": self.metadata["llama.attention.layer_norm_rms_epsilon"],
                "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            }
        except KeyError as error:
            raise WeightsError(f"{self.path} does not say its {error}") from error

    def _size(self, tensor: _Tensor) -> int:
        import gguf

        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        except ValueError as error:
            raise self._damaged(error) from error
        return int(np.prod(tensor.shape, dtype=np.int64)) // block * size

    def _damaged(self, reason: object) -> WeightsError:
        return WeightsError(
            f"{self.path} cannot be read as GGUF ({reason}); it is damaged or was cut short while"
            " being fetched. Fetch it again"
        )


@functools.lru_cache(maxsize=2)
def open_gguf(path: str) -> Gguf:
    """The file at `path`, parsed once for its tensors and its tokenizer."""
    return Gguf(path)


def _header(data: memoryview) -> tuple[dict[str, Any], dict[str, _Tensor], int]:
    """Metadata, tensors and where the tensors' bytes begin."""
    if bytes(data[:4]) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version, tensors, entries = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"version {version}, where 2 and 3 are known")
    at, metadata, table = 24, {}, {}

    def scalar(code: str):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize(code)
        return value

    def string() -> str:
        nonlocal at
        size = scalar("Q")
        if at + size > len(data):
            raise ValueError("a string ends after the file does")
        text = bytes(data[at : at + size]).decode("utf-8")
        at += size
        return text

    def value(kind: int):
        nonlocal at
        if kind == _STRING:
            return string()
        if kind != _ARRAY:
            return scalar(_SCALARS[kind])
        kind, count = scalar("I"), scalar("Q")
        if kind in (_STRING, _ARRAY):
            return [value(kind) for _ in range(count)]
        code = f"<{count}{_SCALARS[kind]}"
        items = struct.unpack_from(code, data, at)
        at += struct.calcsize(code)
        return list(items)

    for _ in range(entries):
        key = string()
        metadata[key] = value(scalar("I"))
    for _ in range(tensors):
        name = string()
        axes = scalar("I")
        shape = tuple(scalar("Q") for _ in range(axes))[::-1]  # GGUF names the fastest axis first
        table[name] = _Tensor(shape, scalar("I"), scalar("Q"))
    alignment = metadata.get("general.alignment", 32)
    return metadata, table, -(-at // alignment) * alignment


def _rename(name: str) -> str:
    """Hugging Face's name; an unknown one stays, and the strict fill will name it."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, part = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    return _NAMES.get(name, name)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's interleaving: the rows of a head from (i, half) to (half, i)."""
    out, inputs = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(out, inputs)
