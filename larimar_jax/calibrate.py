"""Training of the internal scope detector (§6, ISD) and of its threshold.

The external detector compares pooled encodings as they are: a neighbour that shares words with the fact
is near it. The internal one compares them after a linear map W, fitted as a classifier of pairs,

    p(query q means the fact written as k) = sigmoid(a (cos(k W, q W) − b)),

on paraphrases against neighbours and against questions that ask something else of the same subject;
and a paraphrase must find its own prompt among those of its batch.

A W that is fitted freely learns the relations of its records by heart, and is worse than none for
others. So W is drawn back to where it started, W = I + s (fitted − I), and the share s and the threshold
are those that do best on relations whose facts the fit has not seen, a fold of relations at a time.
(Questions of other relations are of all of them: a wording may be an "other" on both sides.)
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import config as configs
from larimar_jax import pipeline, scope
from larimar_jax.data import edit_records, vocabulary
from larimar_jax.data.edit_records import provenance
from larimar_jax.data.paraphrases import Paraphrases, ScopeQuestions, scope_questions
from larimar_jax.weights import model_file

# Questions of other relations that a record is given.
OTHERS = 4
# s, of which one is chosen; 0 is the external detector.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of the softmax over a batch's prompts.
_SHARPNESS = 20.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How W is fitted. steps of batch facts; rate: Adam's, falling to 0 as a cosine. others: the weight
    of questions of other relations beside neighbours; found: of finding one's own prompt among the
    batch's. folds: parts of the relations, each judged by a W that was fitted on the rest."""

    steps: int = 300
    batch: int = 256
    rate: float = 2e-4
    others: float = 0.5
    found: float = 0.3
    folds: int = 4
    seed: int = 0

    def __post_init__(self):
        """Raises ValueError for numbers that make no sense; names all of them."""
        least = {"steps": 0, "batch": 1, "rate": 0.0, "others": 0.0, "found": 0.0, "folds": 2}
        wrong = [f"{n} must be at least {low}" for n, low in least.items() if getattr(self, n) < low]
        if wrong:
            raise ValueError(f"this recipe makes no sense: {', '.join(wrong)}.")


@dataclasses.dataclass(frozen=True)
class Quality:
    """A detector on relations that it was not fitted on, in [0, 1]. pairwise: its equal error rate
    against a fact's own prompt. store: against all prompts of a fold at once. At the threshold, missed:
    the share of paraphrases out of scope; neighbours, others: of those in scope."""

    pairwise: float
    store: float
    missed: float
    neighbours: float
    others: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """projection: W, [H, H] float32. share: s. threshold: of the cosine after W. external, internal:
    what the detectors do without W and with it."""

    projection: Float[np.ndarray, "H H"]
    share: float
    threshold: float
    external: Quality
    internal: Quality


class _Rows(NamedTuple):
    """n facts: unit encodings of the prompt, of a paraphrase, of a neighbour and of o other questions;
    and a number that facts of the same subject share."""

    prompt: Float[Array, "n H"]
    paraphrase: Float[Array, "n H"]
    neighbour: Float[Array, "n H"]
    other: Float[Array, "n o H"]
    there: Bool[Array, "n o"]
    subject: Int[Array, " n"]


class _Scores(NamedTuple):
    """Cosines of a fold's questions: with their own fact's prompt, and the best of all of the fold."""

    paraphrases: tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]
    neighbours: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]
    others: tuple[Float[np.ndarray, " O"], Float[np.ndarray, " O"]]


Encode = Callable[[Sequence[str]], Float[np.ndarray, "n H"]]


