"""The tokenizers of a run: of its pretrained towers, beside its model, or trained on its corpus."""

import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from larimar_jax import weights
from larimar_jax.config import Config
from larimar_jax.weights import Tokenizer, model_file

# The file of a tower whose weights were converted into the model: it has a tokenizer, and no source.
OWN = "{tower}_tokenizer.json"


def files(folder: str | Path) -> list[Path]:
    """The tokenizers that a model in this folder has beside it, which it cannot be loaded without."""
    names = ("tokenizer.json", *(OWN.format(tower=tower) for tower in ("encoder", "decoder")))
    return [path for path in (Path(folder) / name for name in names) if path.is_file()]


def tokenizers(
    config: Config,
    texts: Callable[[], Iterable[str]],
    path: str | Path,
    loaded: Mapping[str, Tokenizer] = types.MappingProxyType({}),
) -> tuple[Tokenizer, Tokenizer]:
    """The (encoder's, decoder's) tokenizer of a run.

    A tower with a `source` brings its own; one that was converted with its weights has its in a file
    of its own beside `path`, as `OWN` says. For a tower without either, a byte-pair vocabulary of
    `data.vocabulary` entries is trained on `texts()`, once: a run that goes on reads `path`.
    The encoder's frames a text as `<BOS> text <EOS>`, so that a pooler over the first position has
    one of its own; the decoder's leaves that to the episodes.

    Args:
        loaded: of sources, by "encoder" and "decoder", that need not be read again.

    Raises:
        ValueError: `data.vocabulary` is 0 where a tower needs it, or set where none does; a tower
            that has both source and file; a vocabulary larger than a tower's embedding table.
    """
    size, folder = config.data.vocabulary, Path(path).parent
    towers = {"encoder": config.model.encoder, "decoder": config.model.decoder}
    own = {n: f for n in towers if (f := folder / OWN.format(tower=n)).is_file()}
    if twice := [str(file) for n, file in own.items() if towers[n].source is not None]:
        raise ValueError(
            f"{' and '.join(twice)}: a tower with a source brings its tokenizer. Take the file away, "
            "or give the tower its sizes instead of a source."
        )
    bare = [n for n, tower in towers.items() if tower.source is None and n not in own]
    if bool(bare) != bool(size):
        raise ValueError(
            f"data.vocabulary is {size}, and "
            + (f"{' and '.join(bare)} bring no tokenizer" if bare else "both towers bring one")
            + ". It is the size of the vocabulary trained for towers without a source, else 0. A "
            f"converted tower's is in {OWN.format(tower='NAME')} beside the model."
        )
    read = {n: Tokenizer.from_json(file.read_text(encoding="utf-8")) for n, file in own.items()}
    entries = [(n, size, "data.vocabulary") for n in bare]
    entries += [(n, tokenizer.vocab_size, "tokenizer") for n, tokenizer in read.items()]
    if small := [
        f"model.{n}.vocab_size {towers[n].sizes.vocab_size}: less than the {count} tokens of its {by}"
        for n, count, by in entries
        if towers[n].sizes.vocab_size < count
    ]:
        raise ValueError("; ".join(small))
    if bare:
        trained = _trained(texts, size, Path(path))
        read |= {n: trained.framed() if n == "encoder" else trained for n in bare}
    read = {**loaded, **read}
    return tuple(read.get(n) or weights.load_tokenizer(tower.source) for n, tower in towers.items())


def _trained(texts: Callable[[], Iterable[str]], size: int, path: Path) -> Tokenizer:
    if path.is_file():
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    tokenizer = Tokenizer.train(texts(), size)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced whole; processes of one run that write it at once write the same.
    model_file.replace_file(path, tokenizer.to_json())
    return tokenizer
