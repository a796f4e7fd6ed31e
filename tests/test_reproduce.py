"""A config of many benchmarks: what is refused, what is run, and what is not run again."""

import json

import pytest

from larimar_jax import cli, config
from larimar_jax.bench import benchmarks, reproduce, runner

FACTS = [
    dict(
        case_id=n,
        prompt=f"Fact {n} is",
        subject=f"Fact {n}",
        target_new="new",
        ground_truth="true",
        rephrase_prompt=f"Says of fact {n}:",
        locality_prompt=f"Neighbour {n} is",
        locality_ground_truth="true",
    )
    for n in range(4)
]


def values():
    run = dict(bench="counterfact", data="facts", options=dict(limit=2))
    return dict(name="x", model="smol", data=dict(facts=""), runs=dict(one=run))


def test_every_offence_is_named_at_once():
    wrong = values()
    wrong["models"] = "y"
    wrong["runs"] |= dict(
        two=dict(bench="nothing", data="", options={}),
        three=dict(bench="counterfact", data="facts", options=dict(limits=2)),
        four=dict(bench="counterfact", data="facts", options=dict(limit="many")),
        five=dict(bench="scope", file="facts", options={}),
    )
    with pytest.raises(config.ConfigError) as refused:
        reproduce.parse(wrong)
    for words in (
        "models: unknown key",
        "runs.two.bench: no benchmark 'nothing'; known: attack, batch, counterfact",
        "runs.three.options: unrecognized arguments: --limits 2",
        "runs.four.options: argument --limit: invalid int value: 'many'",
        "runs.five.file: unknown key",
        "runs.five.data: missing",
        "give it with --set data.facts=FILE",
    ):
        assert words in str(refused.value)


def test_the_papers_config_names_benchmarks_and_options_that_there_are():
    told = config.load_dict("configs/bench_paper.py")
    told["data"] = dict(counterfact="a", zsre="b")
    plan = reproduce.parse(told)
    assert {one.bench for one in plan.runs.values()} <= set(benchmarks()) and plan.model == "smol"


@pytest.mark.parametrize("skip", [True, False])
def test_an_option_without_a_value_is_told_by_a_truth_value(skip):
    one = reproduce.One("counterfact", "facts", dict(skip_bad=skip, limit=2))
    assert reproduce._arguments(one, "smol", "f.json").skip_bad is skip


def test_runs_are_made_once_and_reported(tiny, tmp_path, monkeypatch, capsys):
    from larimar_jax.bench import systems

    monkeypatch.setattr(systems, "load", lambda source, overrides: tiny)
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    told = tmp_path / "plan.py"
    body = f"def get_config():\n    return ConfigDict({values()!r})\n"
    told.write_text(f"from ml_collections import ConfigDict\n{body}")
    command = ["reproduce", f"--config={told}", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "--set data.facts=FILE" in capsys.readouterr().err
    command += ["--set", f"data.facts={path}"]
    assert cli.main(command) == 0
    assert len(runner.read_cases(tmp_path / "out/one")) == 2
    page = (tmp_path / "out/report/report.md").read_text()
    assert page.startswith("# x: smol") and "## counterfact (one)" in page
    # The folder of all, in which the report is too, stands for its runs.
    assert cli.main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    assert "## counterfact (one)" in (tmp_path / "again/report.md").read_text()

    def again(*_):
        raise AssertionError("a finished case is run again")

    from larimar_jax.bench import counterfact

    monkeypatch.setattr(counterfact.CounterFact, "run", again)
    assert cli.main(command) == 0
