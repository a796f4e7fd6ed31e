"""Tokenizers out of files that hold only a vocabulary: GGUF metadata, vocab.txt, vocab.json.

All are built from the parts of the `tokenizers` library. What a vocabulary file does not say is how
its model splits a text before it merges; those rules are facts about each model.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from larimar_jax.weights.fill import WeightsError

# How a text is split before pieces are merged, by llama.cpp's names.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
}
_BYTE_LEVEL = ("default", "gpt-2", "llama-bpe", "qwen2", "smollm")

# Letters of a token; SentencePiece's are a few dozen. Each is tried in all its pairs of halves.
_LONGEST = 256
_MOST = 1 << 24  # ids; the largest vocabularies have 2¹⁸

# llama.cpp's kinds of token.
_UNKNOWN, _SPECIAL, _USER_DEFINED = 2, 3, 4


def from_gguf(metadata: Mapping[str, Any], path: str) -> hf.Tokenizer:
    """The tokenizer inside a GGUF file, byte-level BPE or SentencePiece's BPE; it adds nothing.

    A byte that a byte-level vocabulary lacks (SmolLM2's lacks 21 rare ones) leaves no token.

    Raises:
      WeightsError: a tokenizer of another kind, or lists that do not fit each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "default")
    tokens, types = (_list(metadata, f"tokenizer.ggml.{n}", path) for n in ("tokens", "token_type"))
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise WeightsError(f"{path}: its {len(tokens)} tokens have {len(types)} types; it is damaged")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise WeightsError(f"{path}: some of its tokens are there twice; it is damaged")
    if kind == "gpt2" and split in _BYTE_LEVEL:
        merges = _list(metadata, "tokenizer.ggml.merges", path)
        if not all(isinstance(merge, str) for merge in merges):
            raise WeightsError(f"{path}: some of its merges are no texts; it is damaged")
        backend = byte_level(vocabulary, merges, split, path)
    elif kind == "llama":
        scores = _list(metadata, "tokenizer.ggml.scores", path)
        if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
            raise WeightsError(f"{path}: some of its scores are no numbers; it is damaged")
        unknown = next((t for t, k in zip(tokens, types, strict=True) if k == _UNKNOWN), None)
        prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = _sentence_piece(vocabulary, scores, unknown, prefix, path)
    else:
        raise WeightsError(
            f"{path} holds a {kind!r} tokenizer with {split!r} pre-tokenization; SentencePiece"
            f" ('llama') and byte-level BPE ('gpt2') with {', '.join(_BYTE_LEVEL)} can be read. A"
            " folder with the model's tokenizer.json always can"
        )
    named = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([token for token, kind in named if kind == _SPECIAL])
    backend.add_tokens([token for token, kind in named if kind == _USER_DEFINED])
    return backend


def from_folder(folder: pathlib.Path, said: Mapping[str, Any]) -> hf.Tokenizer:
    """The tokenizer of a folder without tokenizer.json, from vocab.txt or vocab.json + merges.txt.

    Args:
      said: its tokenizer_config.json.

    Raises:
      FileNotFoundError: neither is there; says what to do about a SentencePiece file.
      WeightsError: files that are no vocabulary.
    """
    words, table, merges = (folder / n for n in ("vocab.txt", "vocab.json", "merges.txt"))
    if words.is_file():
        return _word_piece(words, said)
    if table.is_file() and merges.is_file():
        try:
            vocabulary = json.loads(table.read_text(encoding="utf-8"))
            lines = merges.read_text(encoding="utf-8").split("\n")
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{table} or {merges.name} is damaged ({error})") from error
        if not isinstance(vocabulary, dict):
            raise WeightsError(f"{table} is no table of tokens to numbers")
        odd = [t for t, i in vocabulary.items() if type(i) is not int or not 0 <= i < _MOST]
        if odd or len(set(vocabulary.values())) != len(vocabulary):
            what = f"of {odd[0][:40]!r} is no id" if odd else "of two tokens is the same"
            raise WeightsError(f"{table}: the number {what}; it is damaged")
        rules = [line for line in lines if line and not line.startswith("#version")]
        return byte_level(vocabulary, rules, "gpt-2", str(folder))
    hint = ""
    if (folder / "tokenizer.model").is_file():
        hint = (
            ". Its tokenizer.model is SentencePiece's; save it once with transformers:"
            " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    raise FileNotFoundError(
        f"there is no tokenizer in {folder}: no tokenizer.json, no vocab.txt, and no vocab.json with"
        f" merges.txt{hint}"
    )


