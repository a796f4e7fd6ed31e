"""Tokenizers built from bare vocabularies, against transformers and SentencePiece."""

import json
import pathlib
import shutil

import pytest

from larimar_jax.weights import Tokenizer, WeightsError, folder, tokenizer_files

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
PIECES = json.loads((GOLDEN / "sentencepiece.json").read_text())


def metadata(kind="gpt2", split="gpt-2", **changed):
    """GGUF metadata of the golden vocabularies."""
    if kind == "llama":
        found = {"tokens": PIECES["tokens"], "token_type": PIECES["types"]}
        found |= {"scores": PIECES["scores"]}
    else:
        vocabulary = json.loads((GOLDEN / "gpt2" / "vocab.json").read_text())
        merges = (GOLDEN / "gpt2" / "merges.txt").read_text().split("\n")[1:-1]
        tokens = sorted(vocabulary, key=vocabulary.get)
        types = [3 if token == "<|endoftext|>" else 1 for token in tokens]
        found = {"tokens": tokens, "token_type": types, "merges": merges, "pre": split}
    found |= {"model": kind} | changed
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("name", ["uncased", "cased", "gpt2"])
def test_folders_without_tokenizer_json(name):
    made = folder.tokenizer(GOLDEN / name)
    for text, ids in zip(EXPECTED["texts"], EXPECTED[name], strict=True):
        assert [*made.prefix, *made.ids(text), *made.suffix] == ids, text


@pytest.mark.parametrize("split", ["gpt-2", "default"])
def test_byte_level_of_a_gguf(split):
    backend = tokenizer_files.from_gguf(metadata(split=split), "x.gguf")
    for text, ids in zip(EXPECTED["texts"], EXPECTED["gpt2"], strict=True):
        assert backend.encode(text, add_special_tokens=False).ids == ids
        assert backend.decode(ids) == text


def test_qwen2_of_a_gguf():
    backend = tokenizer_files.from_gguf(metadata(split="qwen2"), "x.gguf")
    for text, ids in zip(EXPECTED["texts"], EXPECTED["qwen2"], strict=True):
        assert backend.encode(text, add_special_tokens=False).ids == ids, text


def test_llama_3_takes_up_to_three_digits_and_whole_words_first():
    vocabulary = json.loads((GOLDEN / "gpt2" / "vocab.json").read_text())
    tokens = [*sorted(vocabulary, key=vocabulary.get), "123", "4567"]
    backend = tokenizer_files.from_gguf(
        metadata(split="llama-bpe", tokens=tokens, token_type=[1] * len(tokens)), "x.gguf"
    )
    said = backend.encode("1234567", add_special_tokens=False).tokens
    assert said[0] == "123" and "4567" not in said  # no merge leads to "123": it is taken whole


def test_sentence_piece_of_a_gguf():
    backend = tokenizer_files.from_gguf(metadata("llama"), "x.gguf")
    for text, ids in zip(EXPECTED["texts"], EXPECTED["sentencepiece"], strict=True):
        assert backend.encode(text, add_special_tokens=False).ids == ids, text
        assert backend.decode(ids) == text


def test_an_answer_follows_its_prompt_after_one_blank():
    backend = tokenizer_files.from_gguf(metadata("llama"), "x.gguf")
    pieces = Tokenizer(backend, 1, 2, 0)
    plain = folder.tokenizer(GOLDEN / "gpt2")
    for made in (pieces, plain):
        whole = made.ids("The quick brown fox jumps")
        assert [*made.ids("The quick brown"), *made.following("fox jumps")] == whole


def test_special_tokens_are_appended_where_they_are_missing():
    made = folder.tokenizer(GOLDEN / "gpt2")
    size, names = made.vocab_size, ("<PAD>", "<BOS>", "<EOS>")
    more = made.with_specials(names)
    assert (more.pad, more.bos, more.eos) == (size, size + 1, size + 2)
    assert more.vocab_size == size + 3 and made.vocab_size == size
    assert more.with_specials(names).vocab_size == size + 3
    assert more.ids("a fox") == made.ids("a fox")
    assert more.ids("<BOS>a fox")[0] == more.bos
    again = Tokenizer.from_json(more.to_json())
    assert again.hash == more.hash != made.hash
    assert again.decode([again.bos, *again.ids("a fox"), again.eos]) == "a fox"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (metadata("bert"), "'bert' tokenizer"),
        (metadata(split="deepseek-coder"), "'deepseek-coder' pre-tokenization"),
        (metadata(merges=["a bcd"]), "1 merges are not of two of its tokens"),
        (metadata(token_type=[1]), "have 1 types"),
        (metadata("llama", scores=[0.0]), "have 1 scores"),
        (metadata(tokens=["a", "a"], token_type=[1, 1]), "there twice"),
        ({}, "no list tokenizer.ggml.tokens"),
    ],
)
def test_metadata_that_holds_no_tokenizer(said, message):
    with pytest.raises(WeightsError, match=message):
        tokenizer_files.from_gguf(said, "x.gguf")


def test_folders_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no vocab.json with merges.txt$"):
        folder.tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="save it once with transformers"):
        folder.tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(WeightsError, match=r"no \[UNK\]"):
        folder.tokenizer(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    shutil.copy(GOLDEN / "gpt2" / "merges.txt", tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(WeightsError, match="no table"):
        folder.tokenizer(tmp_path)
