"""Training of the internal scope detector (§6, ISD) and of its threshold.

The external detector compares pooled encodings as they are: a neighbour that shares words with the fact
is near it. The internal one compares them after a linear map W, fitted as a classifier of pairs,

    p(query q means the fact written as k) = sigmoid(a (cos(k W, q W) − b)),

on paraphrases against neighbours and against questions that ask something else of the same subject;
and a paraphrase must retrieve its own prompt among those of its batch.

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
from typing import Annotated, NamedTuple

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
from larimar_jax.schema import TWO_OR_MORE, Count, Natural, NonNegative
from larimar_jax.weights import model_file

# Questions of other relations for a record.
OTHERS = 4
# s, of which one is chosen; 0 is the external detector.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Inverse temperature of the softmax over a batch's prompts.
_SHARPNESS = 20.0

Encode = Callable[[Sequence[str]], Float[np.ndarray, "n H"]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How W is fitted."""

    steps: Natural = 300  # of Adam
    batch: Count = 256  # facts a step
    rate: NonNegative = 2e-4  # learning rate at the start; it falls to 0 as a cosine
    others: NonNegative = 0.5  # weight of questions that ask else of the same subject
    retrieval: NonNegative = 0.3  # weight of retrieving one's own prompt from a batch's
    # Parts of the relations, each judged by a W fitted on the rest.
    folds: Annotated[int, TWO_OR_MORE] = 4
    seed: Natural = 0  # of batches, and of other questions


# Error rates of a detector on relations that it was not fitted on, in [0, 1], with their labels.
QUALITY = {
    "pairwise": "equal error rate, own prompt",
    "store": "equal error rate, all prompts",
    "missed": "at the threshold: paraphrases missed",
    "neighbours": "neighbours taken for it",
    "others": "other questions taken for it",
}
Quality = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A fitted detector, beside the quality of the external and of the internal one."""

    projection: Float[np.ndarray, "H H"]  # W
    share: float  # s
    threshold: float  # of the cosine after W
    external: Quality
    internal: Quality


class _Questions(NamedTuple):
    """Unit encodings of n facts' prompts and of questions."""

    prompt: Float[Array, "n H"]
    paraphrase: Float[Array, "n H"]
    neighbour: Float[Array, "n H"]
    other: Float[Array, "n o H"]
    exists: Bool[Array, "n o"]  # of `other`; the rest is padding
    subject: Int[Array, " n"]  # facts of one subject have one number


# Cosines of a fold's questions by kind: with their own fact's prompt, and the best of all of the fold.
Scores = dict[str, tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]]
KINDS = ("paraphrases", "neighbours", "others")


def calibrate(encode: Encode, facts: Sequence[ScopeQuestions], recipe: Recipe) -> Calibration:
    """Fit W, and choose s and the threshold.

    Args:
        encode: texts to pooled encodings; called once.
    Raises:
        ValueError: of fewer relations than folds, or a fact without paraphrase or neighbour.
        FloatingPointError: the fit diverged.
    """
    for fact in facts:
        if not fact.paraphrases or not fact.neighbours:
            lacks = "has no paraphrase or no neighbour: leave it out."
            raise ValueError(f"The record of {fact.prompt!r} {lacks}")
    folds = _folds(facts, recipe.folds)
    look = _lookup(encode, facts)
    rows, owner = _rows(facts, look)
    rows, identity = jax.device_put(rows), np.eye(rows.prompt.shape[1], dtype=np.float32)

    def fitted_change(chosen: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "H H"]:
        # Of one length for all folds, so that one program fits them.
        places = np.flatnonzero(chosen)
        fitted = _fit(rows, np.resize(places, len(chosen)), np.int32(len(places)), recipe)
        return np.asarray(fitted) - identity

    changes = [fitted_change(~np.isin(owner, fold)) for fold in folds]
    unseen = [[facts[n] for n in fold] for fold in folds]
    judged = {}
    for share in SHARES:
        pairs = zip(unseen, changes, strict=True)
        scores = [_scores(fold, look, identity + share * change) for fold, change in pairs]
        judged[share] = _judge(scores, recipe)
    # Of shares that do as well, the least; at the equal-error threshold one kind of error ranks them.
    share = min(SHARES, key=lambda share: judged[share][1]["missed"])
    projection = identity + share * fitted_change(np.ones(len(owner), bool))
    if not np.isfinite(projection).all():
        advice = "Lower the rate, and look for texts whose encodings are zero."
        raise FloatingPointError(
            f"the scope detector's map is not finite: its fit diverged. {advice}"
        )
    return Calibration(projection, share, judged[share][0], judged[0.0][1], judged[share][1])


