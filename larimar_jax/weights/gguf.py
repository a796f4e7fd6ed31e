"""GGUF files of Llama, Mistral, Qwen2 and GPT-2, dequantised, under their Hugging Face names."""

import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from larimar_jax import rotary
from larimar_jax.weights import gguf_header
from larimar_jax.weights.fill import WeightsError
from larimar_jax.weights.gguf_header import TensorInfo
from larimar_jax.weights.gguf_names import ARCHITECTURES

# Divisors of rotary frequencies, which Hugging Face says by the rule that they follow.
_DIVISORS = "rope_freqs.weight"
# What llama.cpp lets a file change beside the kind of scaling, and the values that change nothing.
_NEUTRAL = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
_PIECE = 1024  # rows that are compared at once


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
            raise self.damaged(error) from error
        self.metadata, self._start = header.metadata, header.start
        self.architecture = self.metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise WeightsError(
                f"{path} holds a {self.architecture!r} model; GGUF files of"
                f" {', '.join(ARCHITECTURES)} are what can be read"
            )
        self._names = ARCHITECTURES[self.architecture]
        self._tensors: dict[str, TensorInfo] = {}
        for name, tensor in header.tensors.items():
            said = self._rename(name)
            if said in self._tensors:
                raise self.damaged(f"{name} and another tensor are both {said}")
            self._tensors[said] = tensor
        self._check(header)
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
          WeightsError: the file was cut short since it was opened, or its head counts are missing or
            do not fit.
        """
        values = self._read(self._tensors[name])
        if name.endswith(self._names.transposed):
            return values.T
        if self._names.permuted and re.search(r"[qk]_proj\.(weight|bias)$", name):
            heads = self.said("attention.head_count", int)
            if "k_proj" in name:
                heads = self.said("attention.head_count_kv", int, heads)
            return self._unpermute(values, heads, name)
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

    def _check(self, header: gguf_header.Header) -> None:
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
                raise self.damaged(f"tensor {name} of shape {tensor.shape} in blocks of {block}")
            if tensor.offset % header.alignment:
                raise self.damaged(
                    f"tensor {name} begins at {tensor.offset}, no multiple of {header.alignment}"
                )
            begin = self._start + tensor.offset
            ends.append((begin, begin + self._size(tensor), name))
            if ends[-1][1] > header.size:
                raise self.damaged(f"tensor {name} ends after the file does")
        ends.sort()
        for (_, end, name), (begin, _, other) in zip(ends, ends[1:], strict=False):
            if begin < end:
                raise self.damaged(f"tensors {name} and {other} overlap")

    def _size(self, tensor: TensorInfo) -> int:
        block, size = self._blocks[tensor.kind]
        return gguf_header.elements(tensor) // block * size

    def _bytes(self, tensor: TensorInfo, begin: int, size: int) -> UInt8[np.ndarray, " size"]:
        # Read and not mapped: pages of a mapped file would count beside what is made of them.
        data = np.fromfile(self.path, np.uint8, size, offset=self._start + tensor.offset + begin)
        if data.size != size:
            raise self.damaged("it is shorter than when it was opened")
        return data

    def _numbers(
        self, tensor: TensorInfo, data: UInt8[np.ndarray, " size"], rows: int
    ) -> np.ndarray:
        import gguf

        # It goes by 16 rows, which are short here; longer ones, of whole blocks still, take half
        # the time.
        values = gguf.dequantize(
            data.reshape(rows // math.gcd(rows, 32), -1), gguf.GGMLQuantizationType(tensor.kind)
        )
        return np.asarray(values, np.float32).reshape(rows, tensor.shape[-1])

    def _read(self, tensor: TensorInfo) -> np.ndarray:
        data = self._bytes(tensor, 0, self._size(tensor))
        return self._numbers(tensor, data, math.prod(tensor.shape[:-1])).reshape(tensor.shape)

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
            raise self.damaged(f"{len(values)} rows of {name} for {heads} heads")
        pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face config.json would say it.

        Raises:
          WeightsError: a size that is missing or no number, rotary positions by a rule that is not
            known, or a model of experts.
        """
        if self.metadata.get(f"{self.architecture}.expert_count"):
            raise WeightsError(
                f"{self.path} holds a mixture of experts, which is not computed here"
            )
        return _CONFIGS[self.architecture](self)

    def said(self, key: str, kind: type, default: Any = None) -> Any:
        """A size (int), number (float) or text (str) of the architecture's own metadata.

        Raises:
          WeightsError: another type; a number below 0 or not finite; nothing, and no default.
        """
        key = f"{self.architecture}.{key}"
        value = self.metadata.get(key, default)
        if value is None:
            raise WeightsError(
                f"{self.path} does not say its {key}; it was written by an old converter or is"
                " damaged. Convert it anew, or load the model from a folder"
            )
        good = isinstance(value, (int, float) if kind is float else kind)
        if good and kind is not str:
            good = not isinstance(value, bool) and 0 <= value < math.inf
        if not good:
            raise self.damaged(f"{key} is {str(value)[:60]!r}")
        return value

    def rows(self, name: str) -> int:
        """The number of rows of a tensor, by its Hugging Face name.

        Raises:
          WeightsError: there is no such tensor.
        """
        if name not in self._tensors:
            raise self.damaged(f"it has no tensor {name}")
        return self._tensors[name].shape[0]

    def has(self, name: str) -> bool:
        """Whether a tensor of that Hugging Face name is there."""
        return name in self._tensors

    def repeats(self, name: str, other: str) -> bool:
        """Whether two tables hold the same rows: equal, or quantised from the same numbers.

        They are read a piece at a time.
        """
        one, two = self._tensors[name], self._tensors[other]
        if one.shape != two.shape:
            return False
        rows, products = math.prod(one.shape[:-1]), np.zeros(3)
        for begin in range(0, rows, _PIECE):
            count = min(_PIECE, rows - begin)
            pieces = [
                self._bytes(t, begin * (self._size(t) // rows), count * (self._size(t) // rows))
                for t in (one, two)
            ]
            if one.kind == two.kind:
                if not np.array_equal(*pieces):
                    return False
                continue
            x, y = (
                self._numbers(t, piece, count).ravel().astype(np.float64)
                for t, piece in zip((one, two), pieces, strict=True)
            )
            products += x @ y, x @ x, y @ y
        # The best two bits a number err by a third of the spread: a correlation of 0.94.
        return bool(products[0] >= 0.9 * math.sqrt(products[1] * products[2]))

    def divisors(self) -> np.ndarray | None:
        """What the file divides rotary frequencies by, a number per pair, or None."""
        return None if self._divisors is None else self._read(self._divisors)

    def damaged(self, reason: object) -> WeightsError:
        """The error for a file that cannot be what it was."""
        return WeightsError(
            f"{self.path} cannot be read as GGUF ({reason}); it is damaged or was cut short while"
            " being fetched. Fetch it again"
        )


def open_gguf(path: str) -> Gguf:
    """The file at `path`, parsed once for its tensors and its tokenizer; again once it changed."""
    if not os.path.isfile(path):
        return Gguf(path)  # which says so
    status = os.stat(path)
    return _opened(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _opened(path: str, size: int, mtime_ns: int) -> Gguf:
    return Gguf(path)


def _llama(file: Gguf) -> dict[str, Any]:
    heads, width = file.said("attention.head_count", int), file.said("embedding_length", int)
    size = file.said("attention.key_length", int, 0) or (width // heads if heads else 0)
    window = file.said("attention.sliding_window", int, 0)
    turned = file.said("rope.dimension_count", int, size)
    if turned != size:
        raise WeightsError(
            f"{file.path} turns {turned} of the {size} numbers of a head by their position; whole"
            " heads are turned here. It is damaged, or of a model that only resembles Llama"
        )
    plain = file.architecture == "llama"
    return {
        # llama.cpp has Mistral under Llama's name.
        "model_type": "mistral" if window and plain else file.architecture,
        "vocab_size": file.rows("model.embed_tokens.weight"),
        "hidden_size": width,
        "num_hidden_layers": file.said("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.said("attention.head_count_kv", int, heads),
        "head_dim": size,
        "intermediate_size": file.said("feed_forward_length", int),
        "max_position_embeddings": file.said("context_length", int),
        "rope_parameters": _rope(file, size),
        "rms_norm_eps": file.said("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": not file.has("lm_head.weight"),
        "attention_bias": plain and file.has("model.layers.0.self_attn.o_proj.bias"),
        "mlp_bias": file.has("model.layers.0.mlp.up_proj.bias"),
        **({"sliding_window": window} if window else {}),
        **({} if plain else {"use_sliding_window": False}),
    }


def _rope(file: Gguf, size: int) -> dict[str, Any]:
    theta = file.said("rope.freq_base", float, 10000.0)
    if theta < 1:
        raise file.damaged(f"a rope.freq_base of {theta}")
    # Files of 2023 say a factor without its kind, the oldest in a key of its own; 0 is none.
    factor = file.said("rope.scaling.factor", float, 0) or file.said("rope.scale_linear", float, 0)
    kind = file.said("rope.scaling.type", str, "none" if factor in (0, 1) else "linear")
    if kind not in ("none", "linear", "yarn"):
        raise WeightsError(
            f"{file.path} stretches its rotary positions by {kind!r}; none, linear, yarn and Llama 3's"
            " rule are computed"
        )
    if kind != "none" and factor == 0:
        raise file.damaged(f"its {kind} rope.scaling.factor is missing or 0")
    changed = [key for key, usual in _NEUTRAL.items() if file.said(key, float, usual) != usual]
    if changed:
        raise WeightsError(f"{file.path} sets {', '.join(changed)}, which is not computed here")
    divisors = file.divisors()
    if divisors is not None:
        return _llama3(file, size, theta, divisors, alone=kind == "none")
    said = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    if kind != "none":
        said["factor"] = factor
        said["original_max_position_embeddings"] = file.said(
            "rope.scaling.original_context_length", int, file.said("context_length", int)
        )
    if kind == "yarn":
        said["beta_fast"] = file.said("rope.scaling.yarn_beta_fast", float, 32.0)
        said["beta_slow"] = file.said("rope.scaling.yarn_beta_slow", float, 1.0)
    return said


def _llama3(
    file: Gguf, size: int, theta: float, divisors: np.ndarray, *, alone: bool
) -> dict[str, Any]:
    """The rule of Llama 3.1 and later: it is not in the file, but only one has made divisors so far."""
    if alone and divisors.shape == (size // 2,) and 1 <= divisors.min() <= divisors.max() < 1e6:
        rule = rotary.RopeScaling("llama3", float(divisors.max()), 8192, 1.0, 4.0, 1.0)
        usual = rotary.frequencies(size, theta) / rotary.frequencies(size, theta, rule)
        # Made in float32, by others in another order.
        if np.allclose(divisors, usual, rtol=1e-4, atol=0):
            return rotary.to_huggingface(theta, rule)
    raise WeightsError(
        f"{file.path} divides its rotary frequencies by a rule that is not known here; load the"
        " model from a folder whose config.json says it"
    )


def _gpt2(file: Gguf) -> dict[str, Any]:
    tied = not file.has("lm_head.weight") or file.repeats(
        "transformer.wte.weight", "lm_head.weight"
    )
    return {
        "model_type": "gpt2",
        "vocab_size": file.rows("transformer.wte.weight"),
        "n_embd": file.said("embedding_length", int),
        "n_layer": file.said("block_count", int),
        "n_head": file.said("attention.head_count", int),
        "n_inner": file.said("feed_forward_length", int),
        "n_positions": file.said("context_length", int),
        "layer_norm_epsilon": file.said("attention.layer_norm_epsilon", float),
        "tie_word_embeddings": tied,
    }


_CONFIGS: Mapping[str, Callable[[Gguf], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _llama,
    "gpt2": _gpt2,
}
