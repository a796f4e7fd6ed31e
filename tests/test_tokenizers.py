"""Tokenizers on the texts where splitting rules differ, and special tokens appended to one."""

import json
import pathlib
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax.weights import TextTooLong, Tokenizer, WeightsError, folder, tokenizer_files

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tokenizers"
EDGES = json.loads((GOLDEN / "edges.json").read_text())
OPTIONS = ("accents kept", "accents stripped", "chinese in words")
NAMES = ("<PAD>", "<BOS>", "<EOS>")


def differ(ids, want):
    """The texts whose tokens are not those of the model's own library."""
    return [t for t, right in zip(EDGES["texts"], want, strict=True) if ids(t) != right]


@pytest.mark.parametrize("name", ["uncased", "cased", "gpt2"])
def test_folders_of_a_vocabulary(name):
    made = folder.tokenizer(GOLDEN / name)
    assert not differ(lambda text: [*made.prefix, *made.ids(text), *made.suffix], EDGES[name])


@pytest.mark.parametrize("name", OPTIONS)
def test_settings_of_a_word_piece_tokenizer(tmp_path, name):
    shutil.copy(GOLDEN / "cased" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(EDGES[name]["said"]))
    made = folder.tokenizer(tmp_path)
    assert not differ(
        lambda text: [*made.prefix, *made.ids(text), *made.suffix], EDGES[name]["ids"]
    )
    plain = folder.tokenizer(GOLDEN / "uncased")
    assert differ(plain.ids, [ids[1:-1] for ids in EDGES[name]["ids"]])  # it makes a difference


def gguf_metadata(split):
    """What a GGUF file says of the golden byte-level vocabulary."""
    vocabulary = json.loads((GOLDEN / "gpt2" / "vocab.json").read_text())
    merges = (GOLDEN / "gpt2" / "merges.txt").read_text().split("\n")[1:-1]
    said = {"model": "gpt2", "pre": split, "merges": merges, "token_type": [1] * len(vocabulary)}
    said["tokens"] = sorted(vocabulary, key=vocabulary.get)
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()}


@pytest.mark.parametrize("split", ["gpt-2", "qwen2", "llama-bpe"])
def test_byte_level_splits_of_a_gguf(split):
    backend = tokenizer_files.from_gguf(gguf_metadata(split), "x.gguf")
    assert not differ(lambda text: backend.encode(text).ids, EDGES[split.replace("t-", "t")])


def test_sentence_piece_of_a_gguf():
    pieces = json.loads((GOLDEN / "sentencepiece.json").read_text())
    said = {f"tokenizer.ggml.{key}": pieces[key] for key in ("tokens", "scores")}
    said |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": pieces["types"]}
    backend = tokenizer_files.from_gguf(said, "x.gguf")
    assert not differ(lambda text: backend.encode(text).ids, EDGES["sentencepiece"])


def test_special_tokens_come_after_the_vocabulary_in_their_order():
    made = folder.tokenizer(GOLDEN / "gpt2")
    before, size = made.to_json(), made.vocab_size
    more = made.with_specials(NAMES)
    assert (more.pad, more.bos, more.eos, more.vocab_size) == (size, size + 1, size + 2, size + 3)
    assert made.to_json() == before
    assert made.with_specials(NAMES).hash == more.hash == Tokenizer.from_json(more.to_json()).hash
    assert more.decode([more.bos, *more.ids("a fox"), more.eos, more.pad]) == "a fox"


def test_special_tokens_that_are_there_keep_their_ids():
    made = Tokenizer.train(["a few words"], 280)
    assert made.with_specials(NAMES).hash == made.hash
    one = folder.tokenizer(GOLDEN / "gpt2").with_specials(("<EOS>", "<EOS>", "<EOS>"))
    assert one.pad == one.bos == one.eos == one.vocab_size - 1
    rest = one.with_specials(NAMES)
    assert (rest.eos, rest.pad, rest.bos) == (one.eos, one.vocab_size, one.vocab_size + 1)


def test_a_length_without_room_for_any_token():
    made = Tokenizer.train(["a few words"], 280).framed()
    assert made.encode(["a few words"], 2, truncate=True).mask.all()
    with pytest.raises(TextTooLong, match="2 tokens stand around every text, the limit is 1"):
        made.encode(["a few words"], 1, truncate=True)


GROWN = folder.tokenizer(GOLDEN / "gpt2").with_specials(NAMES)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30))
def test_appended_tokens_leave_texts_alone(text):
    plain = folder.tokenizer(GOLDEN / "gpt2").ids(text)
    assert GROWN.ids(text) == plain and GROWN.decode(plain) == text
    again = Tokenizer.from_json(GROWN.to_json())
    assert again.ids(f"<BOS>{text}<EOS>") == [GROWN.bos, *plain, GROWN.eos]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(merges=[1, 2]), "merges are no texts"),
        (dict(model="llama", scores=["a"] * 400), "scores are no numbers"),
        (dict(model="llama", scores=[float("nan")] * 400), "scores are no numbers"),
        (
            dict(model="llama", tokens=["a" * 10**5], token_type=[1], scores=[0.0]),
            "a token of over 256 letters",
        ),
    ],
)
def test_metadata_of_damaged_tokenizers(changed, message):
    changed = {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    with pytest.raises(WeightsError, match=message):
        tokenizer_files.from_gguf(gguf_metadata("gpt-2") | changed, "x.gguf")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ("[" * 10**5, "is damaged"),
        ('{"a": "b"}', "of 'a' is no id"),
        ('{"a": -1}', "of 'a' is no id"),
        ('{"a": true}', "of 'a' is no id"),
        ('{"a": 1099511627776}', "of 'a' is no id"),
        ('{"a": 1, "b": 1}', "of two tokens is the same"),
    ],
)
def test_vocabularies_that_are_none(tmp_path, vocabulary, message):
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(WeightsError, match=message):
        folder.tokenizer(tmp_path)


@pytest.mark.parametrize("said", [{"do_lower_case": "yes"}, {"strip_accents": 1}])
def test_switches_that_are_none(tmp_path, said):
    shutil.copy(GOLDEN / "cased" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(WeightsError, match=f"has {next(iter(said))} = "):
        folder.tokenizer(tmp_path)
