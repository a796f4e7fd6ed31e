"""Where a fact's subject ends in a text, and the keys there: what ROME, MEMIT and AlphaEdit act on."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from larimar_jax.editors import forward
from larimar_jax.editors.base import Request
from larimar_jax.generate import prompt_ids
from larimar_jax.packing import LanguageModel
from larimar_jax.weights.tokenizer import Tokenizer


def subject_place(tokenizer: Tokenizer, text: str, subject: str) -> int:
    """Return the place of the last token of the subject's last occurrence in a text, whatever its
    letters' case; that of the text's last token where the subject is not in it."""
    text = text.rstrip()
    matches = [*re.finditer(re.escape(subject.strip()), text, re.I)] if subject.strip() else []
    before = text[: matches[-1].end()] if matches else text
    return len(prompt_ids(tokenizer, before)) - 1


def subject_keys(
    model: LanguageModel,
    tokenizer: Tokenizer,
    facts: Sequence[Request],
    prefixes: Sequence[str],
    depth: int,
) -> tuple[Float[np.ndarray, "L n I"], forward.Places]:
    """Return k* of each fact in the first `depth` layers, the mean over prefixes, and all places."""
    texts = [(f"{prefix}{fact.prompt}", fact.subject) for fact in facts for prefix in prefixes]
    rows = [prompt_ids(tokenizer, text) for text, _ in texts]
    at = [subject_place(tokenizer, *text) for text in texts]
    places = forward.at_tokens(model, rows, at, depth)
    keys = places.key.reshape(depth, len(facts), len(prefixes), -1)
    return keys.mean(axis=2), places