def model(source: str | Path, out: str | Path, data: str | Path, recipe: Recipe) -> Calibration:
    """Write the model at `source` with a scope detector that is trained on CounterFact's records.

    Args:
        source: as `pipeline.load`; a detector that it has is replaced.
        out: the file to write; tokenizers of the model's own are put beside it.
        data: as `edit_records.load`. Records without paraphrase or neighbour are left out.
    Raises:
        ValueError: as `calibrate`, `pipeline.load` and `edit_records.load`.
    """
    records = [r for r in edit_records.load(data) if r.paraphrases and r.neighbourhood]
    facts = scope_questions(records, Paraphrases(records), others=OTHERS, seed=recipe.seed)
    loaded = pipeline.load(source)
    result = calibrate(lambda texts: loaded.encode(texts).pooled, facts, recipe)
    path = model_file.locate(source)
    _, meta = model_file.load_exported(path)
    threshold = f"editing.scope_threshold={result.threshold}"
    meta["config"] = configs.to_dict(configs.load(configs.to_dict(loaded.config), [threshold]))
    meta["scope"] = {
        "recipe": dataclasses.asdict(recipe),
        "share": result.share,
        "data": provenance(data),
        "records": len(records),
        "unseen_relations": {"external": result.external, "internal": result.internal},
    }
    arrays, others = {scope.PROJECTION: result.projection}, (scope.WORDINGS, scope.RELATIONS)
    model_file.amend(path, out, arrays, meta, without=others)
    for tokenizer in vocabulary.files(path.parent):
        copy = Path(out).parent / tokenizer.name
        if copy.resolve() != tokenizer.resolve():
            shutil.copyfile(tokenizer, copy)
    return result


def show(result: Calibration) -> str:
    """Return a table of both detectors' errors, and what was chosen."""
    lines = [f"{'on relations that it was not fitted on':40} {'as encoded':>12} {'projected':>12}"]
    for name, label in QUALITY.items():
        lines.append(f"{label:40} {result.external[name]:12.1%} {result.internal[name]:12.1%}")
    lines.append(f"{result.share:.0%} of the fitted change; threshold {result.threshold:.3f}")
    return "\n".join(lines)


def _lookup(encode: Encode, facts: Sequence[ScopeQuestions]) -> Encode:
    """Return a function from texts of the facts to unit encodings, each of which is computed once."""
    texts = [fact.prompt for fact in facts]
    for kind in KINDS:
        texts += [scope.question(query) for fact in facts for query in getattr(fact, kind)]
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    encoded = np.asarray(encode(list(places)), np.float32)
    encoded /= np.maximum(np.linalg.norm(encoded, axis=1, keepdims=True), 1e-9)
    return lambda texts: encoded[[places[text] for text in texts]]


def _folds(facts: Sequence[ScopeQuestions], count: int) -> list[list[int]]:
    """Return facts in `count` parts of about one size that share no relation; those of no known
    relation are of one together. Raises ValueError where there are fewer relations."""
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


def _rows(
    facts: Sequence[ScopeQuestions], look: Encode
) -> tuple[_Questions, Int[np.ndarray, " n"]]:
    """Return a row for each paraphrase or neighbour of a fact, whichever are more (the fewer take
    turns), and which fact each row is of."""
    parts, owners, subjects = [], [], {}
    width = max(1, *(len(fact.others) for fact in facts))
    for number, fact in enumerate(facts):
        key = look([fact.prompt])

        paraphrases, neighbours, others = (
            look([*map(scope.question, getattr(fact, kind))]) for kind in KINDS
        )
        count = max(len(paraphrases), len(neighbours))
        # Padding is the prompt, as the gradient of a zero vector's length is NaN, masked or not.
        padded = np.concatenate([others, np.repeat(key, width - len(others), axis=0)])
        row = _Questions(
            np.repeat(key, count, axis=0),
            np.resize(paraphrases, (count, key.shape[1])),
            np.resize(neighbours, (count, key.shape[1])),
            np.repeat(padded[None], count, axis=0),
            np.repeat((np.arange(width) < len(others))[None], count, axis=0),
            np.repeat(np.int32(subjects.setdefault(fact.subject, len(subjects))), count),
        )
        parts.append(row)
        owners += [number] * count
    return _Questions(*map(np.concatenate, zip(*parts, strict=True))), np.int32(owners)


