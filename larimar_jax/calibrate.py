"""Training of the internal scope detector (§6, ISD) and of its threshold.

The external detector compares pooled encodings as they are: a neighbour that shares words with the fact
is near it. The internal one compares them after a linear map W, fitted as a classifier of pairs,

    p(query q means the fact written as k) = sigmoid(a (cos(k W, q W) − b)),

on paraphrases against neighbours and against questions that ask something else of the same subject;
and a paraphrase must find its own prompt among those of its batch. W starts as the identity: what the
encoder knows of other kinds of text is where the fit begins. Held-out records give the threshold.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import config as configs
from larimar_jax import pretrained, scope
from larimar_jax.data import counterfact, questions
from larimar_jax.data.questions import Asked
from larimar_jax.data.records import provenance
from larimar_jax.data.wordings import Wordings
from larimar_jax.train import export

# Questions of other relations that a record is given.
OTHERS = 4
# Of the softmax over a batch's prompts.
_SHARPNESS = 20.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How W is fitted. steps of batch facts; rate: Adam's, falling to 0 as a cosine. others: the weight
    of questions of other relations beside neighbours; found: of finding one's own prompt among the
    batch's. held_out: the share of records that W is not fitted on."""

    steps: int = 600
    batch: int = 512
    rate: float = 1e-3
    others: float = 0.5
    found: float = 0.3
    held_out: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Quality:
    """A detector on held-out records: against a fact's own prompt, against all prompts at once, and the
    share of questions of other relations that it takes for the fact at the threshold."""

    pairwise: scope.Detection
    store: scope.Detection
    others: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """projection: W, [H, H] float32. threshold: of the cosine after it. external, internal: what the two
    detectors do on the held-out records."""

    projection: Float[np.ndarray, "H H"]
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


Encode = Callable[[Sequence[str]], Float[np.ndarray, "n H"]]


def calibrate(encode: Encode, facts: Sequence[Asked], recipe: Recipe | None = None) -> Calibration:
    """Fits W and the threshold.

    Args:
        encode: texts to pooled encodings; called once.
        facts: each with a paraphrase and a neighbour at least, and the same number of others, or none.
    Raises:
        ValueError: too few facts to hold any out, or one without paraphrase or neighbour.
    """
    recipe = Recipe() if recipe is None else recipe
    split = len(facts) - round(recipe.held_out * len(facts))
    if not 0 < split < len(facts):
        raise ValueError(
            f"{len(facts)} records leave none to fit or none to hold out: give tens, better thousands."
        )
    for fact in facts:
        if not fact.paraphrases or not fact.neighbours:
            raise ValueError(
                f"The record of {fact.prompt!r} has no paraphrase or no neighbour: leave it out."
            )
    texts: dict[str, int] = {}
    for fact in facts:
        sentences, _ = scope.parts([*fact.paraphrases, *fact.neighbours, *fact.others])
        for text in (fact.prompt, *sentences):
            texts.setdefault(text, len(texts))
    encoded = np.asarray(encode(list(texts)), np.float32)
    encoded /= np.maximum(np.linalg.norm(encoded, axis=1, keepdims=True), 1e-9)
    look = _Lookup(texts, encoded)
    rows = _rows(facts[:split], look)
    projection = np.asarray(_fit(jax.tree.map(jnp.asarray, rows), recipe))
    held = facts[split:]
    external, _ = _quality(held, look, np.eye(encoded.shape[1], dtype=np.float32))
    internal, threshold = _quality(held, look, projection)
    return Calibration(projection, threshold, external, internal)


def model(
    source: str | Path, out: str | Path, data: str | Path, recipe: Recipe | None = None
) -> Calibration:
    """Writes the model at `source` with a scope detector that is trained on CounterFact's records.

    Args:
        source: as `pretrained.load`; a detector that it has is replaced.
        data: as `counterfact.load`. Records without paraphrase or neighbour are left out.
    Raises:
        ValueError: as `calibrate`. What `pretrained.load` and `counterfact.load` raise.
    """
    recipe = Recipe() if recipe is None else recipe
    records = [r for r in counterfact.load(data) if r.paraphrases and r.neighbourhood]
    facts = questions.asked(records, Wordings(records), others=OTHERS, seed=recipe.seed)
    loaded = pretrained.load(source)
    found = calibrate(lambda texts: loaded.encode(texts).pooled, facts, recipe)
    path = pretrained.locate(source)
    _, meta = export.load_exported(path)
    threshold = f"editing.scope_threshold={found.threshold}"
    held = {"external": found.external, "internal": found.internal}
    meta |= {
        "config": configs.override(configs.to_dict(loaded.config), [threshold]),
        "scope": {
            "recipe": dataclasses.asdict(recipe),
            "data": provenance(data),
            "records": len(records),
            "held_out": {name: dataclasses.asdict(quality) for name, quality in held.items()},
        },
    }
    export.amend(path, out, {scope.PROJECTION: found.projection}, meta)
    return found


