"""Runs of the loop: it learns, it goes on bit for bit, and it stops where it should."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world

from larimar_jax import config as configs
from larimar_jax.config import StartConfig
from larimar_jax.train import (
    folder,
    guard,
    loop,
    metrics,
    optimizer,
    sharding,
    start,
)
from larimar_jax.train.step import TrainStep, initialise
from larimar_jax.weights import model_file

ROOT = Path(__file__).parents[1]
STEPS = world.STEPS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> configs.Config:
    """The smallest Larimar that learns, over a corpus of its own."""
    return world.config(world.write(tmp_path_factory.mktemp("corpus") / "world.jsonl"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run from beginning to end: (its folder, its outcome)."""
    run = tmp_path_factory.mktemp("whole") / "run"
    # Neither changes a step's result.
    return run, loop.train(_train(tiny, edits=6, best="reconstruction"), run, progress=False)


def _losses(run: Path) -> dict[int, float]:
    lines = metrics.read(run / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _train(config: configs.Config, **changes) -> configs.Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_the_loss_falls_and_everything_is_written_down(tiny, whole):
    run, outcome = whole
    assert outcome.finished and outcome.step == STEPS
    lines = metrics.read(run / "metrics.jsonl")
    evaluations = {line["step"]: line for line in lines if line["kind"] == "evaluation"}
    assert list(evaluations) == [0, 12, 24]
    start, end = evaluations[0]["reconstruction"], evaluations[24]["reconstruction"]
    assert start == pytest.approx(np.log(300), rel=0.1)
    assert end < 0.6 * start
    assert outcome.evaluation["reconstruction"] == end
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert {"reconstruction", "autoencoding", "language", "kl", "beta"} < set(training[0])
    assert training[0]["tokens_per_second"] > 0 and 0 < training[-1]["utilisation"] < 1.5
    parts = [training[-1][f"gradient_norm_{part}"] ** 2 for part in
             ("encoder", "decoder", "memory", "to_latent", "to_slots", "to_embedding")]
    assert sum(parts) == pytest.approx(training[-1]["gradient_norm"] ** 2, rel=1e-4)
    # Texts that were written are likelier than to the same decoder without a memory.
    last = evaluations[24]
    assert {"base", "memory_condition", "edit_success_base"} <= set(last)
    assert last["memory_condition"] >= 1 and last["base"] > 0
    assert last["edit_gain"] > 0 and 0 <= last["edit_success"] <= 1
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "config.json").read_text())["data"] == configs.to_dict(tiny)["data"]


def test_the_export_holds_the_model_that_was_trained(tiny, whole):
    skeleton, parameters = initialise(tiny, sharding.make_mesh((1, 1, 1)))
    arrays, meta = model_file.load_exported(whole[0] / "model.safetensors", skeleton.parameters)
    assert configs.parse(meta["config"]).model == tiny.model and meta["step"] == STEPS
    # Towers made from scratch have no other source, so that their frozen parameters are in it too.
    assert set(arrays) == set(skeleton.parameters)
    frozen = "encoder/position/embedding"
    np.testing.assert_array_equal(arrays[frozen], parameters[frozen])
    assert (arrays["memory/prior_memory"] != np.asarray(parameters["memory/prior_memory"])).any()


_KILLED = """
import json, os, signal, sys
import jax
from larimar_jax import config
from larimar_jax.train import loop
from larimar_jax.train.metrics import MetricsLog

class Deadly(MetricsLog):
    def write(self, step, kind, values, **options):
        super().write(step, kind, values, **options)
        if (step, kind) == (19, "train"):
            os.kill(os.getpid(), signal.SIGKILL)

loop.MetricsLog = Deadly
loop.train(config.parse(json.loads(sys.argv[1])), sys.argv[2], progress=False)
"""


