"""The benchmark of a training step on tiny towers: what it records, counts and refuses."""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from larimar_jax import config as configs
from larimar_jax.bench import jax_step, runner, torch_step, training
from larimar_jax.train import flops, sharding
from larimar_jax.train.step import TrainStep, initialise


@pytest.fixture(scope="module")
def config():
    values = configs.load_dict(training.CONFIG)
    towers, data = values["model"], values["data"]
    towers["encoder"] |= dict(vocab_size=90, width=24, depth=2, heads=4, mlp=40)
    towers["decoder"] |= dict(vocab_size=110, width=32, depth=3, heads=4, mlp=48, max_length=32)
    towers["latent"], values["memory"]["slots"] = 20, 12
    data |= dict(encoder_tokens=8, decoder_tokens=10, episode=(3,), batch=2)
    return configs.parse(values)


SMOL = Path(training.CONFIG).with_name("smol.py")
LORA = 'model.lora={"rank": 3, "scale": 0.5, "modules": "^decoder/layers/"}'


def small(*changes):
    """The default model's config with tiny towers of its families, and settings that differ."""
    values = configs.load_dict(SMOL)
    towers, data = values["model"], values["data"]
    towers["encoder"] = dict(
        family="bert", vocab_size=90, width=24, depth=2, heads=4, mlp=40, max_length=32, type_vocab=2,
        norm_eps=1e-12, pooling="mean", normalize=True,
    )
    towers["decoder"] = dict(
        family="llama", vocab_size=110, width=32, depth=3, heads=4, kv_heads=2, head_size=8, mlp=48,
        max_length=64, rope_theta=1e4, rope_scaling=None, norm_eps=1e-5, tied_head=True,
        attention_bias="none", mlp_bias=False, window=0, unwindowed=0,
    )
    towers["latent"], values["memory"]["slots"] = 24, 30
    data |= dict(encoder_tokens=8, decoder_tokens=10, episode=(3,), batch=2)
    return configs.parse(configs.override(values, changes))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(training, "_REST", 0.0)
    monkeypatch.setattr(training, "_GEMM", 16)


def test_the_step_without_memory_decodes_the_encodings(config):
    ours = jax_step.Ours(config)
    state, frozen = ours._state, ours._frozen
    batch = ours._constant
    terms = ours._without.step(state, frozen, batch)[1]["terms"]
    assert terms["reconstruction"] == pytest.approx(float(terms["autoencoding"]), rel=1e-6)


def test_flops_are_those_of_the_products_in_the_traced_step(config):
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    skeleton = initialise(config, mesh)[0]
    whole = TrainStep(config, skeleton, mesh).flops(3)
    made = jax_step.WithoutMemory(config, skeleton, mesh)
    without = flops.count(made.step, *made.arguments(3))
    said = training.matrix_flops(config)
    # The traced step has the memory's factorisations' products as well.
    assert sum(said.values()) - said["memory"] == pytest.approx(without, rel=0.02)
    assert without < whole


class _Theirs:
    """In place of torch: it says what it is told to, and counts its steps."""

    said, steps = {}, 0

    def __init__(self, config, model):
        self._ours = jax_step.Ours(config)

    def losses(self, batch):
        return type(self).said or self._ours.losses()

    def step(self, batch):
        type(self).steps += 1


@pytest.fixture
def theirs(monkeypatch):
    kind = type("Theirs", (_Theirs,), {})
    monkeypatch.setattr(torch_step, "Theirs", kind)
    return kind


