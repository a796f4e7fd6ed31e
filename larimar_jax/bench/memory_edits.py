"""Edits of S trained models side by side, each by its own memory, through the paper's interface alone.

The key of a fact is e(prompt), its value e(prompt + answer), and the decoder is conditioned on what a
query reads (§4): nothing decides about scope, and no answer code helps. What the memory does is its
contract's (memory/base.py): prepare, empty, write, forget and read.
"""

import statistics
import timeit
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from larimar_jax.bench.editor import written
from larimar_jax.bench.metrics import rewrite_columns
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.generate import prompt_ids
from larimar_jax.memory.base import Memory, Prepared, State
from larimar_jax.model import AbstractModel
from larimar_jax.weights.tokenizer import TextTooLong, Tokenizer, bucket

# Records that get a memory each; texts of a call to a tower; memories of one fact side by side.
SINGLE, _ROWS, _MEMORIES = 300, 64, 16
# Of so many facts one is forgotten; how often a write and a read are timed.
_FORGOTTEN, _TIMED = 8, 9

Latents = Float[Array, "S n C"]
Row = dict[str, Any]


class Query(NamedTuple):
    """A prompt, the record that it is about, and the answers after and before the edit."""

    prompt: str
    record: EditRecord
    kind: str
    new: str
    true: str


class EditedModels:
    """S models of one config, with their memory.

    Args:
        parameters: by path, [S, …] where its axis is 0, and shared where it is None. axes: by path.
        memory: as it was trained.
        tokenizers: (encoder's, decoder's).
    Attributes:
        prepared: of the S memories. write: (prepared, keys, values [S, N, C]) → the state of an empty
            memory after N facts. add: the same of a state, (prepared, state, keys, values). forget: as
            add. All are compiled.
    """

    def __init__(
        self,
        abstract: AbstractModel,
        parameters: Mapping[str, Any],
        axes: Mapping[str, int | None],
        memory: Memory,
        tokenizers: tuple[Tokenizer, Tokenizer],
    ):
        self._abstract, self._tokenizers = abstract, tokenizers
        self._parameters, axes = jax.device_put(dict(parameters)), dict(axes)
        self.memory = memory = memory.for_edits()

        def encode(parameters, tokens, mask):
            return abstract.model(parameters).encode(tokens, mask)

        def prepare(parameters):
            return memory.prepare(abstract.model(parameters).memory.params())

        def decode(parameters, latents, tokens, is_answer):
            larimar = abstract.model(parameters)
            hidden, _ = larimar.hidden(tokens[:, :-1], larimar.condition(latents))
            return likelihoods(larimar.decoder.logits(hidden), tokens[:, 1:], is_answer[:, 1:])

        def write(prepared, keys, values):
            return memory.write(prepared, memory.empty(prepared), keys, values)

        def recall_one(prepared, key, value, query):
            state = write(prepared, key[None], value[None])
            return memory.read(prepared, state, query[None]).latent[0]

        def recall(prepared, *rows):
            return jax.lax.map(lambda row: recall_one(prepared, *row), rows, batch_size=_MEMORIES)

        self._encode = jax.jit(jax.vmap(encode, (axes, None, None)))
        self._decode = jax.jit(jax.vmap(decode, (axes, 0, None, None)))
        self._read = jax.jit(jax.vmap(lambda *a: memory.read(*a).latent))
        self._recall = jax.jit(jax.vmap(recall))
        self.write, self.add, self.forget = (
            jax.jit(jax.vmap(function)) for function in (write, memory.write, memory.forget)
        )
        self.prepared: Prepared = jax.jit(jax.vmap(prepare, (axes,)))(self._parameters)

    def encode(self, texts: Sequence[str]) -> Latents:
        """Return e(text) of n texts; raises TextTooLong."""
        limit = self._abstract.module.encoder.config.max_length
        batch = self._tokenizers[0].encode(texts)
        if batch.ids.shape[1] > limit:
            batch = self._tokenizers[0].encode(texts, limit)
        parts = [
            self._encode(self._parameters, *(_filled(a[at : at + _ROWS]) for a in batch))
            for at in range(0, len(texts), _ROWS)
        ]
        return jnp.concatenate(parts, axis=1)[:, : len(texts)]

    def facts(self, records: Sequence[EditRecord]) -> tuple[Latents, Latents]:
        """Return keys e(prompt) and values e(prompt + answer) of n facts."""
        texts = [record.prompt for record in records]
        texts += [written(record.prompt, record.target_new) for record in records]
        unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = np.array([unique[text] for text in texts]).reshape(2, -1)
        encodings = self.encode(list(unique))
        return encodings[:, rows[0]], encodings[:, rows[1]]

    def recall(self, keys: Latents, values: Latents, queries: Latents) -> Latents:
        """Return what each of n queries reads from a memory of one fact."""
        return self._recall(self.prepared, keys, values, queries)

    def read(self, state: State, queries: Latents) -> Latents:
        """Return what n queries read from a memory."""
        return self._read(self.prepared, state, queries)

    def score(
        self, queries: Sequence[Query], latents: Latents
    ) -> tuple[Float[np.ndarray, "S n 2"], Bool[np.ndarray, "S n 2"]]:
        """Return ℓ of both answers of n queries, and whether greedy decoding gives them.

        Raises:
            TextTooLong: names the prompt.
        """
        decoder, texts = self._tokenizers[1], []
        for query in queries:
            prompt = prompt_ids(decoder, query.prompt)
            for answer in (query.new, query.true):
                texts.append((len(prompt), [*prompt, *decoder.following(answer)]))
                if len(texts[-1][1]) > self._abstract.max_tokens:
                    raise TextTooLong(
                        f"{query.prompt[:60]!r} and {answer[:60]!r} have {len(texts[-1][1])} tokens, "
                        f"and the decoder takes {self._abstract.max_tokens}."
                    )
        length = min(bucket(max(len(ids) for _, ids in texts), 8), self._abstract.max_tokens)
        tokens = np.full((len(texts), length), decoder.pad, np.int32)
        is_answer = np.zeros(tokens.shape, bool)
        for row, (begin, ids) in enumerate(texts):
            tokens[row, : len(ids)], is_answer[row, begin : len(ids)] = ids, True
        arrays = (jnp.repeat(latents, 2, axis=1), tokens, is_answer)
        parts = []
        for at in range(0, len(texts), _ROWS):
            part = np.s_[at : at + _ROWS]
            rows = (_filled(arrays[0][:, part], 1), *(_filled(a[part]) for a in arrays[1:]))
            parts.append(jax.device_get(self._decode(self._parameters, *rows)))
        losses, greedy = (
            np.concatenate(p, axis=1)[:, : len(texts)] for p in zip(*parts, strict=True)
        )
        return tuple(a.reshape(len(a), -1, 2) for a in (losses, greedy))

    def seconds(self, keys: Latents, values: Latents) -> float:
        """Return the seconds in which one model's memory of n facts is written one more and read: the
        median, after compilation."""
        state = self.write(self.prepared, keys, values)
        first = jax.tree.map(
            lambda leaf: leaf[0], (self.prepared, state, keys[:, :1], values[:, :1])
        )

        @jax.jit
        def write_and_read(prepared, state, key, value):
            state = self.memory.write(prepared, state, key, value)
            return self.memory.read(prepared, state, key).latent

        def run() -> None:
            jax.block_until_ready(write_and_read(*first))

        run()
        return statistics.median(timeit.repeat(run, number=1, repeat=_TIMED))


