"""What the noise of addressing costs (Fig. 6)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from larimar_jax.bench.editor import LarimarEditor
from larimar_jax.bench.metrics import success
from larimar_jax.bench.queries import Queries
from larimar_jax.bench.systems import Systems, case_keys
from larimar_jax.bench.task import EditTask, Metric, Pivot, Plot, option
from larimar_jax.data.edit_records import EditRecord
from larimar_jax.pipeline import Pipeline

CONTROLS = ("base", "zero", "prompt", "lookup", "verbatim")
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
        "silent": Metric("without words", lower=True),
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
    reference = (
        "Fig. 6: perplexity of generations and edit success against σ_W (a figure without numbers)."
    )

    limit: int = option("records", default=100)
    sigmas: tuple[float, ...] = option("σ_W", default=(0.0, 0.01, 0.03, 0.1, 0.3, 1.0))
    tokens: int = option("of a continuation", default=20)
    seed: int = option("of the noise", default=0)

    def __post_init__(self):
        super().__post_init__()
        if not self.sigmas or not all(0 <= sigma < math.inf for sigma in self.sigmas):
            raise ValueError(f"σ_W is a standard deviation, at least 0; got {list(self.sigmas)}")

    def headlines(self, results):
        """Return none: which σ_W a model has is its own."""
        return []

    def cases(self, systems) -> Sequence[EditRecord]:
        """Return the records."""
        return self.records

    def evaluate(self, systems, cases) -> Iterator[dict[str, Any]]:
        """Yield S and the surprise of the continuation under every control and σ_W."""
        facts = [(case.prompt, case.target_new) for case in cases]
        queries = [[case.prompt, *case.paraphrases] for case in cases]
        owners = [
            (case, place)
            for case, row in zip(cases, queries, strict=True)
            for place in range(len(row))
        ]
        pairs = [(case.target_new, case.target_true) for case, _ in owners]
        first = np.flatnonzero([place == 0 for _, place in owners])
        rng = case_keys(self.seed, [case.case_id for case in cases])
        sides: dict[Side, Queries] = {}
        for sigma in sorted(set(self.sigmas)):
            noisy = Systems(LarimarEditor(_with_noise(systems.model, sigma)))
            keys = {"rng": rng} if sigma else {}
            sides["open", sigma] = noisy.single_edits(facts, queries, **keys)
        # What is in scope depends on no σ_W.
        plain = next(iter(sides.values()))
        losses = {(name, None): v for name, v in plain.score(pairs, CONTROLS).items()}
        begun = plain.take(first)
        texts = {(name, None): v for name, v in begun.generate(self.tokens, CONTROLS).items()}
        for side, each in sides.items():
            losses[side] = each.score(pairs, ("open",))["open"]
            texts[side] = each.take(first).generate(self.tokens, ("open",))["open"]
        surprise = self._surprise(systems.model, begun.prompts, texts)
        for row, (case, place) in enumerate(owners):
            number = int(np.searchsorted(first, row, side="right")) - 1
            for (system, sigma), values in losses.items():
                new, true = (float(loss) for loss in values[row])
                kind = "paraphrase" if place else "edit"
                columns = {
                    "case": case.case_id,
                    "system": system,
                    "kind": kind,
                    "sigma": sigma,
                    "S": success(kind, new, true),
                    "prompt": plain.prompts[row],
                    "written": plain.facts[row],
                    "loss_new": new,
                    "loss_true": true,
                }
                if not place:
                    nats = surprise[system, sigma][number]
                    columns |= {"perplexity": nats, "text": texts[system, sigma][number]}
                    columns["silent"] = float(nats is None) if system != "verbatim" else None
                yield columns

    def _surprise(
        self, model: Pipeline, prompts: Sequence[str], texts: Mapping[Side, np.ndarray]
    ) -> dict[Side, list[float | None]]:
        """ℓ of each continuation under the base LM, in nats a token, each text once; None of one
        without words."""
        spoken = {side: text for side, text in texts.items() if side[0] != "verbatim"}
        # A continuation through the memory may end with its answer: all have the same length.
        shortest = [
            min(len(text[row].split()) for text in spoken.values()) for row in range(len(prompts))
        ]
        cut = {
            side: [" ".join(text.split()[:most]) for text, most in zip(each, shortest, strict=True)]
            for side, each in spoken.items()
        }
        unique = list(
            dict.fromkeys(
                (prompts[row], text)
                for each in cut.values()
                for row, text in enumerate(each)
                if text
            )
        )
        scores = model.score([prompt for prompt, _ in unique], [[text] for _, text in unique])[:, 0]
        nats = {key: float(score) for key, score in zip(unique, scores, strict=True)}
        none = dict.fromkeys(texts, [None] * len(prompts))
        return none | {
            side: [nats.get((prompts[row], text)) for row, text in enumerate(each)]
            for side, each in cut.items()
        }


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
