"""Tokenizers: ids as the models' own libraries give them, special tokens, and batches."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax import encoders, weights
from larimar_jax.weights import TextTooLong, Tokenizer, WeightsError, gguf_tokenizer, load
from larimar_jax.weights.huggingface import Folder
from larimar_jax.weights.tokenizer import bucket

ROOT = pathlib.Path(__file__).parent / "golden"
GOLDEN = ROOT / "tokenizers"
EXPECTED, EDGES, PIECES = (
    json.loads((GOLDEN / f"{name}.json").read_text())
    for name in ("expected", "edges", "sentencepiece")
)
SETTINGS = ("accents kept", "accents stripped", "chinese in words")
NAMES = ("<PAD>", "<BOS>", "<EOS>")
TRAINED = Tokenizer.train(["a few words to learn from, naïve café"], 300)


def folder(name):
    return Folder(GOLDEN / name).tokenizer()


def differ(ids, *golden):
    """The texts whose tokens are not those of the model's own library."""
    pairs = [pair for texts, want in golden for pair in zip(texts, want, strict=True)]
    return [text for text, want in pairs if ids(text) != want]


def both(name):
    """The golden texts, and where splitting rules differ."""
    return [(golden["texts"], golden[name]) for golden in (EXPECTED, EDGES)]


def framed(tokenizer):
    return lambda text: [*tokenizer.prefix, *tokenizer.ids(text), *tokenizer.suffix]


@pytest.mark.parametrize("name", ["uncased", "cased", "gpt2"])
def test_folders_of_a_vocabulary(name):
    assert not differ(framed(folder(name)), *both(name))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_word_piece_tokenizer(tmp_path, name):
    shutil.copy(GOLDEN / "cased" / "vocab.txt", tmp_path)
    config = EDGES[name]["settings"] | {"tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    want = EDGES[name]["ids"]
    assert not differ(framed(Folder(tmp_path).tokenizer()), (EDGES["texts"], want))
    assert differ(framed(folder("uncased")), (EDGES["texts"], want))  # it makes a difference


def metadata(kind="gpt2", split="gpt-2", **changed):
    """GGUF metadata of the golden vocabularies."""
    if kind == "llama":
        values = {"tokens": PIECES["tokens"], "token_type": PIECES["types"]}
        values |= {"scores": PIECES["scores"]}
    else:
        vocabulary = json.loads((GOLDEN / "gpt2" / "vocab.json").read_text())
        merges = (GOLDEN / "gpt2" / "merges.txt").read_text().split("\n")[1:-1]
        tokens = sorted(vocabulary, key=vocabulary.get)
        types = [3 if token == "<|endoftext|>" else 1 for token in tokens]
        values = {"tokens": tokens, "token_type": types, "merges": merges, "pre": split}
    values |= {"model": kind} | changed
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    ("kind", "split", "golden"),
    [
        ("gpt2", "gpt-2", both("gpt2")),
        ("gpt2", "default", both("gpt2")),
        ("gpt2", "qwen2", both("qwen2")),
        ("gpt2", "llama-bpe", [(EDGES["texts"], EDGES["llama-bpe"])]),
        ("llama", "", both("sentencepiece")),
    ],
)
def test_the_tokenizer_inside_a_gguf(kind, split, golden):
    backend = gguf_tokenizer.backend(metadata(kind, split), "x.gguf")
    assert not differ(lambda text: backend.encode(text, add_special_tokens=False).ids, *golden)
    if split not in ("qwen2", "llama-bpe"):
        for text, ids in zip(*golden[0], strict=True):
            assert backend.decode(ids) == text


def test_llama_3_takes_up_to_three_digits_and_whole_words_first():
    tokens = [*metadata()["tokenizer.ggml.tokens"], "123", "4567"]
    values = metadata(split="llama-bpe", tokens=tokens, token_type=[1] * len(tokens))
    pieces = gguf_tokenizer.backend(values, "x.gguf").encode("1234567").tokens
    assert pieces[0] == "123" and "4567" not in pieces  # no merge leads to "123": it is taken whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (metadata("bert"), "'bert' tokenizer"),
        (metadata(split="deepseek-coder"), "'deepseek-coder' pre-tokenization"),
        (metadata(merges=["a bcd"]), "1 merges are not of two of its tokens"),
        (metadata(merges=[1, 2]), "of tokenizer.ggml.merges is no str"),
        (metadata(token_type=[1]), "have 1 types"),
        (metadata(tokens=["a", "a"], token_type=[1, 1]), "1 of them different"),
        (metadata("llama", scores=[0.0]), "have 1 scores"),
        (metadata("llama", scores=["a"] * 400), "scores is no float"),
        (metadata("llama", scores=[float("nan")] * 400), "scores is no float"),
        (metadata("llama", tokens=["a" * 10**5], token_type=[1], scores=[0.0]), "over 256 letters"),
        ({}, "no list tokenizer.ggml.tokens"),
    ],
)
def test_metadata_that_holds_no_tokenizer(values, message):
    with pytest.raises(WeightsError, match=message):
        gguf_tokenizer.backend(values, "x.gguf")


@pytest.fixture(scope="module")
def smol():
    return weights.load_tokenizer("smollm2")


def test_smollm2_tokenizes_as_transformers_does(smol):
    golden = np.load(ROOT / "smollm2.npz")
    for i, text in enumerate(golden["texts"]):
        assert smol.ids(str(text)) == list(golden[f"ids_{i}"])
        assert smol.decode(golden[f"ids_{i}"]) == str(text)
    assert (smol.bos, smol.eos, smol.pad) == (0, 0, 2)
    assert smol.ids("<|endoftext|>") == [0]