def likelihoods(
    logits: Float[Array, "R T V"], targets: Int[Array, "R T"], is_answer: Bool[Array, "R T"]
) -> tuple[Float[Array, " R"], Bool[Array, " R"]]:
    """Return −ln p in nats per token of each row's answer, and whether each of its tokens is the
    likeliest."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jnp.where(is_answer, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0).sum(axis=1)
    greedy = jnp.where(is_answer, chosen >= jnp.max(logits, axis=-1), True).all(axis=1)
    return losses / is_answer.sum(axis=1).astype(jnp.float32), greedy


def rows(
    models: EditedModels, records: Sequence[EditRecord], hard: Sequence[EditRecord] = ()
) -> Iterator[Row]:
    """Yield all measures, a row for each query and model, in no order of the models.

    edit, paraphrase, hard, neighbourhood: read from a memory of one fact. batch: N facts in one memory,
    for N from K/4 to 4K, as far as there are records. before, forgotten, others: of K facts an eighth is
    forgotten; these before and after it, and the others after it. stream: 2K facts, written one by one.
    reads: the share that is not finite; such reads count as zeros. write_read: seconds of one fact.

    Args:
        records: R edits. hard: edits with hard paraphrases, or none.
    Raises:
        ValueError: a record has no answer that the edit displaces.
    """
    if bare := [record.case_id for record in records if not record.target_true]:
        raise ValueError(
            f"records {bare[:5]} have no answer that the edit displaces, and S compares the two. Take "
            "records that do, such as CounterFact's."
        )
    lost: list[np.ndarray] = []

    def measured(queries: Sequence[Query], latents: Latents, **columns) -> Iterator[Row]:
        is_finite = jnp.isfinite(latents).all(axis=-1)
        lost.append(1.0 - np.asarray(is_finite))
        scores = models.score(queries, jnp.where(is_finite[..., None], latents, 0.0))
        for model, (losses, greedy) in enumerate(zip(*scores, strict=True)):
            for query, pair, hits in zip(queries, losses, greedy, strict=True):
                # Of a neighbour, the answer before the edit is the right one.
                is_near = query.kind == "neighbourhood"
                kind = query.kind if is_near else "edit"
                metrics = rewrite_columns({"kind": kind}, pair) | {
                    "greedy": float(hits[int(is_near)])
                }
                fixed = dict(case=model, kind=query.kind, record=query.record.case_id)
                yield {**fixed, **columns, **metrics}

    single = list(_single(records[:SINGLE], hard[:SINGLE]))
    keys, values = models.facts([query.record for query in single])
    prompts = models.encode([query.prompt for query in single])
    yield from measured(single, models.recall(keys, values, prompts))

    slots, prepared, count = models.memory.slots, models.prepared, len(records)
    keys, values = models.facts(records)
    facts = [_query("batch", record, record.prompt) for record in records]
    sizes = {max(1, slots * 2**n // 4) for n in range(5)} | {count}
    sizes = sorted(size for size in sizes if size <= min(count, 4 * slots))
    for size in sizes:
        state = models.write(prepared, keys[:, :size], values[:, :size])
        latents = models.read(state, keys[:, :size])
        yield from measured(facts[:size], latents, facts=size)

    size = max((size for size in sizes if size <= slots), default=sizes[0])
    chosen = np.arange(size) % _FORGOTTEN == 0
    before, rest = np.flatnonzero(chosen), np.flatnonzero(~chosen)

    def of(kind: str, state: State, places: np.ndarray) -> Iterator[Row]:
        queries = [facts[place]._replace(kind=kind) for place in places]
        return measured(queries, models.read(state, keys[:, places]))

    state = models.write(prepared, keys[:, :size], values[:, :size])
    yield from of("before", state, before)
    state = models.forget(prepared, state, keys[:, before], values[:, before])
    yield from of("forgotten", state, before)
    yield from of("others", state, rest)
    size = max((size for size in sizes if size <= 2 * slots), default=sizes[0])
    state = _streamed(models, keys[:, :size], values[:, :size])
    yield from of("stream", state, np.arange(size))

    for model, share in enumerate(np.concatenate(lost, axis=1).mean(axis=1)):
        yield dict(case=model, kind="reads", share=float(share))
    seconds = models.seconds(keys[:, :slots], values[:, :slots])
    yield dict(case=0, kind="write_read", seconds=seconds)


def _query(kind: str, record: EditRecord, prompt: str, true: str | None = None) -> Query:
    return Query(prompt, record, kind, record.target_new, true or record.target_true)


def _single(records: Sequence[EditRecord], hard: Sequence[EditRecord]) -> Iterator[Query]:
    for record in records:
        for kind, prompt, right in record.questions():
            yield _query(kind, record, prompt, right if kind == "neighbourhood" else None)
    for record in hard:
        yield from (_query("hard", record, prompt) for prompt in record.paraphrases)


def _streamed(models: EditedModels, keys: Latents, values: Latents) -> State:
    """Return the state after facts that are written one by one."""
    first = models.write(models.prepared, keys[:, :1], values[:, :1])
    second = jax.eval_shape(models.add, models.prepared, first, keys[:, :1], values[:, :1])
    grows = [a.shape for a in jax.tree.leaves(first)] != [a.shape for a in jax.tree.leaves(second)]
    if grows and models.memory.SAME != "nothing":
        # The same by its contract, and each number of facts would compile anew.
        return models.write(models.prepared, keys, values)
    for n in range(1, keys.shape[1]):
        row = np.s_[:, n : n + 1]
        first = models.add(models.prepared, first, keys[row], values[row])
    return first


def _filled(array: Any, axis: int = 0) -> Any:
    """Return an array with `_ROWS` rows, the last ones repeated."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, _ROWS - array.shape[axis])
    return (jnp if isinstance(array, jax.Array) else np).pad(array, widths, mode="edge")
