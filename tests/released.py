"""The authors' checkpoints in small, made by tests/golden, and tokenizers of their base models."""

import functools
import pathlib

import numpy as np
import tokenizers as hf
from tokenizers import models, pre_tokenizers, processors

from larimar_jax import convert
from larimar_jax.weights import ibm

GOLDEN = pathlib.Path(__file__).parent / "golden" / "ibm"
UNSAID = ibm.Assumptions(encoder_head=9, decoder_head=6, scope_threshold=0.9)
JAY = ibm.Assumptions(encoder_head=9, decoder_head=8, rotary=4)


@functools.cache
def golden(number):
    with np.load(GOLDEN / "golden.npz") as arrays:
        prefix = f"{number}/"
        return {n.removeprefix(prefix): arrays[n] for n in arrays.files if n.startswith(prefix)}


def bases(folder):
    """Folders with the base models' tokenizers: 40 tokens with [CLS] and [SEP], and 50 tokens."""
    return (
        base(folder / "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], 40, "[CLS]", "[SEP]"),
        base(folder / "gpt", ["<|endoftext|>", "[UNK]"], 50),
    )


def base(path, specials, size, *around):
    words = "the of is in capital France Japan Fact new 0 1 2 3 4 5 6 7".split()
    entries = [*specials, *words, *(f"word{i}" for i in range(size))][:size]
    ids = {word: i for i, word in enumerate(entries)}
    backend = hf.Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(specials)
    if around:
        before, after = around
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}",
            special_tokens=[(name, backend.token_to_id(name)) for name in around],
        )
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    return path


def converted(number, out, bases, **options):
    options = {"assumptions": JAY if number == 4 else UNSAID} | options
    return convert.from_ibm(
        GOLDEN / f"setting_{number}.ckpt",
        out,
        encoder_tokenizer=bases[0],
        decoder_tokenizer=bases[1],
        **options,
    )
