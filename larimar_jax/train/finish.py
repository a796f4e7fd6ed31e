"""The end of a run: what was trained as one file, with a lexicon fitted to it (§10)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from larimar_jax import lexicon
from larimar_jax.data.corpus import Corpus
from larimar_jax.model import Larimar
from larimar_jax.pretrained import Pretrained
from larimar_jax.settings import Config
from larimar_jax.train import export, report
from larimar_jax.train.step import Skeleton

# Parameters that an export holds in bfloat16: half the size for the two large maps, whose products
# are summed over hundreds of terms.
_HALVED = ("^to_slots/kernel$", "^lexicon/directions$")


def finish(
    path: Path,
    config: Config,
    skeleton: Skeleton,
    parameters: Mapping[str, jax.Array],
    trained: list[str],
    tokenizers: tuple[Any, Any],
    corpus: Corpus,
    meta: Mapping[str, Any],
    *,
    progress: bool,
) -> None:
    """Writes a trained model to `path`; every process calls it, and the first one writes.

    What a tower's source gives again is left out: frozen parameters of towers that are loaded.
    """
    towers = {"encoder": config.model.encoder, "decoder": config.model.decoder}
    loaded = tuple(f"{name}/" for name, tower in towers.items() if tower.source is not None)
    fitted = config.model.lexicon is not None
    whole = {}
    for name, leaf in parameters.items():
        needed = name in trained or not name.startswith(loaded)
        if needed or (fitted and name.startswith("encoder/")):
            whole[name] = _whole(leaf)
    if jax.process_index() != 0:
        multihost_utils.sync_global_devices("a trained model is written")
        return
    if fitted:
        if progress:
            report.say(f"fitting a lexicon of {config.model.lexicon.entries:,} words")
        # Of the decoder only its tokenizer is asked, so that its numbers may be any.
        like = skeleton.parameters
        numbers = {n: whole.get(n, np.zeros((), like[n].dtype)) for n in like}
        whole |= _lexicon(config, skeleton.model(numbers), tokenizers, corpus)
    kept = {n: a for n, a in whole.items() if n in trained or not n.startswith(loaded)}
    halved = [name for name in _HALVED if any(re.search(name, kept_name) for kept_name in kept)]
    export.save_exported(path, kept, meta, dict.fromkeys(halved, "bfloat16"))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("a trained model is written")


def _whole(leaf: jax.Array) -> np.ndarray | None:
    """The array on this host, leaf by leaf; on other processes than the first it is let go of."""
    if jax.process_count() == 1:
        return np.asarray(leaf)
    found = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(found) if jax.process_index() == 0 else None


def _lexicon(config: Config, model: Larimar, tokenizers, corpus: Corpus) -> dict[str, np.ndarray]:
    trained = Pretrained(config, model, *tokenizers, source=config.name, fingerprint="")
    texts = (document.text for document in corpus.side(held_out=False))
    entries = config.model.lexicon.entries

    def encode(words):
        return trained.encode(words).latent[:, : config.model.latent]

    return lexicon.fit(encode, tokenizers[1], texts, entries)
