"""The benchmarks of single edits are what a plain loop in float64 says, in both modes."""

import dataclasses

import numpy as np
import pytest
from plain import SYSTEMS, Plain, scores
from test_bench import cases

from larimar_jax.bench import counterfact, zsre
from larimar_jax.bench.editor import LarimarEditor

MODES = ("rome", "released")


def records():
    return [
        dataclasses.replace(case, paraphrases=tuple(f"It is so. {p}" for p in case.paraphrases))
        for case in cases(6)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_counterfact_is_that_of_a_plain_loop(tiny, mode):
    some = records()
    made = counterfact.CounterFact(LarimarEditor(tiny), some, data={}, chunk=4, mode=mode)
    found = [*made.run(some[:4]), *made.run(some[4:])]
    plain = [Plain(tiny).counterfact(record, mode) for record in some]
    decided = set()
    for record, wanted in zip(found, plain, strict=True):
        for system in SYSTEMS:
            for kind, pairs in wanted[system].items():
                # An answer that has all the probability has a loss of rounding.
                found_pairs = record["loss"][system][kind]
                np.testing.assert_allclose(found_pairs, pairs, rtol=2e-5, atol=1e-6)
        decided |= {inside for row in record["in_scope"].values() for inside in np.ravel(row).tolist()}
    assert decided == {True, False}
    results = counterfact.summarise(found)
    for system in SYSTEMS:
        wanted = scores(plain, system)
        for kind in ("edit", "paraphrase", "neighbourhood"):
            for name in ("S", "M"):
                assert results[system][kind][name]["mean"] == pytest.approx(
                    wanted[kind][name], abs=1e-3
                )


@pytest.mark.parametrize("mode", MODES)
def test_zsre_is_that_of_a_plain_loop(tiny, mode):
    some = records()
    made = zsre.ZsRE(LarimarEditor(tiny), some, data={}, chunk=4, mode=mode)
    for record, case in zip(made.run(some), some, strict=True):
        wanted = Plain(tiny).zsre(case, mode)
        for system in SYSTEMS:
            for kind, shares in wanted[system].items():
                np.testing.assert_allclose(record["accuracy"][system][kind], shares, rtol=1e-6)