class _Lookup:
    """Unit encodings of texts."""

    def __init__(self, places: dict[str, int], encoded: Float[np.ndarray, "n H"]):
        self._places, self._encoded = places, encoded

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n H"]:
        return self._encoded[[self._places[text] for text in texts]]


def _rows(facts: Sequence[Asked], look: _Lookup) -> _Rows:
    """A row for each paraphrase or neighbour of a fact, whichever are more; the fewer take turns."""
    prompts, paraphrases, neighbours, others, subjects = [], [], [], [], []
    subject: dict[str, int] = {}
    for fact in facts:
        own = look([fact.prompt])[0]

        def nearest(query: str, own=own) -> Float[np.ndarray, " H"]:
            """Of the query's sentence that the detector goes by."""
            sentences = look(scope.parts([query])[0])
            return sentences[np.argmax(sentences @ own)]

        for n in range(max(len(fact.paraphrases), len(fact.neighbours))):
            prompts.append(own)
            paraphrases.append(nearest(fact.paraphrases[n % len(fact.paraphrases)]))
            neighbours.append(nearest(fact.neighbours[n % len(fact.neighbours)]))
            others.append([nearest(query) for query in fact.others])
            subjects.append(subject.setdefault(fact.subject, len(subject)))
    width = max((len(each) for each in others), default=0)
    padded = np.zeros((len(others), max(width, 1), len(prompts[0])), np.float32)
    there = np.zeros(padded.shape[:2], bool)
    for row, each in enumerate(others):
        if each:
            padded[row, : len(each)], there[row, : len(each)] = each, True
    told = [np.stack(each) for each in (prompts, paraphrases, neighbours)]
    return _Rows(*told, padded, there, np.array(subjects, np.int32))


@functools.partial(jax.jit, static_argnames="recipe")
def _fit(rows: _Rows, recipe: Recipe) -> Float[Array, "H H"]:
    """W after `recipe.steps` of Adam, in float32."""
    count, width = rows.prompt.shape
    adam = optax.adam(optax.cosine_decay_schedule(recipe.rate, max(1, recipe.steps)))
    # a and b start where the encoder's own cosines of paraphrases and neighbours part.
    start = (jnp.eye(width), jnp.float32(10.0), jnp.float32(0.6))

    def step(carry, key):
        params, state = carry
        which, other = jax.random.split(key)
        batch = jax.tree.map(lambda a: a[jax.random.randint(which, (recipe.batch,), 0, count)], rows)
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


def _quality(
    facts: Sequence[Asked], look: _Lookup, projection: Float[np.ndarray, "H H"]
) -> tuple[Quality, float]:
    """What the detector does on facts, and the threshold: where the share of paraphrases that it misses
    is nearest to that of neighbours and others that it lets through, each kind counting half."""
    written = look([fact.prompt for fact in facts]) @ projection

    def scores(kind: str) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
        """Of all questions of a kind: the cosine with their own fact's prompt, and the best of all."""
        asked = [(n, text) for n, fact in enumerate(facts) for text in getattr(fact, kind)]
        if not asked:
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        texts, owners = scope.parts([text for _, text in asked])
        embedded = look(texts) @ projection
        own = np.zeros((len(asked), len(facts)), bool)
        own[np.arange(len(asked)), [n for n, _ in asked]] = True
        return tuple(
            scope.match(embedded, owners, written, allowed).score for allowed in (own, None)
        )

    paraphrases, neighbours, others = map(scores, ("paraphrases", "neighbours", "others"))
    wrong = [kind for kind in (neighbours[0], others[0]) if len(kind)]
    weights = [np.full(len(kind), 1 / len(kind) / len(wrong)) for kind in wrong]
    threshold = scope.crossing(paraphrases[0], np.concatenate(wrong), np.concatenate(weights))
    passed = float(np.mean(others[0] >= threshold)) if len(others[0]) else 0.0
    pairwise, store = (scope.detection(paraphrases[n], neighbours[n]) for n in (0, 1))
    return Quality(pairwise, store, passed), threshold
