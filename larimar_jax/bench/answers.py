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

from larimar_jax.bench import controls, metrics
from larimar_jax.model import Condition
from larimar_jax.pipeline import Pipeline


def answers(
    model: Pipeline,
    prompts: Sequence[str],
    facts: Sequence[str | None],
    nearest: Mapping[int, str],
    condition: Condition | None,
    *,
    tokens: Sequence[int],
) -> dict[str, list[str | None]]:
    """Continuations of n prompts, through line breaks, by system.

    Args:
        facts: the right one of each prompt, as a text; None where there is none, and then "prompt" says
            None.
        nearest: {row: the nearest written fact} of the prompts that are in scope.
        condition: from the memory, one row each of `nearest`; None where that is empty.
        tokens: the most that are decoded of each prompt.
    """

    def decoded(texts, tokens, condition=None):
        # A question mark is often followed by a line break, and the answer comes after it.
        return model.generate(texts, condition, max_tokens=tokens, stop=())

    near = [nearest.get(row) for row in range(len(prompts))]
    sides = {
        "base": prompts,
        "prompt": controls.in_front(facts, prompts),
        "lookup": controls.in_front(near, prompts),
    }
    said = controls.measured(decoded, sides, tokens)
    said |= controls.measured(
        lambda texts, most: decoded(texts, most, model.zero(len(texts))), {"zero": prompts}, tokens
    )
    inside = list(nearest)
    asked, most = [prompts[row] for row in inside], [tokens[row] for row in inside]
    read = dict(zip(inside, decoded(asked, most, condition) if inside else [], strict=True))
    told = [text if fact is not None else None for fact, text in zip(facts, said["prompt"], strict=True)]
    return {
        "base": said["base"],
        "zero": said["zero"],
        "prompt": told,
        "lookup": said["lookup"],
        "larimar": [read.get(row, base) for row, base in enumerate(said["base"])],
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