def byte_level(
    vocabulary: Mapping[str, int], merges: Sequence[str], split: str, path: str
) -> hf.Tokenizer:
    """Byte-level BPE; merges are written "left right" (byte-level tokens hold no blank).

    Raises:
      WeightsError: merges of tokens that are not in the vocabulary.
    """
    pairs = [tuple(merge.split(" ")) for merge in merges]
    strange = [m for m, p in zip(merges, pairs, strict=True) if not _merges(p, vocabulary)]
    if strange:
        raise WeightsError(
            f"{path}: {len(strange)} merges are not of two of its tokens into a third, such as"
            f" {strange[0][:40]!r}; vocabulary and merges are of different models, or damaged"
        )
    # Llama 3 takes a whole word that is a token before it tries to merge.
    backend = hf.Tokenizer(
        models.BPE(dict(vocabulary), pairs, ignore_merges=split == "llama-bpe")
    )
    steps = []
    if split == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    if split in _SPLITS:
        steps = [pre_tokenizers.Split(hf.Regex(_SPLITS[split]), "isolated")]
    plain = split not in _SPLITS
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=plain))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _merges(pair: tuple[str, ...], vocabulary: Mapping[str, int]) -> bool:
    known = len(pair) == 2 and pair[0] in vocabulary and pair[1] in vocabulary
    return known and pair[0] + pair[1] in vocabulary


def _sentence_piece(
    vocabulary: Mapping[str, int],
    scores: Sequence[float],
    unknown: str | None,
    prefix: bool,
    path: str,
) -> hf.Tokenizer:
    """SentencePiece's BPE: the merge whose result has the best score goes first."""
    if len(scores) != len(vocabulary):
        raise WeightsError(f"{path}: {len(vocabulary)} tokens have {len(scores)} scores; damaged")
    if max(map(len, vocabulary), default=0) > _LONGEST:
        raise WeightsError(f"{path} has a token of over {_LONGEST} letters; it is damaged")
    ranked = []
    for token, number in vocabulary.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(-scores[number], pair) for pair in known]
    ranked.sort(key=lambda item: item[0])  # stable: equal scores stay in the vocabulary's order
    backend = hf.Tokenizer(
        models.BPE(
            dict(vocabulary),
            [pair for _, pair in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *blank] if prefix else blank
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps
    )
    return backend


def _word_piece(path: pathlib.Path, said: Mapping[str, Any]) -> hf.Tokenizer:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except ValueError as error:
        raise WeightsError(f"{path} is no text ({error}); it is damaged") from error
    vocabulary = {token: number for number, token in enumerate(lines) if token}
    if "[UNK]" not in vocabulary:
        raise WeightsError(f"{path} has no [UNK]; it is no vocabulary of a BERT")
    backend = hf.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=said.get("tokenize_chinese_chars", True),
        strip_accents=said.get("strip_accents"),
        lowercase=said.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocabulary]
    backend.add_special_tokens(specials)
    if {"[CLS]", "[SEP]"} <= vocabulary.keys():
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return backend


def _list(metadata: Mapping[str, Any], key: str, path: str) -> list[Any]:
    found = metadata.get(key)
    if not isinstance(found, list):
        raise WeightsError(f"{path} has no list {key}; it holds no tokenizer, or is damaged")
    return found