def test_a_killed_run_goes_on_bit_for_bit(tiny, whole, tmp_path):
    run = tmp_path / "run"
    values = json.dumps(configs.to_dict(tiny)), str(run)
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *values],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    before = _losses(run)
    assert max(before) == 19
    saved = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved and max(saved) < 19
    assert loop.train(tiny, run, progress=False).finished
    _same_run(run, whole[0])
    assert all(_losses(run)[step] == loss for step, loss in before.items())


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(tiny, whole, tmp_path, monkeypatch, capfd):
    class Terminated(metrics.MetricsLog):
        def write(self, step, kind, values, **options):
            super().write(step, kind, values, **options)
            if (step, kind) == (10, "train"):
                os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "MetricsLog", Terminated)
        outcome = loop.train(tiny, tmp_path, progress=False)
    assert not outcome.finished and 10 <= outcome.step < STEPS
    assert "stopped by SIGTERM" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "checkpoints" / str(outcome.step)).is_dir()
    assert not (tmp_path / "model.safetensors").exists()
    assert loop.train(tiny, tmp_path, progress=False).finished
    _same_run(tmp_path, whole[0])


def _same_run(one: Path, other: Path) -> None:
    """Every loss of every step, and every trained number at the end, to the last bit."""
    assert _losses(one) == _losses(other)
    assert len(_losses(one)) == STEPS
    first, second = (model_file.load_exported(f / "model.safetensors")[0] for f in (one, other))
    for name in second:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_folder_of_another_config_is_refused_and_harmless_changes_are_not(tiny, whole):
    run, outcome = whole
    other = dataclasses.replace(
        _train(tiny, learning_rate=0.1), data=dataclasses.replace(tiny.data, seed=9)
    )
    with pytest.raises(folder.OtherRun) as error:
        loop.train(other, run, progress=False)
    assert "data.seed: 0 in the folder, 9 now" in str(error.value)
    assert "train.learning_rate: 0.02 in the folder, 0.1 now" in str(error.value)
    before = (run / "metrics.jsonl").read_text()
    again = loop.train(_train(tiny, log_every=1, mesh=(8, 1, 1)), run, progress=False)
    assert again.finished and again.step == STEPS
    assert again.evaluation["language"] == pytest.approx(outcome.evaluation["language"], rel=1e-5)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_cause(tiny, tmp_path, monkeypatch):
    def poisoned(*arguments):
        skeleton, parameters = initialise(*arguments)
        name = "decoder/word/embedding"
        return skeleton, {**parameters, name: parameters[name].at[5, 3].set(jnp.inf)}

    monkeypatch.setattr(loop, "initialise", poisoned)
    with pytest.raises(guard.BadStep, match="step 1: .* is parameter decoder/word/embedding"):
        loop.train(tiny, tmp_path, progress=False)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("place", ["", "model.safetensors", "checkpoints/24"])
def test_parameters_come_from_another_run(tiny, whole, place):
    mesh = sharding.make_mesh((1, 4, 2))
    _, parameters = initialise(_train(tiny, mesh=(1, 4, 2)), mesh)
    said = StartConfig(str(whole[0] / place), ("^memory/", "up/kernel$"))
    found = start.replace(parameters, said)
    arrays, _ = model_file.load_exported(whole[0] / "model.safetensors")
    taken = {"memory/prior_memory", "memory/log_variance"}
    taken |= {f"{tower}/layers/up/kernel" for tower in ("encoder", "decoder")}
    for name, leaf in found.items():
        want = arrays[name] if name in taken else parameters[name]
        np.testing.assert_array_equal(leaf, want, err_msg=name)
        assert leaf.sharding == parameters[name].sharding
    with pytest.raises(start.StartError, match="'nowhere' matches no parameter there"):
        start.replace(parameters, dataclasses.replace(said, parameters=("nowhere",)))
    other = {n: a[..., :1] if n == "memory/prior_memory" else a for n, a in parameters.items()}
    other.pop("decoder/layers/up/kernel")
    with pytest.raises(start.StartError) as error:
        start.replace(other, said)
    assert "memory/prior_memory: (8, 16) there, (8, 1) in this model" in str(error.value)
    assert "decoder/layers/up/kernel: this model has no such parameter" in str(error.value)


