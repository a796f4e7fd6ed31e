"""A few edits with a model in training: held-out texts, written and asked for by their beginnings."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import objective
from larimar_jax.config import EditingConfig
from larimar_jax.memory.streaming import Streaming
from larimar_jax.model import Larimar
from larimar_jax.weights.tokenizer import Tokenizer

# Of a text's words, the share that is the prompt: enough to tell texts apart, enough left to say.
_PROMPT = 0.6
_LEAST_WORDS = 5


@dataclasses.dataclass(frozen=True)
class Edits:
    """R texts as edits, tokenised. Row r of `swapped` is prompt r with the ending of text r + 1."""

    prompt_tokens: Int[np.ndarray, "R S"]
    prompt_mask: Bool[np.ndarray, "R S"]
    text_tokens: Int[np.ndarray, "R S"]
    text_mask: Bool[np.ndarray, "R S"]
    own: Int[np.ndarray, "R T"]
    own_ending: Bool[np.ndarray, "R T"]
    swapped: Int[np.ndarray, "R T"]
    swapped_ending: Bool[np.ndarray, "R T"]

    def arrays(self) -> dict[str, np.ndarray]:
        """All fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def choose(
    texts: Sequence[str],
    count: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    encoder_tokens: int,
    decoder_tokens: int,
    room: int,
) -> Edits | None:
    """The first `count` texts that can be cut in two and fit the token lengths; None if no two do.

    Args:
      room: tokens that the decoder takes; two halves of any two texts have to fit.
    """
    cuts = []
    for text in texts:
        words = text.split()
        at = round(_PROMPT * len(words))
        if len(words) < _LEAST_WORDS or encoder.encode([text]).mask.sum() > encoder_tokens:
            continue
        prompt, ending = " ".join(words[:at]), " ".join(words[at:])
        if max(1 + len(decoder.ids(prompt)), len(decoder.following(ending))) > room // 2:
            continue
        cuts.append((prompt, ending))
        if len(cuts) == count:
            break
    if len(cuts) < 2:
        return None
    prompts = [prompt for prompt, _ in cuts]
    wholes = [f"{prompt} {ending}" for prompt, ending in cuts]
    asked, told = (encoder.encode(side, encoder_tokens) for side in (prompts, wholes))
    begun = [[decoder.bos, *decoder.ids(prompt)] for prompt in prompts]
    endings = [decoder.following(ending) for _, ending in cuts]
    own = list(zip(begun, endings, strict=True))
    swapped = list(zip(begun, endings[1:] + endings[:1], strict=True))
    # Two halves of two texts may be longer together than either text.
    length = max(len(a) + len(b) for a, b in own + swapped)
    length = min(-(-length // decoder_tokens) * decoder_tokens, room)
    rows = [_rows(pairs, length, decoder.pad) for pairs in (own, swapped)]
    return Edits(
        *(_padded(part, encoder_tokens) for side in (asked, told) for part in (side.ids, side.mask)),
        *rows[0],
        *rows[1],
    )


def score(
    model: Larimar, edits: Mapping[str, Array], editing: EditingConfig
) -> dict[str, Float[Array, ""]]:
    """Each text written into a memory of its own (§4: key e(prompt), value e(text)), and asked for.

    Returns:
      edit_gain: nats per token by which the endings are likelier than to the untouched base LM.
      edit_success: the share of texts whose ending is likelier, per token, than another text's after
      the same prompt; edit_success_base: that of the base LM.
    """
    memory = Streaming(
        *model.memory.prior_memory[...].shape, ridge=editing.ridge, query_noise=editing.query_noise
    )
    prepared = memory.prepare(model.memory.params())
    keys = model.encode(edits["prompt_tokens"], edits["prompt_mask"])
    values = model.encode(edits["text_tokens"], edits["text_mask"])

    def one(key, value):
        state = memory.write(prepared, memory.empty(prepared), key[None], value[None])
        return memory.read(prepared, state, key[None]).latent[0]

    written = model.condition(jax.vmap(one)(keys, values))

    def likelihood(side: str, condition) -> Float[Array, " R"]:
        ending = edits[f"{side}_ending"]
        losses = objective.token_losses(model, edits[side], ending, condition)
        return -losses.sum(axis=1) / ending.sum(axis=1).astype(jnp.float32)

    own, other = (likelihood(side, written) for side in ("own", "swapped"))
    base, base_other = (likelihood(side, None) for side in ("own", "swapped"))
    return {
        "edit_gain": (own - base).mean(),
        "edit_success": (own > other).astype(jnp.float32).mean(),
        "edit_success_base": (base > base_other).astype(jnp.float32).mean(),
    }


def _padded(array: Any, length: int) -> np.ndarray:
    array = np.asarray(array)
    return np.pad(array, ((0, 0), (0, length - array.shape[1])))


def _rows(pairs, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(pairs), length), pad, np.int32)
    ending = np.zeros((len(pairs), length), bool)
    for row, (first, second) in enumerate(pairs):
        together = len(first) + len(second)
        tokens[row, :together] = [*first, *second]
        ending[row, len(first) : together] = True
    return tokens, ending
