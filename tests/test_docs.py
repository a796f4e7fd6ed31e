"""The worked examples of docs/ are a memory and a benchmark like any other."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import test_memory
from conftest import tiny_config
from known_editor import cases, knowedit

from larimar_jax import bench, cli, config, editors, memory
from larimar_jax.bench import compare, report, runner, sweep, systems

DOCS = Path(__file__).parents[1] / "docs"
CONTRACT = [
    function
    for name, function in vars(test_memory).items()
    if name.startswith("test_") and list(inspect.signature(function).parameters) == ["contract"]
]


def saved(page, path, package, monkeypatch):
    """The code of a page as a file of a package."""
    text = (DOCS / page).read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 60
    path.write_text(code, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])


@pytest.fixture
def fading(tmp_path, monkeypatch):
    saved("new_memory.md", tmp_path / "fading.py", memory, monkeypatch)
    yield memory.variants()["fading"]
    test_memory.built.cache_clear()
    sys.modules.pop("larimar_jax.memory.fading")


def test_it_fulfils_the_contract(fading):
    assert len(CONTRACT) >= 12
    for test in CONTRACT:
        test(test_memory.built("fading"))


def test_the_sweep_finds_it(fading, tmp_path):
    variants = dict(fading=dict(variant="fading", decay=[0.5, 1.0]))
    task = sweep.Sweep(latent=8, variants=variants, slots=(8,), facts=(8,), seeds=(0, 1))
    runner.run(task, tmp_path, quiet=True)
    ages = {0.5: [], 1.0: []}
    for row in runner.read_rows(tmp_path):
        ages[row["settings"]["decay"]].append(row["recall_by_age"])
    early, late = np.mean(ages[0.5], axis=0)[[0, 3]]
    assert len(task.programs) == 1 and late == 1.0 and early <= late
    assert np.mean(ages[1.0]) == 1.0


def test_a_comparison_finds_it(fading):
    parsed = compare.settings_of(tiny_config())["fading"]
    assert config.make_memory(parsed) == fading(24, 16, initial="normal")


@pytest.fixture
def portability(tmp_path, monkeypatch):
    saved("new_benchmark.md", tmp_path / "portability.py", bench, monkeypatch)
    yield bench.tasks()["portability"]
    sys.modules.pop("larimar_jax.bench.portability")


def test_command_line_runner_and_report_find_it(portability, tiny, tmp_path, monkeypatch):
    records = [
        dataclasses.replace(case, portability=((f"City {n} of", "Japan"),) * (n % 3))
        for n, case in enumerate(cases(7))
    ]
    path = knowedit(records, tmp_path / "facts.json")
    monkeypatch.setattr(systems, "load", lambda source, overrides: tiny)
    out = tmp_path / "run"
    assert cli.main(["bench", "portability", "--data", path, "--out", str(out)]) == 0
    lines = runner.read_rows(out)
    assert runner.cases_of(lines) == [1, 2, 4, 5]
    hits = tiny.judge(["City 4 of"], [["Japan"]]).accuracy[0, 0]
    (base,) = {r["accuracy"] for r in lines if (r["case"], r["system"]) == (4, "base")}
    assert base == pytest.approx(float(hits))
    run = report.read(out)
    first, second = report.sections([run, run])[1], report.sections([run, run])[3]
    assert first.items[1].title == "portability, 4 cases" and "differs" not in str(second)
    assert "verbatim lookup" in str(first.items[1])


def test_an_editor_of_ones_own_is_a_system_of_the_benchmarks(tiny, tmp_path, monkeypatch):
    saved("editors.md", tmp_path / "embed.py", editors, monkeypatch)
    path = knowedit(
        [dataclasses.replace(case, portability=()) for case in cases(3)], tmp_path / "f"
    )
    task = bench.tasks()["knowedit"](data=path, editors="embed", tokens=2, chunk=3)
    results = runner.run(task, tmp_path / "run", editor=tiny, quiet=True)["results"]
    sys.modules.pop("larimar_jax.editors.embed")
    by_kind = {entry["kind"]: entry for entry in results if entry["system"] == "embed"}
    assert by_kind["edit"]["accuracy"]["cases"] == by_kind["edit"]["exact"]["cases"] == 3
    base = {e["kind"]: e for e in results if e["system"] == "base"}
    assert base["near"]["kept"]["mean"] == 100.0
    assert by_kind["near"]["kept"]["mean"] < 100.0


def test_the_readmes_results_are_lines_of_the_report():
    """A number that is changed in one of the two files alone is found here."""

    files = ("README.md", "docs/results.md")
    readme, report_page = ((DOCS.parent / path).read_text("utf-8") for path in files)
    results = readme.partition("## Results")[2].partition("## Train")[0]
    shown = [line for line in results.splitlines() if line.count("|") in (8, 9)]
    assert len(shown) >= 10 and not {*shown} - {*report_page.splitlines()}