def calibrate(encode: Encode, facts: Sequence[ScopeQuestions], recipe: Recipe | None = None) -> Calibration:
    """Fits W, and chooses s and the threshold.

    Args:
        encode: texts to pooled encodings; called once.
        facts: each with a paraphrase and a neighbour at least.
    Raises:
        ValueError: of fewer relations than folds, or one without paraphrase or neighbour.
    """
    recipe = Recipe() if recipe is None else recipe
    for fact in facts:
        if not fact.paraphrases or not fact.neighbours:
            raise ValueError(
                f"The record of {fact.prompt!r} has no paraphrase or no neighbour: leave it out."
            )
    folds = _folds(facts, recipe.folds)
    texts: dict[str, int] = {}
    for fact in facts:
        sentences, _ = scope.split_sentences([*fact.paraphrases, *fact.neighbours, *fact.others])
        for text in (fact.prompt, *sentences):
            texts.setdefault(text, len(texts))
    encoded = np.asarray(encode(list(texts)), np.float32)
    encoded /= np.maximum(np.linalg.norm(encoded, axis=1, keepdims=True), 1e-9)
    look = _Lookup(texts, encoded)
    rows, owner = _rows(facts, look)
    rows = jax.device_put(rows)

    def fitted(chosen: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "H H"]:
        # Of one length for all folds, so that one program fits them.
        found = np.flatnonzero(chosen)
        return np.asarray(_fit(rows, np.resize(found, len(chosen)), np.int32(len(found)), recipe))

    same = np.eye(encoded.shape[1], dtype=np.float32)
    judged: dict[float, list[_Scores]] = {share: [] for share in SHARES}
    for fold in folds:
        change = fitted(~np.isin(owner, fold)) - same
        held = [facts[n] for n in fold]
        for share, scores in judged.items():
            scores.append(_scores(held, look, same + share * change))
    thresholds = {share: _threshold(scores, recipe) for share, scores in judged.items()}
    # Of shares that do as well, the least; an error is the same for all at the crossing.
    share = min(SHARES, key=lambda one: _quality(judged[one], thresholds[one]).missed)
    projection = same + share * (fitted(np.ones(len(owner), bool)) - same)
    if not np.isfinite(projection).all():
        raise FloatingPointError(
            "the scope detector's map is not finite: its fit diverged. Lower the rate, and look for "
            "texts whose encodings are zero."
        )
    external, internal = (_quality(judged[one], thresholds[one]) for one in (0.0, share))
    return Calibration(projection, share, thresholds[share], external, internal)


def model(
    source: str | Path, out: str | Path, data: str | Path, recipe: Recipe | None = None
) -> Calibration:
    """Writes the model at `source` with a scope detector that is trained on CounterFact's records.

    Args:
        source: as `pipeline.load`; a detector that it has is replaced.
        out: the file to write; tokenizers of the model's own are put beside it.
        data: as `edit_records.load`. Records without paraphrase or neighbour are left out.
    Raises:
        ValueError: as `calibrate`. What `pipeline.load` and `edit_records.load` raise.
    """
    recipe = Recipe() if recipe is None else recipe
    records = [r for r in edit_records.load(data) if r.paraphrases and r.neighbourhood]
    facts = scope_questions(records, Paraphrases(records), others=OTHERS, seed=recipe.seed)
    loaded = pipeline.load(source)
    found = calibrate(lambda texts: loaded.encode(texts).pooled, facts, recipe)
    path = model_file.locate(source)
    _, meta = model_file.load_exported(path)
    threshold = f"editing.scope_threshold={found.threshold}"
    held = {"external": found.external, "internal": found.internal}
    meta |= {
        "config": configs.to_dict(configs.load(configs.to_dict(loaded.config), [threshold])),
        "scope": {
            "recipe": dataclasses.asdict(recipe),
            "share": found.share,
            "data": provenance(data),
            "records": len(records),
            "unseen_relations": {name: dataclasses.asdict(one) for name, one in held.items()},
        },
    }
    model_file.amend(path, out, {scope.PROJECTION: found.projection}, meta)
    for own in vocabulary.files(path.parent):
        if not (Path(out).parent / own.name).exists():
            shutil.copyfile(own, Path(out).parent / own.name)
    return found


