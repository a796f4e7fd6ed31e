"""This project beside what does the same work: torch with Hugging Face's towers, and a naive loop.

    training     one optimiser step, beside the same step in torch (torch_step.py, towers.py)
    generation   greedy decoding, beside transformers' `generate` (towers.py)
    scoring      CounterFact under every system, beside one call of the decoder for each

The package does not need this folder, and nothing else here needs torch: `pip install -e '.[compare]'`.
Both sides of a comparison hold the same numbers, and what they compute has to agree before it is timed.
"""


class Disagreement(ValueError):
    """Two sides that do not compute the same, so that their times cannot be compared."""
