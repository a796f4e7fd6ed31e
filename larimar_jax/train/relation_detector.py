"""Training of the scope detector that knows relations (scope.py): nothing is fitted by descent.

Its wordings are those of `data/relations`, each of one relation, and the prompts of CounterFact's
records without their subjects. The relations of a prompt are spread over the graph whose edges are the
records (`data/paraphrases`): half is what the wordings of `data/relations` say of it, half what its
neighbours are of. The threshold lets through few pairs of wordings of two relations that are left out of
the detector, a fold of relations at a time.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from larimar_jax import config as configs
from larimar_jax import pipeline, scope
from larimar_jax.data import edit_records, lexical, relations, vocabulary
from larimar_jax.data.edit_records import provenance
from larimar_jax.data.paraphrases import Paraphrases
from larimar_jax.scope import RelationDetector
from larimar_jax.weights import model_file

# Prompts of fewer records than this are left out: most are texts cut at a wrong place.
_LEAST = 3
_ROUNDS = 10
_FOLDS = 4
# The share of pairs of two unknown relations that the threshold lets through.
_LET_THROUGH = 0.05

Encode = Callable[[Sequence[str]], Float[np.ndarray, "n H"]]


@dataclasses.dataclass(frozen=True)
class RelationTraining:
    """A detector and its threshold, with its errors on relations that it was not given.

    curve: (threshold, share of wordings of one relation missed, share of pairs of two let through).
    """

    detector: RelationDetector
    threshold: float
    curve: tuple[tuple[float, float, float], ...]


def train(encode: Encode, paraphrases: Paraphrases) -> RelationTraining:
    """Return the detector of the shipped wordings and of the wordings of a benchmark's records.

    Args:
      encode: texts to pooled encodings; called once.
    """
    wordings = relations.wordings()
    texts = [text for words in wordings for text in words]
    labels = np.repeat(np.arange(len(wordings)), [*map(len, wordings)])
    templates, counts = paraphrases.graph(_LEAST)
    prompts = [template.replace("{}", lexical.PLACEHOLDER) for template in templates]
    encoded = np.asarray(encode([*texts, *prompts]), np.float32)
    encoded /= np.maximum(np.linalg.norm(encoded, axis=1, keepdims=True), 1e-9)
    own, more = encoded[: len(texts)], encoded[len(texts) :]
    fold = np.random.default_rng(0).permutation(len(wordings)) % _FOLDS
    same, different = [], []
    for number in range(_FOLDS):
        inside = fold[labels] != number
        part = _detector(own[inside], labels[inside], more, counts)
        held_out, names = own[~inside], labels[~inside]
        embedding = np.asarray(scope.relation_embedding(held_out, held_out, *part))
        scores = embedding @ embedding.T
        first, second = np.triu_indices(len(names), 1)
        alike = names[first] == names[second]
        same.append(scores[first, second][alike])
        different.append(scores[first, second][~alike])
    same, different = np.concatenate(same), np.concatenate(different)
    curve = [
        (float(at), float((same < at).mean()), float((different >= at).mean()))
        for at in np.arange(0.3, 0.85, 0.05)
    ]
    threshold = float(np.quantile(different, 1 - _LET_THROUGH))
    return RelationTraining(_detector(own, labels, more, counts), threshold, tuple(curve))


def _detector(
    own: Float[np.ndarray, "T H"],
    labels: Int[np.ndarray, " T"],
    more: Float[np.ndarray, "P H"],
    counts: Float[np.ndarray, "P P"],
) -> RelationDetector:
    """Return the detector of wordings of known relations and of others, which are paired."""
    certain = np.eye(labels.max() + 1, dtype=np.float32)[labels]
    likeness = np.exp(scope.SHARPNESS * (more @ own.T - 1))
    alone = likeness / likeness.sum(axis=1, keepdims=True) @ certain
    share, steps = alone, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for _ in range(_ROUNDS):
        share = (alone + steps @ share) / 2
    share /= share.sum(axis=1, keepdims=True)
    arrays = (np.concatenate([own, more]), np.concatenate([certain, share]))
    return RelationDetector(*(array.astype(np.float16).astype(np.float32) for array in arrays))


def model(source: str | Path, out: str | Path, data: str | Path) -> RelationTraining:
    """Write the model at `source` with this detector in place of what it has.

    Args:
      source: as `pipeline.load`.
      out: the file to write; tokenizers of the model's own are put beside it.
      data: CounterFact's records, as `edit_records.load`.
    Raises:
      ValueError: as `pipeline.load` and `edit_records.load`.
    """
    paraphrases = Paraphrases(edit_records.load(data))
    loaded = pipeline.load(source)
    result = train(lambda texts: loaded.encode(texts).pooled, paraphrases)
    path = model_file.locate(source)
    _, meta = model_file.load_exported(path)
    threshold = f"editing.scope_threshold={result.threshold}"
    meta["config"] = configs.to_dict(configs.load(configs.to_dict(loaded.config), [threshold]))
    meta["scope"] = {"data": provenance(data), "unseen_relations": result.curve}
    arrays = dict(zip((scope.WORDINGS, scope.RELATIONS), result.detector, strict=True))
    model_file.amend(path, out, arrays, meta, without=(scope.PROJECTION,), float16=[*arrays])
    for tokenizer in vocabulary.files(path.parent):
        if not (Path(out).parent / tokenizer.name).exists():
            shutil.copyfile(tokenizer, Path(out).parent / tokenizer.name)
    return result


def show(result: RelationTraining) -> str:
    """Return the curve, and the threshold."""
    lines = [
        "on wordings of relations that it was not given",
        f"{'at':>5} {'missed':>8} let through",
    ]
    lines += [f"{at:5.2f} {missed:8.1%} {passed:11.1%}" for at, missed, passed in result.curve]
    return "\n".join([*lines, f"threshold {result.threshold:.3f}"])