@functools.partial(jax.jit, static_argnames="recipe")
def _fit(
    rows: _Questions, chosen: Int[Array, " n"], count: Int[Array, ""], recipe: Recipe
) -> Float[Array, "H H"]:
    """Return W after `recipe.steps` of Adam from the identity, in float32, on the first `count` rows of
    `chosen`."""
    adam = optax.adam(optax.cosine_decay_schedule(recipe.rate, max(1, recipe.steps)))
    # a and b start where the encoder's own cosines of paraphrases and neighbours part.
    start = (jnp.eye(rows.prompt.shape[1]), jnp.float32(10.0), jnp.float32(0.6))

    def step(carry, key):
        params, state = carry
        rows_key, other_key = jax.random.split(key)
        drawn = chosen[jax.random.randint(rows_key, (recipe.batch,), 0, count)]
        batch = jax.tree.map(lambda a: a[drawn], rows)
        # One of a fact's other questions.
        at = jax.random.randint(other_key, (recipe.batch, 1), 0, rows.other.shape[1])
        batch = batch._replace(
            other=jnp.take_along_axis(batch.other, at[:, :, None], axis=1),
            exists=jnp.take_along_axis(batch.exists, at, axis=1),
        )
        gradient = jax.grad(_loss)(params, batch, recipe)
        # Optax raises float decays to integer step counts, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(recipe.seed), recipe.steps)
    ((projection, _, _), _), _ = jax.lax.scan(step, (start, adam.init(start)), keys)
    return projection


def _loss(params, batch: _Questions, recipe: Recipe) -> Float[Array, ""]:
    projection, sharpness, boundary = params

    def unit(encodings):
        mapped = jnp.matmul(encodings, projection, precision="highest")
        return mapped / jnp.maximum(jnp.linalg.norm(mapped, axis=1, keepdims=True), 1e-9)

    def margin(query):
        return sharpness * ((key * query).sum(axis=1) - boundary)

    key, paraphrase = unit(batch.prompt), unit(batch.paraphrase)
    loss = jax.nn.softplus(-margin(paraphrase)) + jax.nn.softplus(margin(unit(batch.neighbour)))
    other = jax.nn.softplus(margin(unit(batch.other[:, 0])))
    loss += recipe.others * jnp.where(batch.exists[:, 0], other, 0.0)
    # Facts of the same subject may be the very same fact.
    same = batch.subject[:, None] == batch.subject
    likeness = _SHARPNESS * jnp.matmul(paraphrase, key.T, precision="highest")
    likeness = jnp.where(same & ~jnp.eye(len(same), dtype=bool), -jnp.inf, likeness)
    retrieved = jax.nn.log_softmax(likeness, axis=1).diagonal()
    return (loss - recipe.retrieval * retrieved).mean()


def _scores(
    facts: Sequence[ScopeQuestions], look: Encode, projection: Float[np.ndarray, "H H"]
) -> Scores:
    """Return the scores of all questions of the facts, under a projection."""
    keys = look([fact.prompt for fact in facts]) @ projection
    result = {}
    for kind in KINDS:
        queries = [(n, text) for n, fact in enumerate(facts) for text in getattr(fact, kind)]
        texts = [scope.question(text) for _, text in queries]
        own = np.zeros((len(queries), len(facts)), bool)
        own[np.arange(len(queries)), [n for n, _ in queries]] = True
        embedded = look(texts) @ projection
        matches = (scope.nearest_key(embedded, keys, by) for by in (own, None))
        result[kind] = tuple(match.score for match in matches)
    return result


def _judge(folds: Sequence[Scores], recipe: Recipe) -> tuple[float, Quality]:
    """Return the threshold where the share of paraphrases that are missed is nearest to that of
    neighbours and others that are let through, the latter weighing `recipe.others` beside the former;
    and a detector's quality there."""
    positives, neighbours, others = (np.concatenate([f[kind][0] for f in folds]) for kind in KINDS)
    pairs = [(a, weight) for a, weight in ((neighbours, 1.0), (others, recipe.others)) if len(a)]
    total = sum(weight for _, weight in pairs)
    weights = np.concatenate([np.full(len(a), weight / len(a) / total) for a, weight in pairs])
    negatives = np.concatenate([a for a, _ in pairs])
    threshold = scope.equal_error_threshold(positives, negatives, weights)
    store = [scope.detection(f["paraphrases"][1], f["neighbours"][1]).error for f in folds]
    return threshold, {
        "pairwise": scope.detection(positives, neighbours).error,
        "store": float(np.mean(store)),
        "missed": float(np.mean(positives < threshold)),
        "neighbours": float(np.mean(neighbours >= threshold)),
        "others": float(np.mean(others >= threshold)) if len(others) else 0.0,
    }
