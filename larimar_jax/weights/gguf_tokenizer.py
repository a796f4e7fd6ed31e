"""The tokenizer inside a GGUF file: a vocabulary with merges or scores.

transformers builds it too, but wants torch for that.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers

from larimar_jax.weights.key_table import WeightsError

# How a text is split before pieces are merged, by llama.cpp's names: facts about each model.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
}
_LONGEST = 256  # letters of a token; each is tried in all its pairs of halves
_UNKNOWN, _SPECIAL, _USER_DEFINED = 2, 3, 4  # llama.cpp's kinds of token


def backend(metadata: Mapping[str, Any], path: str) -> hf.Tokenizer:
    """Build the tokenizer of GGUF metadata, byte-level BPE or SentencePiece's BPE; it adds nothing.

    A byte that a byte-level vocabulary lacks (SmolLM2's lacks 21 rare ones) leaves no token.

    Raises:
      WeightsError: a tokenizer of another kind, or lists that do not fit each other.
    """

    def values(key: str, kind: type) -> list[Any]:
        entries = metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(entries, list):
            raise WeightsError(f"{path} has no list tokenizer.ggml.{key}: no tokenizer, or damaged")
        if not all(isinstance(e, kind) and (kind is str or math.isfinite(e)) for e in entries):
            raise WeightsError(f"{path}: an entry of tokenizer.ggml.{key} is no {kind.__name__}")
        return entries

    kind = metadata.get("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "default")
    tokens, types = values("tokens", str), values("token_type", int)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if not len(tokens) == len(types) == len(vocabulary):
        raise WeightsError(
            f"{path}: {len(tokens)} tokens, {len(vocabulary)} of them different, have {len(types)} types"
        )
    if kind == "gpt2" and split in _SPLITS:
        built = _byte_level(vocabulary, values("merges", str), split, path)
    elif kind == "llama":
        scores = values("scores", float)
        if len(scores) != len(tokens) or max(map(len, tokens), default=0) > _LONGEST:
            raise WeightsError(
                f"{path}: {len(tokens)} tokens have {len(scores)} scores, or one of them has over"
                f" {_LONGEST} letters; it is damaged"
            )
        unknown = next((t for t, k in zip(tokens, types, strict=True) if k == _UNKNOWN), None)
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        built = _sentence_piece(vocabulary, scores, unknown, prefix)
    else:
        raise WeightsError(
            f"{path} holds a {kind!r} tokenizer with {split!r} pre-tokenization; SentencePiece"
            f" ('llama') and byte-level BPE ('gpt2') with {', '.join(_SPLITS)} can be read. A"
            " folder with the model's tokenizer.json always can"
        )
    named = list(zip(tokens, types, strict=True))
    built.add_special_tokens([token for token, kind in named if kind == _SPECIAL])
    built.add_tokens([token for token, kind in named if kind == _USER_DEFINED])
    return built


def _byte_level(
    vocabulary: Mapping[str, int], merges: Sequence[str], split: str, path: str
) -> hf.Tokenizer:
    """Byte-level BPE; merges are written "left right" (byte-level tokens hold no blank)."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    strange = [p for p in pairs if len(p) != 2 or not {*p, "".join(p)} <= vocabulary.keys()]
    if strange:
        raise WeightsError(
            f"{path}: {len(strange)} merges are not of two of its tokens into a third, such as"
            f" {' '.join(strange[0])[:40]!r}; vocabulary and merges are of different models, or damaged"
        )
    # Llama 3 takes a whole word that is a token before it tries to merge.
    backend = hf.Tokenizer(models.BPE(dict(vocabulary), pairs, ignore_merges=split == "llama-bpe"))
    rule = _SPLITS[split]
    steps = [pre_tokenizers.Split(hf.Regex(rule), "isolated")] if rule else []
    if split == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rule))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentence_piece(
    vocabulary: Mapping[str, int], scores: Sequence[float], unknown: str | None, prefix: bool
) -> hf.Tokenizer:
    """SentencePiece's BPE: the merge whose result has the best score goes first."""
    ranked = []
    for token, number in vocabulary.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in halves if vocabulary.keys() >= set(pair)]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(-scores[number], pair) for pair in known]
    ranked.sort(key=lambda item: item[0])  # stable: equal scores stay in the vocabulary's order
    merges = [pair for _, pair in ranked]
    backend = hf.Tokenizer(
        models.BPE(dict(vocabulary), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    blank = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*blank, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(steps)
    return backend
