"""What the noise of addressing costs (Fig. 6)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.metrics import rewrite_columns
from larimar_jax.bench.queries import CONTROLS
from larimar_jax.bench.systems import Systems, case_keys
from larimar_jax.bench.task import EditTask, Metric, Pivot, Plot, option
from larimar_jax.pipeline import Pipeline

# A control, or the memory at a σ_W.
Side = tuple[str, float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(EditTask):
    """What the noise of addressing costs: edit success and fluency as σ_W grows (Fig. 6).

    Each fact of CounterFact is written into an empty memory of its own, and W is drawn around its
    mean (Algorithm 1) with one σ_W after the other, for all weights alike; a case draws with a key
    of its own, under each σ_W the same. Measured are S of edit and paraphrases through the memory,
    whether or not they are in scope, and the perplexity that the base LM gives to the greedy
    continuation of the edit prompt, to as many words as the shortest of its case has. Controls,
    which no σ_W changes, have continuations of their own, judged after the plain prompt; that of
    verbatim lookup is no text of a decoder, and has no perplexity.
    """

    metrics: ClassVar = {
        "S": Metric("S"),
        "perplexity": Metric("perplexity", 1.0, lower=True, exponential=True),
        "silent": Metric("without words", lower=True, compared=False),
    }
    factors = ("sigma",)
    labels: ClassVar = {"sigma": "σ_W", "open": "Larimar"}
    kinds = ("edit", "paraphrase")
    tables = (
        Pivot(("system", "sigma"), "kind", ("S",)),
        Pivot(("system", "sigma"), None, ("perplexity", "silent"), where={"kind": "edit"}),
    )
    plots = (
        Plot("sigma", "S", xlabel="σ_W (standard deviation of an addressing weight)"),
        Plot("sigma", "perplexity", where={"kind": "edit"}, log="y", xlabel="σ_W"),
    )
    # Which σ_W a model has is its own.
    overview: ClassVar = {"kind": ()}
    reference = (
        "Fig. 6: perplexity of generations and edit success against σ_W (a figure without numbers)."
    )

    limit: int = option("records", default=100)
    sigmas: tuple[float, ...] = option(
        "σ_W, a standard deviation", default=(0.0, 0.01, 0.03, 0.1, 0.3, 1.0), least=0
    )
    tokens: int = option("of a continuation", default=20)
    seed: int = option("of the noise", default=0, least=0)

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield S and the surprise of the continuation under every control and σ_W."""
        facts = [(case.prompt, case.target_new) for case in cases]
        groups = [
            [
                dict(case=case.case_id, kind="paraphrase" if place else "edit", prompt=prompt)
                | {"sigma": None, "new": case.target_new, "true": case.target_true}
                for place, prompt in enumerate([case.prompt, *case.paraphrases])
            ]
            for case in cases
        ]
        columns = [column for group in groups for column in group]
        pairs = [(column["new"], column["true"]) for column in columns]
        first = np.flatnonzero([column["kind"] == "edit" for column in columns])
        rng = case_keys(self.seed, [case.case_id for case in cases])
        losses: dict[Side, np.ndarray] = {}
        texts: dict[Side, np.ndarray] = {}
        for sigma in sorted(set(self.sigmas)):
            noisy = Systems(LarimarEditor(_with_noise(systems.model, sigma)))
            queries = noisy.single_edits(facts, groups, **({"rng": rng} if sigma else {}))
            # No σ_W changes the controls.
            for names, key in ((("open",), sigma), (() if losses else CONTROLS, None)):
                for name, values in queries.score(pairs, names).items():
                    losses[name, key] = values
                for name, values in queries.take(first).generate(self.tokens, names).items():
                    texts[name, key] = values
        nats = self._surprise(systems.model, [case.prompt for case in cases], texts)
        spoken = {int(row): number for number, row in enumerate(first)}
        for row, column in enumerate(columns):
            for side in sorted(losses, key=lambda side: side[0] == "open"):
                fixed = column | {"system": side[0], "sigma": side[1]}
                if row in spoken:
                    fixed["text"] = texts[side][spoken[row]]
                    if side[0] != "verbatim":
                        fixed["perplexity"] = nats[side][spoken[row]]
                        fixed["silent"] = float(fixed["perplexity"] is None)
                yield fixed | rewrite_columns(column, losses[side][row])

    def _surprise(
        self, model: Pipeline, prompts: Sequence[str], texts: Mapping[Side, np.ndarray]
    ) -> dict[Side, list[float | None]]:
        """ℓ of each continuation under the base LM, in nats a token, each text once; None of one
        without words."""
        spoken = {side: rows for side, rows in texts.items() if side[0] != "verbatim"}
        # A continuation through the memory may end with its answer: all have the same length.
        by_case = zip(*spoken.values(), strict=True)
        lengths = [min(len(text.split()) for text in row) for row in by_case]
        cut = {
            side: [" ".join(text.split()[:most]) for text, most in zip(rows, lengths, strict=True)]
            for side, rows in spoken.items()
        }
        pairs = {side: list(zip(prompts, rows, strict=True)) for side, rows in cut.items()}
        unique = list(dict.fromkeys(pair for rows in pairs.values() for pair in rows if pair[1]))
        scores = model.score([prompt for prompt, _ in unique], [[text] for _, text in unique])
        nats = dict(zip(unique, scores[:, 0].tolist(), strict=True))
        return {side: [nats.get(pair) for pair in rows] for side, rows in pairs.items()}


def _with_noise(model: Pipeline, sigma: float) -> Pipeline:
    """The model with this σ_W."""
    if not sigma:
        return model
    prepared = dataclasses.replace(
        model.prepared,
        log_variance=jnp.full_like(model.prepared.log_variance, 2 * math.log(sigma)),
        variance_by_query=None,
        variance_by_memory=None,
    )
    return model.with_memory(model.memory, prepared)
