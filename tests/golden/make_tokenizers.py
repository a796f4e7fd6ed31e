"""Makes tokenizers/: vocabularies as models ship them, and what their own libraries make of them.

pip install transformers==5.23.0 sentencepiece==0.2.3; then, in this folder: python make_tokenizers.py
"""

import io
import json
import pathlib

import sentencepiece as spm
import tokenizers as hf
import transformers
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

OUT = pathlib.Path(__file__).parent / "tokenizers"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Élan vital, naïve café; 東京 is a city. 1234567 numbers and 3.14!",
    "She'll say WE'VE seen\n\n  it all\tbefore.   Trailing  blanks ",
    "unbelievable internationalisation of tokenizers, tokens, token",
]
TEXTS = [*CORPUS, "", " ", "an unseen 🙂 emoji", "x\r\ny", "ALL CAPS and lower"]
# What rules of splitting and normalising differ in.
EDGES = [
    "it's IT'S it’s we'LL 'tis ''s",
    "12 123 1234 12345 a1b22 1.5e-10 ٣٤٥ ½ x²",
    "cafe\u0301 naïve ÅNGSTRÖM straße İstanbul",
    "one\u00a0two\u2003three\u200bfour",
    " \n \n\n  x\t\ty \r\n\r\n z   ",
    "?!...(a) --b-- $5, #1; foo_bar\n\n- item",
    "東京 は the café 🙂🙂 ok",
]
BERT_OPTIONS = {
    "accents kept": {"do_lower_case": True, "strip_accents": False},
    "accents stripped": {"do_lower_case": False, "strip_accents": True},
    "chinese in words": {"do_lower_case": True, "tokenize_chinese_chars": False},
}


def byte_level_vocabulary() -> tuple[dict[str, int], list[str]]:
    """A byte-level BPE of 400 tokens and its merges."""
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    backend.train_from_iterator(CORPUS * 5, trainer)
    said = json.loads(backend.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in said["merges"]]
    return said["vocab"], merges


class Llama3(TikTokenConverter):
    """Llama 3's rules over a vocabulary in memory."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        super().__init__()
        self.known = vocabulary, merges

    def extract_vocab_merges_from_model(self, _: str) -> tuple[dict, list]:
        return self.known


def sentence_piece() -> tuple[dict[str, list], list[list[int]], list[list[int]]]:
    """A SentencePiece BPE with byte fallback: its vocabulary in llama.cpp's terms, and its ids."""
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=written,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = spm.SentencePieceProcessor(model_proto=written.getvalue())
    ids = range(model.get_piece_size())
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6))
    said = {
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "types": [next((kind for test, kind in kinds if test(i)), 1) for i in ids],
    }
    return said, model.encode(TEXTS), model.encode(EDGES)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    expected, edges = {"texts": TEXTS}, {"texts": EDGES}
    # BERT's: pieces of words, cased and not.
    letters = sorted({c for text in CORPUS for c in text if not c.isspace()})
    pieces = ["the", "The", "token", "##s", "##izers", "fox", "cafe", "café", "un", "##believable"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    words += [c for c in letters if c not in words]
    words += [f"##{c}" for c in letters if f"##{c}" not in words] + ["e", "##e", "b", "##b"]
    words = list(dict.fromkeys(words))
    for name, lower in (("uncased", True), ("cased", False)):
        folder = OUT / name
        folder.mkdir(exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        said = {"do_lower_case": lower, "tokenizer_class": "BertTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        theirs = transformers.BertTokenizerFast(
            vocab=str(folder / "vocab.txt"), do_lower_case=lower
        )
        expected[name] = [theirs(text)["input_ids"] for text in TEXTS]
        edges[name] = [theirs(text)["input_ids"] for text in EDGES]
    for name, options in BERT_OPTIONS.items():
        theirs = transformers.BertTokenizerFast(vocab=str(OUT / "cased" / "vocab.txt"), **options)
        ids = [theirs(text)["input_ids"] for text in EDGES]
        edges[name] = {"settings": options, "ids": ids}
    vocabulary, merges = byte_level_vocabulary()
    folder = OUT / "gpt2"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    theirs = transformers.GPT2TokenizerFast(vocab=vocabulary, merges=pairs)
    expected["gpt2"] = [theirs(text)["input_ids"] for text in TEXTS]
    edges["gpt2"] = [theirs(text)["input_ids"] for text in EDGES]
    # The same vocabulary under Qwen2's rules.
    theirs = transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=pairs)
    expected["qwen2"] = [theirs(text)["input_ids"] for text in TEXTS]
    edges["qwen2"] = [theirs(text)["input_ids"] for text in EDGES]
    edges["llama-bpe"] = [Llama3(vocabulary, pairs).converted().encode(t).ids for t in EDGES]
    said, expected["sentencepiece"], edges["sentencepiece"] = sentence_piece()
    (OUT / "sentencepiece.json").write_text(json.dumps(said, ensure_ascii=False))
    (OUT / "expected.json").write_text(json.dumps(expected, ensure_ascii=False))
    (OUT / "edges.json").write_text(json.dumps(edges, ensure_ascii=False))


if __name__ == "__main__":
    main()
