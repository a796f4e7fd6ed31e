"""The benchmark of a training step on tiny towers: what it records, counts and refuses."""

import argparse
import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from larimar_jax import config as configs
from larimar_jax.bench import jax_step, runner, training
from larimar_jax.train import flops, sharding
from larimar_jax.train.step import Stepper, initialise


@pytest.fixture(scope="module")
def config():
    values = configs.load_dict(training.CONFIG)
    towers, data = values["model"], values["data"]
    towers["encoder"] |= dict(vocab_size=90, width=24, depth=2, heads=4, mlp=40)
    towers["decoder"] |= dict(vocab_size=110, width=32, depth=3, heads=4, mlp=48, max_length=32)
    towers["latent"], values["memory"]["slots"] = 20, 12
    data |= dict(encoder_tokens=8, decoder_tokens=10, episode=(3,), batch=2)
    return configs.parse(values)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(training, "_REST", 0.0)
    monkeypatch.setattr(training, "_GEMM", 16)


def test_a_run_is_recorded_and_taken_up(config, tmp_path):
    made = training.Training(config, 2, alone=True)
    found = runner.run(made, tmp_path, quiet=True)["results"]
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    median = {
        name: np.median([line["seconds"][name] for line in lines]) for name in lines[0]["seconds"]
    }
    assert found["tokens_per_second"] == pytest.approx(2 * 3 * (8 + 10) / median["step"])
    rate = sum(training.matrix_flops(config).values()) / median["step"]
    gemm = 2 * 16**3 * training._PRODUCTS / median["gemm"]
    assert found["utilisation"] == pytest.approx(rate / gemm)
    assert found["pipeline_over_constant"] == pytest.approx(
        median["step again"] / median["pipeline"]
    )
    share = found["memory_share"]
    assert share["timed alone"] == pytest.approx(median["memory"] / median["step"])
    again = runner.run(training.Training(config, 2, alone=True), tmp_path, quiet=True)
    assert again["results"] == found


def test_the_step_without_memory_decodes_the_encodings(config):
    ours = jax_step.Ours(config)
    state, frozen = ours._state, ours._frozen
    batch = ours._constant
    terms = ours._without.step(state, frozen, batch)[1]["terms"]
    assert terms["reconstruction"] == pytest.approx(float(terms["autoencoding"]), rel=1e-6)


def test_flops_are_those_of_the_products_in_the_traced_step(config):
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    skeleton = initialise(config, mesh)[0]
    whole = Stepper(config, skeleton, mesh).flops(3)
    made = jax_step.WithoutMemory(config, skeleton, mesh)
    without = flops.count(made.step, *made.arguments(3))
    said = training.matrix_flops(config)
    # The traced step has the memory's factorisations' products as well.
    assert sum(said.values()) - said["memory"] == pytest.approx(without, rel=0.02)
    assert without < whole


class _Theirs:
    """In place of torch: the losses of our side, times a factor."""

    factor, steps = 1.0, 0

    def __init__(self, config, model):
        self._config = config

    def losses(self, batch):
        ours = jax_step.Ours(self._config)
        return {name: value * type(self).factor for name, value in ours.losses().items()}

    def step(self, batch):
        type(self).steps += 1


@pytest.fixture
def theirs(monkeypatch):
    kind = type("Theirs", (_Theirs,), {})
    module = types.ModuleType("larimar_jax.bench.torch_step")
    module.Theirs = kind
    monkeypatch.setitem(sys.modules, module.__name__, module)
    from larimar_jax import bench

    monkeypatch.setattr(bench, "torch_step", module, raising=False)
    return kind


def test_both_sides_run_in_turns(config, theirs, tmp_path):
    found = runner.run(training.Training(config, 2, alone=False), tmp_path, quiet=True)["results"]
    assert theirs.steps == 1 + 2  # one untimed
    assert found["ratio"] == pytest.approx(found["seconds"]["torch"] / found["seconds"]["step"])
    assert set(found["apart"]) >= {"loss", "reconstruction", "language", "kl", "gradient_norm"}
    assert max(found["apart"].values()) < training.AGREEMENT


def test_sides_that_compute_differently_are_not_timed(config, theirs, tmp_path):
    theirs.factor = 1.001
    with pytest.raises(training.Disagreement, match="gradient_norm"):
        runner.run(training.Training(config, 1, alone=False), tmp_path, quiet=True)
    assert theirs.steps == 0
    with pytest.raises(training.Disagreement, match="loss: nan here"):
        training.agreement({"loss": float("nan")}, {"loss": 1.0})


def test_the_torch_step_computes_the_same(config):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from larimar_jax.bench import torch_step

    ours = jax_step.Ours(config)
    theirs = torch_step.Theirs(config, ours.model())
    training.agreement(ours.losses(), theirs.losses(ours.batch))


def test_what_torch_does_not_compute_is_named_at_once(config):
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, tied_slots=False),
        train=dataclasses.replace(config.train, accumulate=2),
        data=dataclasses.replace(config.data, episode=(3, 4)),
    )
    with pytest.raises(ValueError, match=r"(?s)tied_slots.*accumulate.*data.episode"):
        training.Training(other, 1, alone=False)


def test_a_comparison_without_torch_says_what_to_install(monkeypatch):
    parser = argparse.ArgumentParser()
    training.arguments(parser)
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"larimar-jax\[compare\].*--alone"):
        training.experiment(parser.parse_args([]))
