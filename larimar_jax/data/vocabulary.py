"""The tokenizers of a run: those of its pretrained towers, or one trained on its own corpus."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from larimar_jax import weights
from larimar_jax.config import Config
from larimar_jax.weights import Tokenizer


def tokenizers(
    config: Config, texts: Callable[[], Iterable[str]], path: str | Path
) -> tuple[Tokenizer, Tokenizer]:
    """The (encoder's, decoder's) tokenizer of a run.

    A tower with a `source` brings its own. For a tower without one, a byte-pair vocabulary of
    `data.vocabulary` entries is trained on `texts()`, once: a run that goes on reads `path`.
    The encoder's frames a text as `<BOS> text <EOS>`, so that a pooler over the first position has
    one of its own; the decoder's leaves that to the episodes.

    Raises:
        ValueError: `data.vocabulary` is 0 where a tower needs it, or set where none does, or larger
            than a tower's embedding table.
    """
    size = config.data.vocabulary
    towers = {"encoder": config.model.encoder, "decoder": config.model.decoder}
    bare = {name: tower.sizes for name, tower in towers.items() if tower.source is None}
    if bool(bare) != bool(size):
        raise ValueError(
            f"data.vocabulary is {size}, and "
            + (f"{' and '.join(bare)} bring no tokenizer" if bare else "both towers bring one")
            + ". It is the size of the vocabulary trained for towers without a source, else 0."
        )
    small = [f"model.{n}.vocab_size {s.vocab_size}" for n, s in bare.items() if s.vocab_size < size]
    if small:
        raise ValueError(f"{', '.join(small)}: less than data.vocabulary {size}")
    trained = _trained(texts, size, Path(path)) if bare else None
    encoder, decoder = config.model.encoder.source, config.model.decoder.source
    return (
        trained.framed() if encoder is None else weights.load_tokenizer(encoder),
        trained if decoder is None else weights.load_tokenizer(decoder),
    )


def _trained(texts: Callable[[], Iterable[str]], size: int, path: Path) -> Tokenizer:
    if path.is_file():
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    made = Tokenizer.train(texts(), size)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced whole; processes of one run that write it at once write the same.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(made.to_json(), encoding="utf-8")
    os.replace(temporary, path)
    return made