def test_both_sides_run_in_turns_and_are_taken_up(config, theirs, tmp_path):
    made = training.Training(config, 2, alone=False)
    found = runner.run(made, tmp_path, quiet=True)["results"]
    assert theirs.steps == 1 + 2  # one untimed
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    median = {
        name: np.median([line["seconds"][name] for line in lines]) for name in lines[0]["seconds"]
    }
    rate = sum(training.matrix_flops(config).values()) / median["step"]
    gemm = 2 * 16**3 * training._PRODUCTS / median["gemm"]
    best = min(line["seconds"]["torch"] for line in lines)
    best /= min(line["seconds"]["step"] for line in lines)
    expected = {
        "tokens_per_second": 2 * 3 * (8 + 10) / median["step"],
        "utilisation": rate / gemm,
        "pipeline_over_constant": median["step again"] / median["pipeline"],
        "ratio": median["torch"] / median["step"],
        "ratio_of_best": best,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    used = {
        name: np.median([line["cpu_seconds"][name] for line in lines]) for name in ("torch", "step")
    }
    assert found["of_cpu_seconds"]["ratio"] == pytest.approx(used["torch"] / used["step"])
    share = found["memory_share"]
    assert share["timed alone"] == pytest.approx(median["memory"] / median["step"])
    assert share["by difference"] == pytest.approx(
        1 - median["without memory"] / median["step again"]
    )
    assert set(found["apart"]) >= {"loss", "reconstruction", "language", "kl", "gradient_norm"}
    assert max(found["apart"].values()) < training.AGREEMENT
    again = runner.run(training.Training(config, 2, alone=False), tmp_path, quiet=True)
    assert again["results"] == found


def test_sides_that_compute_differently_are_not_timed(config, theirs, tmp_path, monkeypatch):
    theirs.said = {"loss": 1.001, "gradient_norm": 2.0}
    monkeypatch.setattr(
        jax_step.Ours, "losses", lambda ours: {"loss": 1.0, "kl": 3.0, "gradient_norm": 2.0}
    )
    with pytest.raises(training.Disagreement, match="loss: 1 here, 1.001 in torch"):
        runner.run(training.Training(config, 1, alone=False), tmp_path, quiet=True)
    assert theirs.steps == 0
    with pytest.raises(training.Disagreement, match="loss: nan here"):
        training.agreement({"loss": float("nan")}, {"loss": 1.0})


def test_the_torch_step_computes_the_same(config):
    _agree(config)


def test_a_fused_tensor_is_frozen_as_a_whole_or_not_at_all(config):
    whole = "^decoder/layers/attention/(query|key|value)/"
    _agree(_frozen(config, whole))
    with pytest.raises(ValueError, match=r"decoder/layers/attention/key/kernel.*Freeze all of them"):
        _agree(_frozen(config, "^decoder/layers/attention/key/kernel$"))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (LORA,),
        # Everything is trained, β counts, all routes are decoded, the prior is wide.
        ("train.frozen=[]", "objective.kl=0.3", "objective.autoencoding=0.5", "objective.language=2.0",
         "memory.slots=12", "model.slots_per_layer=3", "model.decoder.tied_head=false"),
        ('train.frozen=["^encoder/layers/", "^to_slots/", "^decoder/layers/.*/kernel$"]',
         'model.lora={"rank": 2, "scale": 2.0, "modules": "(query|up)$"}', "model.tied_slots=true",
         "model.decoder.attention_bias=qkv", "model.encoder.pooling=cls", "objective.kl=0.3"),
    ],
    ids=["frozen", "low-rank", "trained", "partly"],
)
def test_the_torch_step_of_the_default_models_families_computes_the_same(changes):
    _agree(small(*changes))


