"""The worked example of docs/new_memory.md is a memory like any other."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import test_memory

from larimar_jax import memory
from larimar_jax.bench import runner, sweep

PAGE = Path(__file__).parents[1] / "docs" / "new_memory.md"
CONTRACT = [
    function
    for name, function in vars(test_memory).items()
    if name.startswith("test_") and list(inspect.signature(function).parameters) == ["contract"]
]


@pytest.fixture
def fading(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 60
    (tmp_path / "fading.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(memory, "__path__", [*memory.__path__, str(tmp_path)])
    yield memory.variants()["fading"]
    test_memory.built.cache_clear()
    sys.modules.pop("larimar_jax.memory.fading")


def test_it_fulfils_the_contract(fading):
    assert len(CONTRACT) >= 12
    for test in CONTRACT:
        test(test_memory.built("fading"))


def test_the_sweep_finds_it(fading, tmp_path):
    values = dict(
        name="fading",
        latent=8,
        paired=False,
        zsre="",
        variants=dict(fading=dict(variant="fading", keep=[0.5, 1.0])),
        slots=[8],
        facts=[8],
        rephrasings=[0],
        noises=[0.0],
        seeds=[0, 1],
    )
    made = sweep.Sweep(sweep.parse(values))
    runner.run(made, tmp_path / "run", quiet=True)
    ages = {record["keep"]: [] for record in runner.read_cases(tmp_path / "run")}
    for record in runner.read_cases(tmp_path / "run"):
        ages[record["keep"]].append(record["recall_by_age"])
    early, late = np.mean(ages[0.5], axis=0)[[0, 3]]
    assert made.compiled == 1 and late == 1.0 and early <= late
    assert np.mean(ages[1.0]) == 1.0
