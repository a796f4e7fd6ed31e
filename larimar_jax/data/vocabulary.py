"""The tokenizers of a run: those of its pretrained towers, or one trained on its own corpus."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from larimar_jax import weights
from larimar_jax.config import Config
from larimar_jax.weights.tokenizers import Tokenizer

SPECIAL = ("<PAD>", "<BOS>", "<EOS>")


def train_vocabulary(texts: Sequence[str], size: int, folder: str | Path) -> None:
    """Trains a byte-level BPE of `size` entries; writes encoder.json and decoder.json to `folder`.

    Both have the same entries. The encoder's frames a text as `<BOS> text <EOS>`, so that a pooler
    over the first position has one of its own; the decoder's leaves that to the episodes. The same
    texts give the same files.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != size:
        raise ValueError(
            f"data.vocabulary is {size}, but the corpus gives {model.get_vocab_size()} entries (256 "
            "bytes and 3 special ones are always there). Choose a size that it can fill."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(model, folder / "decoder.json")
    bos, eos = (model.token_to_id(token) for token in SPECIAL[1:])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<BOS> $A <EOS>", special_tokens=[("<BOS>", bos), ("<EOS>", eos)]
    )
    _write(model, folder / "encoder.json")


def _write(model: tokenizers.Tokenizer, path: Path) -> None:
    # Replaced whole: processes of one run that write it at once write the same.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    model.save(str(temporary))
    os.replace(temporary, path)


def tokenizers_of(
    config: Config, texts: Sequence[str], folder: str | Path
) -> tuple[Tokenizer, Tokenizer]:
    """The (encoder's, decoder's) tokenizer of a run.

    A tower with a `source` brings its own. For a tower without one, `data.vocabulary` says how many
    entries to train on `texts`, once: `folder` keeps the files, and a run that goes on reads them.

    Raises:
        ValueError: `data.vocabulary` is 0 where a tower needs it, or set where none does, or larger
            than a tower's embedding table.
    """
    model, size = config.model, config.data.vocabulary
    towers = {"encoder": model.encoder, "decoder": model.decoder}
    own = {name: tower for name, tower in towers.items() if tower.source is None}
    if bool(own) != bool(size):
        raise ValueError(
            f"data.vocabulary is {size}, and "
            + (f"{' and '.join(own)} bring no tokenizer" if own else "both towers bring their own")
            + ". It is the size of the vocabulary trained for towers without a source, else 0."
        )
    small = [f"model.{n}.vocab_size {t.sizes.vocab_size}" for n, t in own.items() if t.sizes.vocab_size < size]
    if small:
        raise ValueError(f"{', '.join(small)}: less than data.vocabulary {size}")
    folder = Path(folder)
    paths = {name: folder / f"{name}.json" for name in own}
    if not all(path.is_file() for path in paths.values()):
        train_vocabulary(texts, size, folder)
    read: dict[str, Any] = {name: Tokenizer.from_file(path) for name, path in paths.items()}
    for name, tower in towers.items():
        if name not in read:
            read[name] = weights.load_tokenizer(tower.source)
    return read["encoder"], read["decoder"]