@pytest.mark.parametrize("products", [None, "bfloat16"])
def test_a_step_in_torch_moves_what_is_trained_and_nothing_else(products):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = small(LORA, f"train.products={products or 'null'}")
    ours = jax_step.Ours(config)
    theirs = torch_step.Theirs(config, ours.model())
    larimar = theirs._larimar
    assert set(larimar.trained) == set(ours._state.params)
    table = larimar.decoder.get_input_embeddings().weight
    kernel = larimar.decoder.model.layers[0].mlp.up_proj.weight
    before = {name: [t.clone() for t in held] for name, held in larimar.trained.items()}
    table_before, kernel_before = table.clone(), kernel.clone()
    theirs.step(ours.batch)
    rate = config.train.learning_rate / config.train.warmup_steps
    for name, held in larimar.trained.items():
        for tensor, old in zip(held, before[name], strict=True):
            assert tensor.dtype == torch.float32
            # The first step of Adam moves nearly every number by the rate.
            moved = (tensor - old).abs()
            assert 0 < float(moved.max().detach()) <= rate * 1.01, name
    torch.testing.assert_close(table, table_before, rtol=0, atol=0)
    now = larimar.decoder.model.layers[0].mlp.up_proj.weight
    rounded = kernel_before if products is None else kernel_before.bfloat16()
    torch.testing.assert_close(now, rounded, rtol=0, atol=0)


def test_flops_of_what_is_frozen_are_those_of_the_trace():
    made = training.Training(small(LORA), 1, alone=True)
    parts = ("step", "step again", "gemm", "pipeline", "without memory", "memory")
    seconds = dict.fromkeys(parts, 2.0)
    record = {"seconds": seconds, "cpu_seconds": seconds, "flops_in_trace": 6e9, "apart": {}}
    found = made.summarise([record])
    assert found["flops"] == {"traced": 6e9} and found["step_flops_per_second"] == 3e9


def test_settings_that_differ_are_given_on_the_command_line():
    parser = argparse.ArgumentParser()
    training.arguments(parser)
    told = ["--config", str(training.CONFIG), "--alone", "--set", "train.products=bfloat16",
            "--set", "data.batch=3", "train.frozen=[\"^encoder/\"]"]
    made = training.experiment(parser.parse_args(told))
    assert made.settings["config"]["train"]["products"] == "bfloat16"
    assert made.settings["config"]["data"]["batch"] == 3
    assert made.settings["config"]["train"]["frozen"] == ["^encoder/"]


def test_towers_by_their_weights_get_the_sizes_of_these():
    try:
        config = jax_step.with_sizes(configs.load(SMOL))
    except FileNotFoundError:
        pytest.skip("the packaged weights are not installed")
    assert (config.model.encoder.family, config.model.decoder.family) == ("bert", "llama")
    assert config.model.encoder.sizes.pooling == "mean" and config.model.encoder.sizes.normalize
    assert training.comparable(config) == []


def test_gradients_may_lie_further_apart_where_it_is_said():
    ours, theirs = {"loss": 1.0, "gradient_norm": 1.0005}, {"loss": 1.0, "gradient_norm": 1.0}
    assert training.agreement(ours, theirs, 1e-3)["gradient_norm"] == pytest.approx(5e-4)
    with pytest.raises(training.Disagreement, match="gradient_norm"):
        training.agreement(ours, theirs)
    with pytest.raises(training.Disagreement, match="loss"):
        training.agreement(ours | {"loss": 1.0005}, theirs, 1e-3)


def _frozen(config, *patterns):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, frozen=patterns))


def _agree(config):
    """Both sides name the same losses, and give them the same values."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    ours = jax_step.Ours(config)
    theirs = torch_step.Theirs(config, ours.model())
    found = theirs.losses(ours.batch)
    routes = {n for n in ("reconstruction", "autoencoding", "language") if getattr(config.objective, n)}
    assert set(found) == {"loss", "kl", "gradient_norm"} | routes
    training.agreement(ours.losses(), found)


def test_what_torch_does_not_compute_is_named_at_once(config):
    other = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat="layers"),
        train=dataclasses.replace(config.train, accumulate=2),
        data=dataclasses.replace(config.data, episode=(3, 4)),
    )
    with pytest.raises(ValueError, match=r"(?s)model.remat.*accumulate.*data.episode"):
        training.Training(other, 1, alone=False)


def test_a_comparison_without_torch_says_what_to_install(monkeypatch):
    parser = argparse.ArgumentParser()
    training.arguments(parser)
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"\[compare\].*--alone"):
        training.experiment(parser.parse_args([]))