class _Lookup:
    """Unit encodings of texts."""

    def __init__(self, places: dict[str, int], encoded: Float[np.ndarray, "n H"]):
        self._places, self._encoded = places, encoded

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n H"]:
        return self._encoded[[self._places[text] for text in texts]]


def _folds(facts: Sequence[ScopeQuestions], count: int) -> list[list[int]]:
    """Facts in `count` parts of about one size, none of which shares a relation with another; those
    of no known relation are of one together.

    Raises:
        ValueError: there are fewer relations.
    """
    relations: dict[int | None, list[int]] = {}
    for number, fact in enumerate(facts):
        relations.setdefault(fact.relation, []).append(number)
    if len(relations) < count:
        raise ValueError(
            f"{len(facts)} records of {len(relations)} relations do not make {count} folds of "
            "relations: give more of them, better thousands."
        )
    folds: list[list[int]] = [[] for _ in range(count)]
    for members in sorted(relations.values(), key=len, reverse=True):
        min(folds, key=len).extend(members)
    return folds


def _rows(facts: Sequence[ScopeQuestions], look: _Lookup) -> tuple[_Rows, Int[np.ndarray, " n"]]:
    """A row for each paraphrase or neighbour of a fact, whichever are more; the fewer take turns. And
    which fact each row is of."""
    prompts, paraphrases, neighbours, others, subjects, owners = [], [], [], [], [], []
    subject: dict[str, int] = {}
    for number, fact in enumerate(facts):
        own = look([fact.prompt])[0]

        def nearest(query: str, own=own) -> Float[np.ndarray, " H"]:
            """Of the query's sentence that the detector goes by."""
            sentences = look(scope.split_sentences([query])[0])
            return sentences[np.argmax(sentences @ own)]

        for n in range(max(len(fact.paraphrases), len(fact.neighbours))):
            prompts.append(own)
            paraphrases.append(nearest(fact.paraphrases[n % len(fact.paraphrases)]))
            neighbours.append(nearest(fact.neighbours[n % len(fact.neighbours)]))
            others.append([nearest(query) for query in fact.others])
            subjects.append(subject.setdefault(fact.subject, len(subject)))
            owners.append(number)
    width = max((len(each) for each in others), default=0)
    # Padding is the prompt and not zeros: the gradient of a zero vector's length is NaN, masked or not.
    padded = np.repeat(np.stack(prompts)[:, None], max(width, 1), axis=1)
    there = np.zeros(padded.shape[:2], bool)
    for row, each in enumerate(others):
        if each:
            padded[row, : len(each)], there[row, : len(each)] = each, True
    told = [np.stack(each) for each in (prompts, paraphrases, neighbours)]
    return _Rows(*told, padded, there, np.array(subjects, np.int32)), np.array(owners, np.int32)


@functools.partial(jax.jit, static_argnames="recipe")
def _fit(
    rows: _Rows, chosen: Int[Array, " n"], count: Int[Array, ""], recipe: Recipe
) -> Float[Array, "H H"]:
    """W after `recipe.steps` of Adam from the identity, in float32, on the first `count` rows of
    `chosen`."""
    width = rows.prompt.shape[1]
    adam = optax.adam(optax.cosine_decay_schedule(recipe.rate, max(1, recipe.steps)))
    # a and b start where the encoder's own cosines of paraphrases and neighbours part.
    start = (jnp.eye(width), jnp.float32(10.0), jnp.float32(0.6))

    def step(carry, key):
        params, state = carry
        which, other = jax.random.split(key)
        drawn = chosen[jax.random.randint(which, (recipe.batch,), 0, count)]
        batch = jax.tree.map(lambda a: a[drawn], rows)
        # One of a fact's other questions.
        at = jax.random.randint(other, (recipe.batch, 1), 0, rows.other.shape[1])
        one = jnp.take_along_axis(batch.other, at[:, :, None], axis=1)[:, 0]
        there = jnp.take_along_axis(batch.there, at, axis=1)[:, 0]
        gradient = jax.grad(_loss)(params, batch, one, there, recipe)
        # Optax raises float decays to integer step counts, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(recipe.seed), recipe.steps)
    ((projection, _, _), _), _ = jax.lax.scan(step, (start, adam.init(start)), keys)
    return projection