def test_minilm_is_read_as_transformers_reads_it(minilm):
    model, tokenizer = minilm
    assert (model.config.pooling, model.config.normalize) == ("mean", True)
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.pad) == ((101,), (102,), 0)
    checkpoint = weights.open_checkpoint("minilm")
    theirs = Folder(checkpoint.path)
    assert load.describe(checkpoint, encoders) == load.describe(theirs, encoders)
    want = [framed(theirs.tokenizer())(text) for text in EDGES["texts"]]
    assert not differ(framed(tokenizer), (EDGES["texts"], want))
    # The file cuts at 128; here the caller decides.
    assert tokenizer.encode(["word " * 300]).mask.sum() == 302


def test_an_answer_follows_its_prompt_after_one_blank():
    pieces = Tokenizer(gguf_tokenizer.backend(metadata("llama"), "x.gguf"), 1, 2, 0)
    for tokenizer in (pieces, folder("gpt2")):
        whole = tokenizer.ids("The quick brown fox jumps")
        assert [*tokenizer.ids("The quick brown"), *tokenizer.following("fox jumps")] == whole


def test_words_are_tokens_of_letters_after_a_blank(smol):
    words = smol.words()
    assert {"city", "Rome"} <= {*words} and len(words) == len({*words})
    assert all(word.isalpha() and len(word) > 1 for word in words)
    assert all(len(smol.following(word)) == 1 for word in words[::500])


def test_special_tokens_come_after_the_vocabulary_in_their_order():
    plain = folder("gpt2")
    before, size = plain.to_json(), plain.vocab_size
    more = plain.with_specials(NAMES)
    assert (more.pad, more.bos, more.eos, more.vocab_size) == (size, size + 1, size + 2, size + 3)
    assert plain.to_json() == before
    again = Tokenizer.from_json(more.to_json())
    assert plain.with_specials(NAMES).hash == more.hash == again.hash != plain.hash
    assert more.with_specials(NAMES).hash == more.hash
    assert again.decode([again.bos, *again.ids("a fox"), again.eos, again.pad]) == "a fox"


def test_special_tokens_that_are_there_keep_their_ids():
    assert TRAINED.with_specials(NAMES).hash == TRAINED.hash
    single = folder("gpt2").with_specials(("<EOS>", "<EOS>", "<EOS>"))
    assert single.pad == single.bos == single.eos == single.vocab_size - 1
    rest = single.with_specials(NAMES)
    assert (rest.eos, rest.pad, rest.bos) == (single.eos, single.vocab_size, single.vocab_size + 1)


PLAIN = folder("gpt2")
LONGER = PLAIN.with_specials(NAMES)


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_a_byte_level_tokenizer_round_trips_any_text(text):
    assert TRAINED.decode(TRAINED.ids(text)) == text
    plain = PLAIN.ids(text)
    assert LONGER.ids(text) == plain and LONGER.decode(plain) == text
    assert LONGER.ids(f"<BOS>{text}<EOS>") == [LONGER.bos, *plain, LONGER.eos]


def test_a_trained_tokenizer_is_reproducible_and_goes_through_json():
    texts = ["the cat sat on the mat", "naïve café"]
    trained, again = Tokenizer.train(texts, 300), Tokenizer.train(texts, 300)
    assert trained.hash == again.hash != trained.framed().hash
    assert (trained.pad, trained.bos, trained.eos) == (0, 1, 2)
    back = Tokenizer.from_json(trained.framed().to_json())
    assert back.hash == trained.framed().hash
    ids, mask = back.encode(["日本 the cat"])
    row = ids[0, mask[0]]
    assert (row[0], row[-1]) == (trained.bos, trained.eos)
    assert back.decode(row) == "日本 the cat"
    with pytest.raises(ValueError, match="259 is the least"):
        Tokenizer.train(texts, 100)


def test_tokenizer_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        Tokenizer.from_file(path)
    path.write_text("{}")
    with pytest.raises(WeightsError, match="cannot be read as a tokenizer"):
        Tokenizer.from_file(path)
    path.write_text(TRAINED.backend.to_str())
    assert Tokenizer.from_file(path).bos == TRAINED.bos
    with pytest.raises(WeightsError, match="has no bos token <none>"):
        Tokenizer.from_file(path, bos="<none>")


def test_encode_pads_on_the_right_to_buckets(smol):
    batch = smol.encode(["one two three", "one"])
    assert batch.ids.shape == (2, 8)
    assert (batch.ids.dtype, batch.mask.dtype) == (np.int32, bool)
    np.testing.assert_array_equal(batch.mask.sum(1), [3, 1])
    assert (batch.ids[~batch.mask] == smol.pad).all()
    assert smol.encode([], 5).ids.shape == (0, 5)
    assert smol.encode(["word " * 9], multiple=4).ids.shape == (1, 12)
    with pytest.raises(TypeError, match="list of texts"):
        smol.encode("one text")
    lengths = [(0, 8, 8), (1, 8, 8), (8, 8, 8), (9, 8, 16), (5, 3, 6)]
    assert all(bucket(length, multiple) == want for length, multiple, want in lengths)


def test_a_text_that_is_too_long(minilm):
    _, tokenizer = minilm
    texts = ["short", "a rather longer text than that"]
    with pytest.raises(TextTooLong, match=r"text 1 \('a rather.*\) has 8 tokens, the limit is 6"):
        tokenizer.encode(texts, 6)
    batch = tokenizer.encode(texts, 6, truncate=True)
    assert (batch.ids[1, 0], batch.ids[1, 5]) == (tokenizer.bos, tokenizer.eos)  # [SEP] stays
    assert tokenizer.encode(texts, 2, truncate=True).mask.all()
    with pytest.raises(TextTooLong, match="2 tokens stand around every text, the limit is 1"):
        tokenizer.encode(texts, 1, truncate=True)
