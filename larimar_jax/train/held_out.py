"""What a run is judged by: the same held-out batches and edits at every evaluation."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from larimar_jax.config import Config
from larimar_jax.data.episodes import TooFewPieces
from larimar_jax.data.pieces import TokenizedPieces
from larimar_jax.train import edits, sharding
from larimar_jax.train.step import TrainStep

# Held-out batches of an evaluation: enough to halve the noise of one, cheap enough to be frequent.
_BATCHES = 4


class HeldOut:
    """Batches of held-out pieces, and a few of them as edits, on the devices.

    Args:
        pieces: held-out ones; too few for one batch are used more than once.
        tokenizers: (encoder's, decoder's).
        room: tokens that the decoder takes.
    Raises:
        TooFewPieces: there is none, or too few of two sentences' length for `train.edits`.
    """

    def __init__(
        self, config: Config, mesh: Mesh, pieces: TokenizedPieces, tokenizers: tuple[Any, Any], room: int
    ):
        data = config.data
        if not len(pieces):
            raise TooFewPieces(
                f"no document of {data.held_out or data.corpus} is held out, or none of its pieces fits "
                "data.encoder_tokens and data.decoder_tokens; use a larger corpus (data.corpus, or "
                "data.held_out where that is given)"
            )
        size = (data.batch, max(data.episode))
        count = min(_BATCHES, max(1, len(pieces) // math.prod(size)))
        order = np.random.default_rng(data.seed).permutation(len(pieces))
        share = data.batch // jax.process_count()
        mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
        self._batches = [
            sharding.place_batch(pieces.gather(rows[mine]), mesh)
            for rows in np.resize(order, (count, *size))
        ]
        self._edits = None
        if config.train.edits:
            # Some are too short to be cut in two.
            texts = pieces.texts(order[: 4 * config.train.edits].tolist())
            lengths = (data.encoder_tokens, data.decoder_tokens, room)
            chosen = edits.choose(texts, config.train.edits, *tokenizers, *lengths)
            if chosen is None:
                raise TooFewPieces(
                    "train.edits wants held-out texts of five words or more, whose halves fit the "
                    f"decoder's {room} tokens in any pair, and there are not two; use a larger corpus, "
                    "or train.edits=0"
                )
            whole = sharding.replicated(mesh)
            self._edits = sharding.place(chosen.arrays(), {n: whole for n in chosen.arrays()})

    def evaluate(
        self, stepper: TrainStep, params: Mapping[str, Any], frozen: Mapping[str, Any]
    ) -> dict[str, float]:
        """The mean of each term over the batches in nats per token, the memory's condition number,
        and what `edits.score` says."""
        terms = [jax.device_get(stepper.evaluate(params, frozen, b)) for b in self._batches]
        mean = {name: float(np.mean([t[name] for t in terms])) for name in sorted(terms[0])}
        if self._edits is not None:
            found = jax.device_get(stepper.edit(params, frozen, self._edits))
            mean |= {name: float(value) for name, value in sorted(found.items())}
        return mean
