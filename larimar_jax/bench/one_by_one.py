"""CounterFact by the loop that one would write without this project's scorer and runner.

For each case, system, prompt and candidate one call of the decoder: 6 · 3 · 2 for a case of 3 prompts.
Weights and towers are the benchmark's, and nothing is slow on purpose: the call is compiled, of a
bucketed length, with the vocabulary's product at the answer's places alone; a case is encoded, written
and read in one call, and z = 0 is made once.
"""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from larimar_jax.bench import metrics, systems
from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.generate import prompt_ids
from larimar_jax.model import Condition
from larimar_jax.packing import LENGTH_BUCKET, steps_bucket
from larimar_jax.pipeline import Pipeline

Losses = dict[str, dict[str, list[list[float]]]]


def counterfact(
    model: Pipeline, records: Sequence[EditRecord]
) -> tuple[list[Losses], dict[str, float]]:
    """ℓ(new) and ℓ(true) of every prompt, {system: {kind: [pair]}} of each record, mode `rome`; and the
    seconds of each system's calls of the decoder."""
    editor, zero = LarimarEditor(model), model.zero(1)
    seconds = dict.fromkeys(systems.SYSTEMS, 0.0)
    found: list[Losses] = []
    for record in records:
        asked = [("edit", record.prompt, record.target_true)]
        asked += [("paraphrase", prompt, record.target_true) for prompt in record.paraphrases]
        near = zip(record.neighbourhood, record.neighbourhood_targets, strict=True)
        asked += [("neighbourhood", prompt, true) for prompt, true in near]
        prompts = [prompt for _, prompt, _ in asked]
        fact = f"{editor.written(record.prompt, record.target_new).rstrip('.')}. "
        recall = editor.recall([(record.prompt, record.target_new)], [prompts])
        read = recall.condition(np.arange(len(prompts)))
        losses: Losses = {name: {kind: [] for kind in metrics.KINDS} for name in systems.SYSTEMS}
        for system in systems.SYSTEMS:
            begun = time.perf_counter()
            for row, (kind, prompt, true) in enumerate(asked):
                inside = bool(recall.in_scope[row])
                in_front = system == "prompt" or (system == "lookup" and inside)
                condition = zero if system == "zero" else None
                if system == "open" or (system == "larimar" and inside):
                    condition = read.rows(jax.device_put(np.asarray([row], np.int32)))
                text = fact + prompt if in_front else prompt
                pair = [loss(model, text, each, condition) for each in (record.target_new, true)]
                losses[system][kind].append(pair)
            seconds[system] += time.perf_counter() - begun
        found.append(losses)
    return found, seconds


def loss(
    model: Pipeline, prompt: str, target: str, condition: Condition | None = None
) -> float:
    """ℓ(p, t) in nats per token, by one call of the decoder."""
    tokenizer = model.decoder_tokenizer
    begun, answer = prompt_ids(tokenizer, prompt), tokenizer.following(target.strip())
    ids = [*begun, *answer[:-1]]
    tokens = np.zeros((1, steps_bucket(len(ids), LENGTH_BUCKET)), np.int32)
    tokens[0, : len(ids)] = ids
    # Padding repeats the first place.
    at = np.full((1, steps_bucket(len(answer), 1)), len(begun) - 1, np.int32)
    at[0, : len(answer)] += np.arange(len(answer), dtype=np.int32)
    told = np.asarray([answer + answer[:1] * (at.size - len(answer))], np.int32)
    arrays = jax.device_put((tokens, at, told))
    found = _losses(model.graph, model.state, *arrays, condition)
    return float(np.asarray(found)[0, : len(answer)].mean(dtype=np.float64))


@functools.partial(jax.jit, static_argnums=0)
def _losses(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "1 T"],
    at: Int[Array, "1 A"],
    told: Int[Array, "1 A"],
    condition: Condition | None,
) -> Float[Array, "1 A"]:
    """−ln p of what is told after each of A places."""
    model = nnx.merge(graph, state)
    hidden, _ = model.hidden(tokens, condition)
    logits = model.decoder.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))
    if condition is not None and condition.evidence is not None:
        logits = condition.evidence.add(logits, at - at[:, :1])
    chosen = jnp.take_along_axis(logits, told[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
