"""Facts to sweep memories with: keys, queries and values, random or of real prompts."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from larimar_jax import pipeline
from larimar_jax.data import edit_records


class RealFacts(NamedTuple):
    """Encodings of P real facts, of unit length. shifts: paraphrase − prompt of each, for how real
    wordings differ."""

    prompts: Float[np.ndarray, "P C"]
    values: Float[np.ndarray, "P C"]
    shifts: Float[np.ndarray, "P C"]


class SweptFacts(NamedTuple):
    """N facts, R written rows each (prompt and rephrasings), rows of a fact beside each other.

    keys, values: [N·R, C], as written. targets: [N, C], the value of each fact. queries: [N, C], one
    wording of each fact that was not written.
    """

    keys: Float[Array, "rows C"]
    values: Float[Array, "rows C"]
    targets: Float[Array, "N C"]
    queries: Float[Array, "N C"]


def encode(path: str | Path, encoder: str = "smol") -> RealFacts:
    """Return encodings of a ZsRE file's prompts, rephrasings, and prompts with their new answers.

    Raises:
        FileNotFoundError, edit_records.MalformedRecord: of the file.
        ValueError: no record has a rephrasing.
    """
    records = [record for record in edit_records.load(path) if record.paraphrases]
    if not records:
        raise ValueError(f"{path} has no record with a rephrasing; a sweep needs some")
    model = pipeline.load(encoder)
    texts = [[r.prompt for r in records], [f"{r.prompt} {r.target_new}" for r in records]]
    texts.append([r.paraphrases[0] for r in records])
    size = model.config.model.latent  # the encodings, without the answer code beside them
    prompts, values, rephrased = (model.encode(side).latent[:, :size] for side in texts)
    return RealFacts(prompts, values, rephrased - prompts)


def synthetic(
    key: jax.Array,
    count: int,
    latent: int,
    rephrasings: int,
    noise: Float[Array, ""],
    *,
    paired: bool = False,
) -> SweptFacts:
    """Return random facts of unit length; a wording is the prompt plus noise of `noise` times its
    length. A value is another random vector, or where `paired` the prompt itself."""
    draws = jax.random.split(key, 4)

    def unit(key, *shape):
        rows = jax.random.normal(key, (*shape, latent), jnp.float32)
        return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    prompts = unit(draws[0], count)
    values = prompts if paired else unit(draws[1], count)
    wordings = prompts[:, None] + noise * unit(draws[2], count, rephrasings)
    queries = prompts + noise * unit(draws[3], count)
    return _written(prompts, wordings, values, queries)


def real(
    key: jax.Array, encodings: RealFacts, count: int, rephrasings: int, noise: Float[Array, ""]
) -> SweptFacts:
    """Return `count` real facts drawn at random; a wording is the prompt moved by the difference of
    another record's two wordings, `noise` times."""
    prompts, values, shifts = map(jnp.asarray, encodings)
    total = prompts.shape[0]
    draws = jax.random.split(key, 3)
    chosen = jax.random.permutation(draws[0], total)[:count]
    moved = jax.random.randint(draws[1], (count, rephrasings), 0, total)
    unwritten = jax.random.randint(draws[2], (count,), 0, total)
    prompt = prompts[chosen]
    wordings = prompt[:, None] + noise * shifts[moved]
    return _written(prompt, wordings, values[chosen], prompt + noise * shifts[unwritten])


def _written(prompts, wordings, values, queries) -> SweptFacts:
    rows = jnp.concatenate([prompts[:, None], wordings], axis=1)
    repeated = jnp.broadcast_to(values[:, None], rows.shape)
    latent = rows.shape[-1]
    return SweptFacts(rows.reshape(-1, latent), repeated.reshape(-1, latent), values, queries)
