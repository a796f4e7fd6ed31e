"""ZsRE on a model whose answers are known, against a plain loop."""

import argparse
import json

import numpy as np
import pytest
from rich.console import Console
from test_bench import KnownEditor, cases, fraction

from larimar_jax import bench
from larimar_jax.bench import metrics, runner, systems, zsre
from larimar_jax.bench.editor import LarimarEditor


@pytest.fixture
def finished(tmp_path):
    """(folder, summary) of an uninterrupted run."""
    made = zsre.ZsRE(KnownEditor(), cases(11), data={}, chunk=4)
    return tmp_path / "run", runner.run(made, tmp_path / "run", quiet=True)


def plain(case):
    """{system: {kind: [accuracy]}} of one case, one prompt at a time."""
    known = KnownEditor()
    fact = (case.prompt, case.target_new)
    asked = [("rewrite", case.prompt, case.target_new)]
    asked += [("paraphrase", prompt, case.target_new) for prompt in case.paraphrases]
    near = zip(case.neighbourhood, case.neighbourhood_targets, strict=True)
    asked += [("neighbourhood", *pair) for pair in near]
    found = {system: {kind: [] for kind in zsre.KINDS} for system in systems.SYSTEMS}
    for kind, prompt, target in asked:
        inside = bool(known.recall([fact], [[prompt]]).in_scope[0])

        def one(text, condition, target=target):
            return float(known.accuracy([text], [target], condition)[0])

        base = one(prompt, None)
        in_front = one(f"{known.written(*fact).rstrip('.')}. {prompt}", None)
        values = {
            "base": base,
            "zero": one(prompt, known.zero(1)),
            "prompt": in_front,
            "lookup": in_front if inside else base,
            "larimar": one(prompt, [fact]) if inside else base,
            "open": one(prompt, [fact]),
        }
        for system, value in values.items():
            found[system][kind].append(value)
    return found


def test_records_and_summary_are_those_of_a_plain_loop(finished):
    folder, summary = finished
    records = runner.read_cases(folder)
    loops = [plain(case) for case in cases(11)]
    assert [record["accuracy"] for record in records] == loops
    results = summary["results"]
    for system in systems.SYSTEMS:
        for kind in zsre.KINDS:
            means = [np.mean(one[system][kind]) for one in loops if one[system][kind]]
            assert results[system][kind]["mean"] == pytest.approx(100 * np.mean(means))
            assert results[system][kind]["cases"] == len(means)
    for line, kind, paper in zip(zsre.headlines(summary), zsre.KINDS, (98.1, 81.6, 19.7), strict=True):
        assert line.values["larimar"] == results["larimar"][kind] and float(line.paper) == paper
    # Written answers are found, and that beats what the hash gives.
    assert results["larimar"]["rewrite"]["mean"] > results["base"]["rewrite"]["mean"]
    assert json.loads((folder / runner.SUMMARY).read_text()) == summary


def test_a_run_that_was_cut_off_goes_on_line_for_line(finished, tmp_path):
    lines = (finished[0] / runner.CASES).read_bytes()
    folder = tmp_path / "cut"
    made = zsre.ZsRE(KnownEditor(), cases(11), data={}, chunk=4)
    runner.run(made, folder, quiet=True)
    (folder / runner.CASES).write_bytes(lines[: len(lines) // 2])
    runner.run(made, folder, quiet=True)
    assert (folder / runner.CASES).read_bytes() == lines


def test_the_table_has_every_system_and_its_note(finished):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    summary = json.loads(json.dumps(finished[1]))
    summary["results"]["larimar"]["rewrite"]["note"] = "does not beat the lookup"
    for shown in zsre.tables(summary):
        console.print(shown)
    said = console.export_text()
    assert all(label in said for label in systems.SYSTEMS.values()) and "does not beat" in said


def test_a_value_that_is_no_number_is_refused_and_the_command_reads_its_options():
    class Broken(KnownEditor):
        def accuracy(self, prompts, targets, condition):
            return np.full(len(prompts), np.nan, np.float32)

    with pytest.raises(metrics.UnusableScore, match="case 1, rewrite, system base"):
        zsre.ZsRE(Broken(), cases(2), data={}).run(cases(2))
    parser = argparse.ArgumentParser()
    bench.benchmark("zsre").arguments(parser)
    said = parser.parse_args(["--data", "x", "--target", "answer"])
    assert (said.target, said.limit, said.model) == ("answer", None, "smol")


def test_released_asks_for_every_token_apart():
    """Against a plain loop over prompts and tokens."""
    known, some = KnownEditor(), cases(7)
    made = zsre.ZsRE(known, some, data={}, chunk=3, mode="released")
    assert made.settings["mode"] == "released"
    shares = set()
    for case, record in zip(some, made.run(some), strict=True):
        fact = (case.prompt, case.target_new)
        for kind in zsre.KINDS:
            rows = zip(record["prompts"][kind], record["targets"][kind], strict=True)
            for row, (prompt, target) in enumerate(rows):
                wanted, inside = {name: [] for name in systems.SYSTEMS}, []
                words = target.split()
                for place in range(len(words)):
                    seen = f"{prompt} {' '.join(words[:place])}".strip()
                    inside.append(fraction("scope", seen) > 0.4)

                    def hit(text, condition=None, target=target, place=place):
                        return float(known.hits([text], [target], [place], condition)[0])

                    base, zero, read = hit(prompt), hit(prompt, known.zero(1)), hit(prompt, [fact])
                    fact_in_front = hit(f"{known.written(*fact).rstrip('.')}. {prompt}")
                    wanted["base"].append(base)
                    wanted["zero"].append(zero)
                    wanted["prompt"].append(fact_in_front)
                    wanted["lookup"].append(fact_in_front if inside[-1] else zero)
                    wanted["larimar"].append(read if inside[-1] else zero)
                    wanted["open"].append(read)
                shares.add(float(np.mean(inside)))
                assert record["in_scope"][kind][row] == pytest.approx(np.mean(inside))
                for name, hits in wanted.items():
                    assert record["accuracy"][name][kind][row] == pytest.approx(np.mean(hits))
    assert {0.0, 0.5, 1.0} <= shares


def test_hits_of_the_tiny_model_are_those_of_every_beginning_alone(tiny):
    made = LarimarEditor(tiny)
    prompts, target = ["City 4 of", "The land of"], "Rome and Oslo"
    pieces = made.pieces(target)
    assert pieces[-1] == target and len(pieces) > 2
    condition = made.recall([("City 4 of", "Rome"), ("Land", "Oslo")], [[p] for p in prompts])
    condition = condition.condition(np.arange(2))
    hits = np.array(
        [made.hits(prompts, [target] * 2, [place] * 2, condition) for place in range(len(pieces))]
    )
    np.testing.assert_allclose(hits.mean(axis=0), made.accuracy(prompts, [target] * 2, condition))
