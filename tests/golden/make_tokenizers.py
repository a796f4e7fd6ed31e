"""Makes tokenizers/*.json: what the models' own libraries make of the vocabularies beside them.

Those in folders are as models ship them: word pieces, and a byte-level BPE of 400 tokens of CORPUS.

pip install transformers==5.23.0 sentencepiece==0.2.3; then, in this folder: python make_tokenizers.py
"""

import io
import json
import pathlib

import sentencepiece as spm
import transformers
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


class Llama3(TikTokenConverter):
    """Llama 3's rules over a vocabulary in memory."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        super().__init__()
        self.known = vocabulary, merges

    def extract_vocab_merges_from_model(self, _: str) -> tuple[dict, list]:
        return self.known


def sentence_piece():
    """A SentencePiece BPE with byte fallback: its vocabulary in llama.cpp's terms, and its encoder."""
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
    vocabulary = {
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "types": [next((kind for test, kind in kinds if test(i)), 1) for i in ids],
    }
    return vocabulary, model.encode


def main() -> None:
    golden = {"expected": {"texts": TEXTS}, "edges": {"texts": EDGES}}

    def record(name, tokenize):
        for ids in golden.values():
            ids[name] = [tokenize(text) for text in ids["texts"]]

    def by(kind, **options):
        tokenizer = kind(**options)
        return lambda text: tokenizer(text)["input_ids"]

    word_pieces = transformers.BertTokenizerFast
    for name, lower in (("uncased", True), ("cased", False)):
        vocabulary = str(OUT / name / "vocab.txt")
        record(name, by(word_pieces, vocab=vocabulary, do_lower_case=lower))
    for name, options in BERT_OPTIONS.items():
        tokenize = by(word_pieces, vocab=vocabulary, **options)
        golden["edges"][name] = {"settings": options, "ids": [tokenize(text) for text in EDGES]}
    vocabulary = json.loads((OUT / "gpt2" / "vocab.json").read_text())
    merges = (OUT / "gpt2" / "merges.txt").read_text().split("\n")[1:-1]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    record("gpt2", by(transformers.GPT2TokenizerFast, vocab=vocabulary, merges=pairs))
    # The same vocabulary under the rules of Qwen2 and Llama 3.
    record("qwen2", by(transformers.Qwen2TokenizerFast, vocab=vocabulary, merges=pairs))
    llama = Llama3(vocabulary, pairs).converted()
    golden["edges"]["llama-bpe"] = [llama.encode(text).ids for text in EDGES]
    golden["sentencepiece"], encode = sentence_piece()
    for name in ("expected", "edges"):
        golden[name]["sentencepiece"] = encode(golden[name]["texts"])
    for name, content in golden.items():
        (OUT / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))


if __name__ == "__main__":
    main()
