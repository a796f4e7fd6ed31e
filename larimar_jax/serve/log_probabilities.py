"""Log probabilities of an answer's tokens, as clients of OpenAI's API read them."""

from collections.abc import Sequence
from typing import Any

from larimar_jax.scoring import TokenScores
from larimar_jax.weights.tokenizer import Tokenizer


def as_sent(
    tokenizer: Tokenizer,
    text: str,
    tokens: Sequence[int],
    scores: TokenScores | None,
    likeliest: int,
    is_chat: bool,
) -> dict[str, Any]:
    """Return what a choice holds of the tokens that its text has: each with its log probability, and the
    likeliest there with theirs.

    Args:
      tokens: of the answer, of which a stop may have cut off the last ones.
      scores: None where there are no tokens.
    """
    begins = [len(tokenizer.decode(tokens[:place])) for place in range(len(tokens))]
    begins = [begin for begin in begins if begin < len(text)]
    rows = []
    for place in range(len(begins)):
        pairs = [(tokens[place], scores.log_p[place])]
        pairs += zip(scores.top[place, :likeliest], scores.top_log_p[place], strict=False)
        rows.append([(tokenizer.decode([int(token)]), float(log_p)) for token, log_p in pairs])
    if is_chat:
        entries = [
            [dict(token=token, logprob=log_p, bytes=[*token.encode()]) for token, log_p in row]
            for row in rows
        ]
        return dict(content=[dict(own, top_logprobs=top) for own, *top in entries], refusal=None)
    return dict(
        tokens=[row[0][0] for row in rows],
        token_logprobs=[row[0][1] for row in rows],
        top_logprobs=[dict(row[1:]) for row in rows],
        text_offset=begins,
    )
