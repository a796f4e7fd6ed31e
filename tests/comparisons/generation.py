"""Greedy decoding by batch size, beside transformers' `generate` on the same weights.

Both sides decode the same random prompts to the same number of tokens, in float32.
"""

from collections.abc import Sequence

import numpy as np

from larimar_jax import weights
from larimar_jax.decoding import Decoding, Endings
from larimar_jax.packing import ConditionRows

from . import Disagreement, timing, towers

# Batch size, and how many times Hugging Face's speed the documentation promises for it.
BATCHES = {1: 1.3, 32: 1.1}
# Least share of equal tokens. Both are greedy in float32, and a tie may fall either way.
SAME = 0.95


def compare(
    decoder: str,
    repeats: int,
    batches: Sequence[int] = (*BATCHES,),
    prompt: int = 16,
    tokens: int = 64,
) -> list[timing.Ratio]:
    """Return a ratio for each batch size.

    Raises:
        Disagreement: less than `SAME` of the tokens are equal.
    """
    model, _ = weights.load_decoder(decoder)
    theirs = towers.from_ours(model.decoder).eval()
    theirs.generation_config.eos_token_id = None  # both sides go on to the last token
    return [_ratio(model, theirs, rows, prompt, tokens, repeats) for rows in batches]


def _ratio(model, theirs, rows: int, prompt: int, tokens: int, repeats: int) -> timing.Ratio:
    vocabulary = model.decoder.config.vocab_size
    draw = np.random.default_rng(rows)
    # Special tokens come first.
    ids = draw.integers(vocabulary // 50, vocabulary, (rows, prompt))
    sides = {
        "here": lambda: continue_ids(model, ids.tolist(), tokens),
        "beside": lambda: huggingface(theirs, ids, tokens),
    }
    same = float(np.mean(sides["here"]() == sides["beside"]()))
    if same < SAME:
        raise Disagreement(
            f"only {same:.1%} of the tokens of {rows} rows are those of Hugging Face; look for a"
            " version of transformers that computes differently"
        )
    times = timing.interleave(sides, repeats)
    name = f"generation, {rows} rows of {tokens} tokens"
    agreement = f"{same:.1%} of tokens equal"
    return timing.Ratio(name, times["beside"], times["here"], BATCHES.get(rows), agreement)


def continue_ids(model, prompts, tokens: int, condition=None) -> np.ndarray:
    """Return the likeliest tokens after each prompt, whatever they are."""
    count, conditions = len(prompts), ConditionRows(condition, len(prompts))
    nothing = np.zeros((2, model.decoder.config.vocab_size), bool)
    rows = ([tokens] * count, [0] * count, range(count))
    decoding = Decoding(model, prompts, *rows, conditions, None, Endings(*nothing, -1))
    decoding.advance(tokens - 1)
    return np.asarray(decoding.tokens, np.int32)


def huggingface(model, ids: np.ndarray, tokens: int) -> np.ndarray:
    """Return greedy tokens [rows, tokens] of transformers' `generate`."""
    import torch

    prompts = torch.from_numpy(ids)
    with torch.no_grad():
        texts = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return texts[:, ids.shape[1] :].numpy()