def test_frozen_parameters_of_another_run_are_there_when_a_run_goes_on(tiny, whole, tmp_path):
    said = StartConfig(str(whole[0]), ("^decoder/",))
    changes = dict(start_from=said, frozen=("^decoder/",), steps=10, checkpoint_every=4)
    config = _train(tiny, **changes)
    straight = loop.train(config, tmp_path / "straight", progress=False)

    class Terminated(metrics.MetricsLog):
        def write(self, step, kind, values, **options):
            super().write(step, kind, values, **options)
            if (step, kind) == (6, "train"):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MetricsLog", Terminated)
        assert not loop.train(config, tmp_path / "stopped", progress=False).finished
    again = loop.train(config, tmp_path / "stopped", progress=False)
    assert again.finished and again.evaluation == straight.evaluation
    runs = (tmp_path / "straight", tmp_path / "stopped")
    assert _losses(runs[0]) == _losses(runs[1])
    first, second, source = (
        model_file.load_exported(f / "model.safetensors")[0] for f in (*runs, whole[0])
    )
    decoder = [name for name in source if name.startswith("decoder/")]
    assert decoder
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array)
        if name in decoder:
            np.testing.assert_array_equal(array, source[name])


def test_a_place_without_parameters_is_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        start.replace({}, StartConfig(str(tmp_path), ("a",)))


def _batch(config: configs.Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (config.data.batch, config.data.episode[0], config.data.encoder_tokens)
    mask = np.arange(shape[-1]) < rng.integers(4, shape[-1], shape[:2])[..., None]
    tokens = rng.integers(0, 300, shape).astype(np.int32)
    return dict(encoder_tokens=tokens, encoder_mask=mask, decoder_tokens=tokens, decoder_mask=mask)


def _two_steps(config: configs.Config, mesh_shape):
    mesh = sharding.make_mesh(mesh_shape)
    skeleton, parameters = initialise(config, mesh)
    stepper = TrainStep(config, skeleton, mesh)
    frozen = stepper.freeze(parameters)
    state = stepper.begin({name: parameters[name] for name in stepper.trained})
    batch, losses = sharding.place_batch(_batch(config), mesh), []
    for _ in range(2):
        state, found = stepper.step(state, frozen, batch)
        losses.append(float(found["loss"]))
    return losses, state, stepper


@pytest.fixture(scope="module")
def one_device(tiny):
    return _two_steps(tiny, (1, 1, 1))


def test_a_mesh_computes_what_one_device_does(tiny, one_device):
    losses, state, _ = _two_steps(tiny, (4, 2, 1))
    np.testing.assert_allclose(losses, one_device[0], rtol=2e-5)
    for name, leaf in one_device[1].params.items():
        assert leaf.shape == state.params[name].shape
        np.testing.assert_allclose(state.params[name], leaf, atol=3e-3, err_msg=name)
    kernel = state.params["decoder/layers/up/kernel"]
    assert kernel.sharding.mesh.size == 8
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == kernel.shape]
    assert moments and all(leaf.sharding == kernel.sharding for leaf in moments)


