"""CounterFact under every system, beside the loop that one would write without packed rows and tries.

For each case, system, prompt and candidate the loop calls the decoder once. Weights and towers are the
benchmark's, and nothing is slow on purpose: the call is compiled, of a bucketed length, with the
vocabulary's product at the answer's places alone; a case is encoded, written and read in one call, and
z = 0 is made once. Four systems would do, as the scope decision picks among their numbers for the
others: there is a ratio to a loop over these, too.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from larimar_jax import pipeline
from larimar_jax.bench.counterfact import CounterFact
from larimar_jax.bench.queries import SYSTEMS
from larimar_jax.bench.systems import Systems
from larimar_jax.data import atlas
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.generate import prompt_ids
from larimar_jax.latent_layout import Condition
from larimar_jax.packing import LENGTH_BUCKET, steps_bucket
from larimar_jax.pipeline import Pipeline

from . import Disagreement, timing

# Cases/s over the loop's, as the documentation promises.
WANTED = 5.0
# Nats that ℓ of the two may lie apart.
AGREEMENT = 1e-3
# Verbatim lookup calls no decoder. The other two that are missing below have numbers of these.
LOOPED = tuple(name for name in SYSTEMS if name != "verbatim")
SUFFICIENT = ("base", "zero", "prompt", "open")

# By case, system and prompt: ℓ(new) and ℓ(true).
Losses = dict[tuple[int, str, str], list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cities(CounterFact):
    """The task over facts of the world's cities, where no file is named."""

    def read(self, limit: int | None, skipped: list[str] | None) -> list[EditRecord]:
        return atlas.load(limit)


def compare(model: str, path: str | None, cases: int, repeats: int) -> list[timing.Ratio]:
    """Return the ratios to the loop over all systems, and over the four that the others follow from.

    Raises:
        Disagreement: ℓ of the two lie further apart than `AGREEMENT`.
    """
    runs = Systems(pipeline.load(model))
    task = (Cities if path is None else CounterFact)(data=path or "", limit=cases)
    records = task.records

    def batched() -> Losses:
        return {
            (row["case"], row["system"], row["prompt"]): [row["loss_new"], row["loss_true"]]
            for row in task.evaluate(runs, records)
        }

    ours, theirs = batched(), loop(task, runs, records, LOOPED)
    apart = max(float(np.abs(np.subtract(ours[key], theirs[key])).max()) for key in theirs)
    if not apart <= AGREEMENT:
        raise Disagreement(f"ℓ of the loop and of the benchmark differ by up to {apart:.2g} nats")
    sides = {
        "here": batched,
        "all": lambda: loop(task, runs, records, LOOPED),
        "four": lambda: loop(task, runs, records, SUFFICIENT),
    }
    times = timing.interleave(sides, repeats)
    agreement = f"losses within {apart:.0e} nats"
    return [
        timing.Ratio(f"CounterFact, {cases} cases", times["all"], times["here"], WANTED, agreement),
        timing.Ratio("the same, four systems in the loop", times["four"], times["here"], None, ""),
    ]


def loop(
    task: CounterFact, runs: Systems, records: Sequence[EditRecord], names: Sequence[str]
) -> Losses:
    """Return ℓ(new) and ℓ(true) of every case, system and prompt, mode `rome`."""
    model, losses = runs.model, {}
    zero = model.zero(1)
    for record in records:
        columns = task.queries(record)
        fact = f"{runs.editor.written(record.prompt, record.target_new).rstrip('.')}. "
        queries = [column["prompt"] for column in columns]
        recall = runs.editor.recall([(record.prompt, record.target_new)], [queries])
        read = recall.condition(np.arange(len(queries)))
        for system in names:
            for row, column in enumerate(columns):
                inside = bool(recall.in_scope[row])
                in_front = system == "prompt" or (system == "lookup" and inside)
                condition = zero if system == "zero" else None
                if system == "open" or (system == "larimar" and inside):
                    condition = read.rows(jax.device_put(np.asarray([row], np.int32)))
                text = fact + column["prompt"] if in_front else column["prompt"]
                pair = [loss(model, text, column[name], condition) for name in ("new", "true")]
                losses[record.case_id, system, column["prompt"]] = pair
    return losses


def loss(model: Pipeline, prompt: str, target: str, condition: Condition | None = None) -> float:
    """Return ℓ(p, t) in nats per token, by one call of the decoder."""
    tokenizer = model.decoder_tokenizer
    before, answer = prompt_ids(tokenizer, prompt), tokenizer.following(target.strip())
    ids = [*before, *answer[:-1]]
    tokens = np.zeros((1, steps_bucket(len(ids), LENGTH_BUCKET)), np.int32)
    tokens[0, : len(ids)] = ids
    # Padding repeats the first place.
    places = np.full((1, steps_bucket(len(answer), 1)), len(before) - 1, np.int32)
    places[0, : len(answer)] += np.arange(len(answer), dtype=np.int32)
    labels = np.asarray([answer + answer[:1] * (places.size - len(answer))], np.int32)
    arrays = jax.device_put((tokens, places, labels))
    losses = _losses(model.graph, model.state, *arrays, condition)
    return float(np.asarray(losses)[0, : len(answer)].mean(dtype=np.float64))


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "1 T"],
    places: Int[Array, "1 A"],
    labels: Int[Array, "1 A"],
    condition: Condition | None,
) -> Float[Array, "1 A"]:
    """Return −ln p of the label after each of A places."""
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(tokens, condition)
    logits = model.decoder.logits(jnp.take_along_axis(hidden, places[..., None], axis=1))
    if condition is not None and condition.evidence is not None:
        logits = condition.evidence.add(logits, places - places[:, :1])
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