def _loss(params, batch: _Rows, other, there, recipe: Recipe) -> Float[Array, ""]:
    projection, sharpness, boundary = params

    def unit(encodings):
        mapped = jnp.matmul(encodings, projection, precision="highest")
        return mapped / jnp.maximum(jnp.linalg.norm(mapped, axis=1, keepdims=True), 1e-9)

    def margin(query):
        return sharpness * ((key * query).sum(axis=1) - boundary)

    key, mine = unit(batch.prompt), unit(batch.paraphrase)
    loss = jax.nn.softplus(-margin(mine)) + jax.nn.softplus(margin(unit(batch.neighbour)))
    loss += recipe.others * jnp.where(there, jax.nn.softplus(margin(unit(other))), 0.0)
    # Facts of the same subject may be the very same fact.
    same = batch.subject[:, None] == batch.subject
    likeness = _SHARPNESS * jnp.matmul(mine, key.T, precision="highest")
    likeness = jnp.where(same & ~jnp.eye(len(same), dtype=bool), -jnp.inf, likeness)
    found = jax.nn.log_softmax(likeness, axis=1).diagonal()
    return (loss - recipe.found * found).mean()


def _scores(
    facts: Sequence[ScopeQuestions], look: _Lookup, projection: Float[np.ndarray, "H H"]
) -> _Scores:
    """Of all questions of the facts, under a projection."""
    written = look([fact.prompt for fact in facts]) @ projection

    def scores(kind: str) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
        asked = [(n, text) for n, fact in enumerate(facts) for text in getattr(fact, kind)]
        if not asked:
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        texts, owners = scope.split_sentences([text for _, text in asked])
        embedded = look(texts) @ projection
        own = np.zeros((len(asked), len(facts)), bool)
        own[np.arange(len(asked)), [n for n, _ in asked]] = True
        return tuple(scope.nearest_key(embedded, owners, written, by).score for by in (own, None))

    return _Scores(*map(scores, _Scores._fields))


def _joined(scores: Sequence[_Scores], kind: str, against: int = 0) -> Float[np.ndarray, " Q"]:
    return np.concatenate([getattr(one, kind)[against] for one in scores])


def _threshold(scores: Sequence[_Scores], recipe: Recipe) -> float:
    """Where the share of paraphrases that are missed is nearest to that of neighbours and others that
    are let through, the latter weighing `recipe.others` beside the former."""
    kinds = [(_joined(scores, "neighbours"), 1.0), (_joined(scores, "others"), recipe.others)]
    kinds = [(found, weight) for found, weight in kinds if len(found)]
    total = sum(weight for _, weight in kinds)
    weights = [np.full(len(found), weight / len(found) / total) for found, weight in kinds]
    wrong = np.concatenate([found for found, _ in kinds])
    return scope.equal_error_threshold(_joined(scores, "paraphrases"), wrong, np.concatenate(weights))


def _quality(scores: Sequence[_Scores], threshold: float) -> Quality:
    """What a detector does on all folds; against all prompts, the mean over folds."""
    store = [scope.detection(one.paraphrases[1], one.neighbours[1]).error for one in scores]
    others = _joined(scores, "others")
    paraphrases, neighbours = (_joined(scores, kind) for kind in ("paraphrases", "neighbours"))
    return Quality(
        scope.detection(paraphrases, neighbours).error,
        float(np.mean(store)),
        float(np.mean(paraphrases < threshold)),
        float(np.mean(neighbours >= threshold)),
        float(np.mean(others >= threshold)) if len(others) else 0.0,
    )