def test_a_source_that_went_on_is_not_taken_for_what_it_was(tiny, whole, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(whole[0], source)
    said = StartConfig(str(source), ("^decoder/",))
    changes = dict(start_from=said, frozen=("^decoder/",), checkpoint_every=2)
    assert loop.train(_train(tiny, **changes, steps=24), tmp_path / "run", progress=False).finished
    arrays, meta = model_file.load_exported(source / "model.safetensors")
    arrays["decoder/norm/scale"] = arrays["decoder/norm/scale"] * 1.5
    (source / "model.safetensors").unlink()
    model_file.save_exported(source / "model.safetensors", arrays, meta)
    with pytest.raises(folder.OtherRun, match="begun with other frozen parameters"):
        loop.train(_train(tiny, **changes, steps=24), tmp_path / "run", progress=False)


def test_a_run_is_judged_by_the_corpus_that_is_named(tiny, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"{word} sees the town of oslo." for word in range(200)))
    seen = []

    class Seen(loop.HeldOut):
        def __init__(self, config, mesh, pieces, *rest):
            seen.append(pieces.texts(range(len(pieces))))
            super().__init__(config, mesh, pieces, *rest)

    monkeypatch.setattr(loop, "HeldOut", Seen)
    told = dataclasses.replace(tiny.data, held_out=str(other))
    config = dataclasses.replace(_train(tiny, steps=2), data=told)
    assert loop.train(config, tmp_path / "run", progress=False).finished
    assert len(seen[0]) > 2 and all(text[0].isdigit() and "oslo" in text for text in seen[0])
    gone = dataclasses.replace(config, data=dataclasses.replace(told, held_out=str(tmp_path / "no.txt")))
    with pytest.raises(FileNotFoundError, match="no such file"):
        loop.train(gone, tmp_path / "gone", progress=False)


def test_a_folder_in_which_nothing_was_trained_takes_a_corrected_config(tiny, tmp_path):
    wrong = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, corpus="/no/such.jsonl"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        loop.train(wrong, tmp_path, progress=False)
    folder.claim(tmp_path, tiny)
    assert configs.load(json.loads((tmp_path / "config.json").read_text())) == tiny


def test_what_does_not_fit_is_said_before_the_corpus_is_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.corpus, "open_corpus", lambda name: pytest.fail("it was read"))
    with pytest.raises(optimizer.FreezeError, match="matches no parameter"):
        loop.train(_train(tiny, frozen=("^nowhere",)), tmp_path, progress=False)


def test_a_step_that_is_skipped_does_not_move_the_learning_rate(tiny):
    config = _train(tiny, on_bad_step="skip", spike=1.0, warmup_steps=4)
    mesh = sharding.make_mesh((1, 1, 1))
    skeleton, parameters = initialise(config, mesh)
    stepper = TrainStep(config, skeleton, mesh)
    frozen = stepper.freeze(parameters)
    state = stepper.begin({name: parameters[name] for name in stepper.trained})
    batch, rates = sharding.place_batch(_batch(config), mesh), []
    for usual in (jnp.inf, -1e9, jnp.inf):  # Beside the second one, any loss is a spike.
        state, found = stepper.step(state._replace(loss=jnp.float32(usual)), frozen, batch)
        rates.append((bool(found["sound"]), float(found["learning_rate"])))
    assert [sound for sound, _ in rates] == [True, False, True] and int(state.step) == 3
    assert [rate for _, rate in rates] == pytest.approx([0.005, 0.01, 0.01])


def test_frozen_parameters_have_neither_gradient_nor_state(tiny, one_device):
    _, state, stepper = one_device
    assert stepper.frozen == ["encoder/position/embedding"]
    assert "encoder/position/embedding" not in state.params
    size = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    trained = sum(leaf.size for leaf in state.params.values())
    assert size == pytest.approx(2 * trained, abs=8)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(tiny, one_device):
    _, _, stepper = one_device
    mesh = sharding.make_mesh((1, 1, 1))
    skeleton, parameters = initialise(tiny, mesh)
    frozen = stepper.freeze(parameters)
    params = {name: parameters[name] for name in stepper.trained}
    params["decoder/word/embedding"] = params["decoder/word/embedding"] * jnp.float32(np.nan)
    state = stepper.begin(params)
    before = jax.device_get(state)
    state, found = stepper.step(state, frozen, sharding.place_batch(_batch(tiny), mesh))
    assert not np.isfinite(found["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
