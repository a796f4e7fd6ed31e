"""Second moments of an MLP's keys over general text, C = E[k kᵀ]: what an edit should leave alone.

Of a layer there is one file in the cache, under a digest of the decoder's parameters. It is written
after every few batches, so that a run that was stopped goes on from there.
"""

import dataclasses
import functools
import itertools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.progress import track

from larimar_jax.config import cache_folder
from larimar_jax.data.corpus import Corpus, open_corpus
from larimar_jax.editors import forward
from larimar_jax.generate import prompt_ids
from larimar_jax.weights.model_file import replaced

CORPUS, TOKENS = "wikipedia-summaries", 100_000
# Rows of a batch, tokens of a row, and batches between two states on the disk.
ROWS, LENGTH, BATCHES = 16, 128, 10


class MomentsError(ValueError):
    """Second moments of too few tokens, or a file of them that is damaged."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Sums of k kᵀ over so many tokens of a corpus's first documents, float64 [I, I]."""

    corpus: str
    total: Float[np.ndarray, "I I"]
    tokens: int = 0
    documents: int = 0

    @functools.cached_property
    def mean(self) -> Float[np.ndarray, "I I"]:
        """C."""
        return self.total / max(1, self.tokens)

    @functools.cached_property
    def _factor(self) -> tuple[Any, bool]:
        try:
            return scipy.linalg.cho_factor(self.mean, lower=True)
        except scipy.linalg.LinAlgError as error:
            raise MomentsError(
                f"the second moments of {self.tokens} tokens have no inverse, for keys of "
                f"{len(self.total)} numbers. Take more text: `larimar moments --tokens N`."
            ) from error

    def solve(self, keys: Float[np.ndarray, "I n"]) -> Float[np.ndarray, "I n"]:
        """Return C⁻¹ K in float64; MomentsError where C has no inverse."""
        return scipy.linalg.cho_solve(self._factor, np.float64(keys))

    @functools.cached_property
    def spectrum(self) -> tuple[Float[np.ndarray, " I"], Float[np.ndarray, "I I"]]:
        """Eigenvalues of C, the least first, and its eigenvectors, a column each."""
        return scipy.linalg.eigh(self.mean)


def load(
    base: Any, layers: Sequence[int], corpus: str | None = None, tokens: int | None = None
) -> dict[int, Moments]:
    """Return the moments of layers of a `BaseLM`: from the cache, from there on, or computed now.

    Args:
        corpus: of `open_corpus`; its training side is read. tokens: at least so many, or the whole
            corpus. Where neither is given, what the cache has counts, of whatever text it is.
    Raises:
        MomentsError: a file of the cache is damaged.
    """
    source, wanted = open_corpus(corpus or CORPUS), tokens or TOKENS
    folder = cache_folder() / "moments" / base.digest
    folder.mkdir(parents=True, exist_ok=True)
    states = {}
    for layer in layers:
        state = _read(folder / f"layer-{layer}.npz")
        size = base.kernel(layer).shape[0]
        if state is None or (corpus is not None and state.corpus != source.identity):
            state = Moments(source.identity, np.zeros((size, size)))
        states[layer] = state

    def unfinished(layer: int) -> bool:
        state = states[layer]
        return state.corpus == source.identity and state.tokens < wanted

    begun = sorted(filter(unfinished, states), key=lambda layer: states[layer].documents)
    for _, group in itertools.groupby(begun, key=lambda layer: states[layer].documents):
        for own in _add_up(base, source, {layer: states[layer] for layer in group}, wanted):
            states |= own
            for layer, state in own.items():
                with replaced(folder / f"layer-{layer}.npz") as file:
                    np.savez(file, **{f.name: getattr(state, f.name) for f in _FIELDS})
    return states


_FIELDS = dataclasses.fields(Moments)


def _read(path: Path) -> Moments | None:
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            values = {field.name: file[field.name] for field in _FIELDS}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise MomentsError(f"{path} is damaged ({error}). Remove it, and run again.") from error
    counts = {name: int(values[name]) for name in ("tokens", "documents")}
    return Moments(str(values["corpus"]), values["total"], **counts)


def _add_up(
    base: Any, corpus: Corpus, states: dict[int, Moments], wanted: int
) -> Iterator[dict[int, Moments]]:
    """Yield the moments after every few batches, from the document on where they are."""
    layers = tuple(sorted(states))
    state = states[layers[0]]
    documents = itertools.islice(corpus.side(held_out=False), state.documents, None)
    rows = (prompt_ids(base.tokenizer, document.text)[:LENGTH] for document in documents)
    mesh = Mesh(np.asarray(jax.devices()[: _devices()]), ("rows",))
    by_row = NamedSharding(mesh, PartitionSpec("rows"))
    graph, parameters = nnx.split(base.model.decoder)
    parameters = jax.device_put(parameters, NamedSharding(mesh, PartitionSpec()))
    totals = {layer: states[layer].total.copy() for layer in layers}
    counted, read = state.tokens, state.documents
    batches = iter(lambda: list(itertools.islice(rows, ROWS)), [])
    shown = dict(total=-(-(wanted - counted) // (ROWS * LENGTH)), console=Console(stderr=True))
    for number in track(itertools.count(), "second moments", **shown):
        batch = next(batches, [])
        counted, read = counted + sum(map(len, batch)), read + len(batch)
        if batch:
            tokens = np.zeros((ROWS, LENGTH), np.int32)
            is_text = np.zeros(tokens.shape, bool)
            for row, ids in enumerate(batch):
                tokens[row, : len(ids)], is_text[row, : len(ids)] = ids, True
            arrays = jax.device_put((tokens, is_text), by_row)
            for layer, more in zip(layers, _sums(graph, parameters, *arrays, layers), strict=True):
                totals[layer] += np.float64(more)
        is_last = not batch or counted >= wanted
        if is_last or number % BATCHES == BATCHES - 1:
            counts = dict(tokens=counted, documents=read)
            yield {n: Moments(corpus.identity, totals[n].copy(), **counts) for n in layers}
        if is_last:
            return


def _devices() -> int:
    """Return over how many devices a batch's rows are split: the most that divide them."""
    return max(n for n in range(1, ROWS + 1) if ROWS % n == 0 and n <= jax.device_count())


@functools.partial(jax.jit, static_argnums=(0, 4))
def _sums(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B T"],
    is_text: Bool[Array, "B T"],
    layers: tuple[int, ...],
) -> Float[Array, "n I I"]:
    """Return Σ k kᵀ over the tokens of texts, of each of n layers."""

    def pick(key, output, hidden):
        return jnp.where(is_text[..., None], key.astype(jnp.float32), 0.0)

    keys = forward.run_layers(nnx.merge(graph, state), tokens, max(layers) + 1, pick)
    keys = keys[np.asarray(layers)]
    return jnp.einsum("lbti,lbtj->lij", keys, keys, precision=jax.lax.Precision.HIGHEST)
