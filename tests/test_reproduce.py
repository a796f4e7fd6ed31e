"""A config of many benchmarks: what is refused, what is run, and what is not run again."""

import pytest
from known_editor import cases, saved

from larimar_jax import cli, config, pipeline
from larimar_jax.bench import counterfact, reproduce, runner, tasks
from larimar_jax.schema import ConfigError


def values(**runs):
    runs = runs or dict(first=dict(bench="counterfact", data="facts", options=dict(limit=2)))
    return dict(name="x", model="smol", data=dict(facts=""), runs=runs)


def test_every_offence_is_named_at_once():
    runs = dict(
        two=dict(bench="nothing", options={}),
        three=dict(bench="counterfact", data="facts", options=dict(limits=2)),
        four=dict(bench="counterfact", data="facts", options=dict(limit="many")),
        five=dict(bench="scope", file="facts"),
        six=dict(bench="perplexity", data="facts", options=dict(words=3)),
    )
    with pytest.raises(ConfigError) as refused:
        reproduce.parse(values(**runs) | dict(models="y"))
    for words in (
        "models: unknown key",
        "runs.two.bench: no benchmark 'nothing'; known: attack, batch, counterfact",
        "runs.three.options.limits: unknown key",
        "runs.four.options.limit: expected int, got 'many'",
        "runs.five.file: unknown key",
        "runs.six.options: --prompt-words (8) has to be above 0 and below --words (3)",
        "give it with --set data.facts=FILE",
    ):
        assert words in str(refused.value)


def test_the_papers_config_names_benchmarks_and_options_that_there_are():
    plan = config.load_dict("configs/bench_paper.py")
    plan["data"] = dict(counterfact="a", zsre="b")
    _, planned = reproduce.parse(plan)
    assert len(planned) == len(plan["runs"])
    assert {task.name for task in planned.values()} <= set(tasks())
    assert planned["longcontext"].data is None and planned["zsre"].data == "b"
    assert planned["counterfact_interface"].overrides == (
        "editing.key_features=null", "editing.answer_code=null",
    )  # fmt: skip


def test_runs_are_made_once_and_reported(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "load", lambda source, overrides: tiny)
    plan, out = tmp_path / "plan.py", tmp_path / "out"
    body = f"def get_config():\n    return ConfigDict({values()!r})\n"
    plan.write_text(f"from ml_collections import ConfigDict\n{body}")
    command = ["reproduce", f"--config={plan}", "--out", str(out)]
    assert cli.main(command) == 2
    assert "--set data.facts=FILE" in capsys.readouterr().err
    command += ["--set", f"data.facts={saved(cases(4), tmp_path / 'facts.json')}"]
    assert cli.main(command) == 0
    assert len({row["case"] for row in runner.read_rows(out / "first")}) == 2
    page = (out / "report/report.md").read_text()
    assert page.startswith("# x: smol") and "## counterfact (first)" in page
    # The folder of all, in which the report is too, stands for its runs.
    assert cli.main(["report", str(out), "--out", str(tmp_path / "again")]) == 0
    assert "## counterfact (first)" in (tmp_path / "again/report.md").read_text()

    def again(*_):
        raise AssertionError("a finished case is run again")

    monkeypatch.setattr(counterfact.CounterFact, "evaluate", again)
    assert cli.main(command) == 0
