"""What Larimar with its scope detector and the controls say to the same prompts, decoded greedily.

    base      the untouched language model
    zero      z = 0: the memory slot is there and holds zeros
    prompt    the right fact in front of the prompt, whatever the scope detector says
    lookup    the nearest written fact in front of the prompts that are in scope, and no matrix
    larimar   memory-conditioned decoding of the prompts that are in scope

Decoding is what such a benchmark costs. So the same text is decoded once under the same condition:
of prompts that are alike, of a lookup that finds the right fact, and of all that is out of scope, where
the decoder is the untouched language model.
"""

from collections.abc import Callable, Mapping, Sequence

from larimar_jax.bench import metrics
from larimar_jax.model import Condition
from larimar_jax.pretrained import Pretrained


def answers(
    model: Pretrained,
    prompts: Sequence[str],
    facts: Sequence[str | None],
    nearest: Mapping[int, str],
    condition: Condition | None,
    *,
    tokens: int,
) -> dict[str, list[str | None]]:
    """Continuations of n prompts by `tokens` tokens, through line breaks, by system.

    Args:
        facts: the right one of each prompt, as a text; None where there is none, and then "prompt" says
            None.
        nearest: {row: the nearest written fact} of the prompts that are in scope.
        condition: from the memory, one row each of `nearest`; None where that is empty.
    """

    def decoded(texts, condition=None):
        # A question mark is often followed by a line break, and the answer comes after it.
        return model.generate(texts, condition, max_tokens=tokens, stop=())

    def in_front(fact, row):
        return f"{fact.rstrip('.')}. {prompts[row]}"

    unique = list(dict.fromkeys(prompts))
    base = dict(zip(unique, decoded(unique), strict=True))
    zero = dict(zip(unique, decoded(unique, model.zero(len(unique))), strict=True))
    right = {row: in_front(fact, row) for row, fact in enumerate(facts) if fact is not None}
    near = {row: in_front(fact, row) for row, fact in nearest.items()}
    texts = list(dict.fromkeys([*right.values(), *near.values()]))
    fronted = dict(zip(texts, decoded(texts) if texts else [], strict=True))
    through = decoded([prompts[row] for row in nearest], condition) if nearest else []
    read = dict(zip(nearest, through, strict=True))
    rows = list(enumerate(prompts))
    return {
        "base": [base[prompt] for prompt in prompts],
        "zero": [zero[prompt] for prompt in prompts],
        "prompt": [fronted[right[row]] if row in right else None for row, _ in rows],
        "lookup": [fronted[near[row]] if row in near else base[prompt] for row, prompt in rows],
        "larimar": [read.get(row, base[prompt]) for row, prompt in rows],
    }


def scores(
    measure: Callable[[Sequence[str], Sequence[str]], float],
    said: Mapping[str, str | None],
    gold: str,
) -> dict[str, float | None]:
    """What each system's answer is worth; None where it was not asked.

    Args:
        measure: (words said, words wanted) → a score. Of the first line that is not empty as many words
            count as the right answer has.
    """
    wanted = metrics.answer_tokens(gold)
    return {
        name: None if text is None else measure(metrics.answer_tokens(line(text), len(wanted)), wanted)
        for name, text in said.items()
    }


def line(text: str) -> str:
    """The first line of an answer that is not empty."""
    return next((line for line in text.splitlines() if line.strip()), "")
