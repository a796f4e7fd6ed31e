"""Runs of the loop: they learn, resume bit for bit, and stop where they should."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world

from larimar_jax import cli, weights
from larimar_jax import config as configs
from larimar_jax.config import StartConfig
from larimar_jax.data import edit_records
from larimar_jax.train import initial, logging, loop, optimizer, sharding
from larimar_jax.train.step import TrainStep, initialise
from larimar_jax.weights import model_file

STEPS = world.STEPS
ALONE = (1, 1, 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> configs.Config:
    """The smallest Larimar that learns, over a corpus of its own."""
    return world.config(world.write(tmp_path_factory.mktemp("corpus") / "world.jsonl"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run from beginning to end: (its folder, its outcome)."""
    run = tmp_path_factory.mktemp("whole") / "run"
    # Neither changes a step's result.
    return run, loop.train(_with(tiny, edits=6, best="reconstruction"), run, progress=False)


def _with(config: configs.Config, section="train", **changes) -> configs.Config:
    changed = dataclasses.replace(getattr(config, section), **changes)
    return dataclasses.replace(config, **{section: changed})


def _losses(run: Path) -> dict[int, float]:
    lines = logging.read_metrics(run / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _exported(run: Path) -> dict[str, np.ndarray]:
    return model_file.load_exported(run / "model.safetensors")[0]


def _same_run(run: Path, reference: Path) -> None:
    """Every loss of every step, and every trained number at the end, to the last bit."""
    assert _losses(run) == _losses(reference)
    jax.tree.map(np.testing.assert_array_equal, _exported(run), _exported(reference))


def _terminating(monkeypatch, at: int):
    """Patch the log, so that the run's own process gets SIGTERM when step `at` is written."""

    class Deadly(logging.Logger):
        def write(self, step, kind, values, **options):
            super().write(step, kind, values, **options)
            if (step, kind) == (at, "train"):
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "Logger", Deadly)


def test_the_loss_falls_and_everything_is_written_down(tiny, whole):
    run, outcome = whole
    assert outcome.finished and outcome.step == STEPS
    lines = logging.read_metrics(run / "metrics.jsonl")
    evaluations = {line["step"]: line for line in lines if line["kind"] == "evaluation"}
    assert list(evaluations) == [0, 12, 24]
    last = evaluations[24]
    assert evaluations[0]["reconstruction"] == pytest.approx(np.log(300), rel=0.1)
    assert last["reconstruction"] < 0.6 * evaluations[0]["reconstruction"]
    assert outcome.evaluation["reconstruction"] == last["reconstruction"]
    training = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert {"reconstruction", "autoencoding", "language", "kl", "beta"} < set(training[0])
    assert training[0]["tokens_per_second"] > 0 and 0 < training[-1]["utilisation"] < 1.5
    parts = ("encoder", "decoder", "memory", "to_latent", "to_slots", "to_embedding")
    squares = sum(training[-1][f"gradient_norm_{part}"] ** 2 for part in parts)
    assert squares == pytest.approx(training[-1]["gradient_norm"] ** 2, rel=1e-4)
    # Texts that were written are likelier than to the same decoder without a memory.
    assert last["memory_condition"] >= 1 and last["base"] > 0 and "edit_success_base" in last
    assert last["edit_gain"] > 0 and 0 <= last["edit_success"] <= 1
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "config.json").read_text())["data"] == configs.to_dict(tiny)["data"]


def test_the_export_holds_the_model_that_was_trained(tiny, whole):
    abstract, parameters = initialise(tiny, sharding.make_mesh(ALONE))
    arrays, meta = model_file.load_exported(whole[0] / "model.safetensors")
    assert configs.parse(meta["config"]).model == tiny.model and meta["step"] == STEPS
    # Towers made from scratch have no source of their own, so their frozen parameters are in it too.
    assert set(arrays) == set(abstract.parameters)
    frozen, memory = "encoder/position/embedding", "memory/prior_memory"
    np.testing.assert_array_equal(arrays[frozen], parameters[frozen])
    assert (arrays[memory] != np.asarray(parameters[memory])).any()


def test_sigterm_saves_and_the_run_resumes_bit_for_bit(tiny, whole, tmp_path, monkeypatch, capfd):
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        _terminating(patch, 10)
        outcome = loop.train(tiny, tmp_path, progress=False)
    assert not outcome.finished and 10 <= outcome.step < STEPS
    assert "stopped by SIGTERM" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (tmp_path / "checkpoints" / str(outcome.step)).is_dir()
    assert not (tmp_path / "model.safetensors").exists()
    assert loop.train(tiny, tmp_path, progress=False).finished
    _same_run(tmp_path, whole[0])


@pytest.fixture
def paper(tmp_path):
    """Settings of sizes and places, with which `larimar_1b3` is as small as the others here."""
    corpus = world.write(tmp_path / "world.jsonl")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    rows = [row for i, text in enumerate(texts) for row in (f" = Town {i} = \n", f" {text} \n")]
    sides = {"train": rows[:800], "validation": rows[800:]}
    wikitext = {n: datasets.Dataset.from_dict({"text": side}) for n, side in sides.items()}
    datasets.DatasetDict(wikitext).save_to_disk(tmp_path / "wikitext")
    towers = world.towers(tmp_path, corpus).items()
    settings = [f"model.{n}.{key}={value}" for n, tower in towers for key, value in tower.items()]
    settings += [f"data.corpus=hf:{tmp_path}/wikitext:train#text", "train.mesh=[1,2,1]"]
    settings += [f"data.held_out=hf:{tmp_path}/wikitext:validation#text", "data.workers=0"]
    settings += ["data.batch=2", "data.episode=[2]", "memory.slots=8", "model.latent=16"]
    settings += ["train.edit_records=world:64:0", "train.samples=2", "data.buckets=2"]
    return [*settings, "train.steps=6", "train.checkpoint_every=3", "train.wandb=larimar"]


def test_the_papers_command_runs_and_goes_on_without_the_towers_that_its_checkpoint_holds(
    paper, tmp_path, monkeypatch
):
    """The command at the head of the config, through the launch script, sizes and places apart."""
    root, handler = Path(loop.__file__).parents[2], signal.getsignal(signal.SIGTERM)
    head = (root / "configs/larimar_1b3.py").read_text()
    script, *words = re.search(r"^command +(.+)$", head, re.M)[1].split()
    line = ["bash", root / script, "--dry-run", *words, *paper, "--profile", "2"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.setattr(logging, "peak_flops", lambda kind, dtype: 1e9)
    tracker = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    whole, stopped = tmp_path / words[1], tmp_path / "stopped"
    try:
        assert cli.main(shlex.split(shown)[1:]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    lines = logging.read_metrics(whole / "metrics.jsonl")
    line = [x for x in lines if x["kind"] == "train"][-1]
    assert line["mfu"] == pytest.approx(1e3 * line["tflops_per_device"]) and line["mfu"] > 0
    assert line["padding"] < 0.3  # of pieces of a dozen tokens, where there are 64 places
    record = edit_records.load("world:64:0", 1)[0]
    samples = [x for x in lines if x["kind"] == "sample"]
    assert [x["step"] for x in samples] == [6, 6] and samples[0]["prompt"] == record.prompt
    assert samples[0]["answer"].strip() == record.target_new and samples[0]["edited"]
    assert lines[0]["kind"] == "evaluation" and 0 <= lines[0]["edit_success"] <= 1
    logged = tracker.init.return_value.log.call_args_list
    assert logged[-1].args[0]["evaluation/language"] == lines[-3]["language"]
    # Perfetto's trace, and TensorBoard's.
    assert all(list((whole / "profile").rglob(f"*{end}")) for end in (".json.gz", ".xplane.pb"))
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "6")
    monkeypatch.setattr(loop, "initialise", lambda *_: pytest.fail("parameters were made"))
    paper.append("train.wandb=null")
    assert loop.train(configs.load(words[0], paper), stopped, progress=False).finished
    _same_run(stopped, whole)


def test_a_low_rank_run_that_goes_on_loads_only_the_tower_that_its_checkpoint_lacks(
    paper, monkeypatch
):
    lora = 'model.lora={"rank": 2, "modules": "^decoder/layers/attention/query$"}'
    config = configs.load("configs/larimar_1b3.py", [*paper, lora, 'train.frozen=["^decoder/"]'])
    mesh = sharding.make_mesh(config.train.mesh)
    abstract, first = initialise(config, mesh)
    monkeypatch.setattr(weights, "load_encoder", lambda *_, **__: pytest.fail("it was loaded"))
    frozen = TrainStep(config, abstract, mesh).frozen
    again = initialise(config, mesh, frozen)[1]
    assert first.keys() == again.keys() and frozen
    for name, leaf in again.items():
        assert leaf.shape == first[name].shape and leaf.sharding == first[name].sharding
        assert isinstance(leaf, jax.ShapeDtypeStruct) == name.startswith("encoder/")
    for name in frozen:
        np.testing.assert_array_equal(again[name], first[name])


def test_a_folder_of_another_config_is_refused_and_harmless_changes_are_not(tiny, whole):
    run, outcome = whole
    with pytest.raises(loop.OtherRun) as error:
        loop.train(_with(_with(tiny, learning_rate=0.1), "data", seed=9), run, progress=False)
    assert "data.seed: 0 in the folder, 9 now" in str(error.value)
    assert "train.learning_rate: 0.02 in the folder, 0.1 now" in str(error.value)
    before = (run / "metrics.jsonl").read_text()
    again = loop.train(_with(tiny, log_every=1, mesh=(8, 1, 1)), run, progress=False)
    assert again.finished and again.step == STEPS
    assert again.evaluation["language"] == pytest.approx(outcome.evaluation["language"], rel=1e-5)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_folder_in_which_nothing_was_trained_takes_a_corrected_config(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        loop.train(_with(tiny, "data", corpus="/no/such.jsonl"), tmp_path, progress=False)
    loop.claim(tmp_path, tiny)
    assert configs.load(json.loads((tmp_path / "config.json").read_text())) == tiny


def test_what_does_not_fit_is_reported_before_the_corpus_is_read(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.corpus, "open_corpus", lambda name: pytest.fail("it was read"))
    with pytest.raises(optimizer.FreezeError, match="matches no parameter"):
        loop.train(_with(tiny, frozen=("^nowhere",)), tmp_path, progress=False)
    sizes = tiny.model.encoder.sizes
    other = configs.TowerConfig("minilm", "bert", sizes)
    with pytest.raises(ValueError, match="'minilm' are not of the sizes that the config gives"):
        loop.train(_with(tiny, "model", encoder=other), tmp_path, progress=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"larimar-jax\[wandb\]"):
        loop.train(_with(tiny, wandb="larimar"), tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="no.json"):
        loop.train(_with(tiny, edits=2, edit_records="no.json"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="data.vocabulary is 0"):
        loop.train(_with(tiny, "data", vocabulary=0), tmp_path, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_cause(tiny, tmp_path, monkeypatch):
    def poisoned(*arguments):
        abstract, parameters = initialise(*arguments)
        name = "decoder/word/embedding"
        return abstract, {**parameters, name: parameters[name].at[5, 3].set(jnp.inf)}

    monkeypatch.setattr(loop, "initialise", poisoned)
    with pytest.raises(logging.BadStep, match="step 1: .* is parameter decoder/word/embedding"):
        loop.train(tiny, tmp_path, progress=False)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("place", ["", "model.safetensors", "checkpoints/24"])
def test_parameters_come_from_another_run(tiny, whole, place):
    _, parameters = initialise(tiny, sharding.make_mesh((1, 4, 2)))
    start = StartConfig(str(whole[0] / place), ("^memory/", "up/kernel$"))
    started, _ = initial.start_from(parameters, start)
    arrays = _exported(whole[0])
    taken = {"memory/prior_memory", "memory/log_variance"}
    taken |= {f"{tower}/layers/up/kernel" for tower in ("encoder", "decoder")}
    for name, leaf in started.items():
        want = arrays[name] if name in taken else parameters[name]
        np.testing.assert_array_equal(leaf, want, err_msg=name)
        assert leaf.sharding == parameters[name].sharding
    smaller = {**parameters, "memory/prior_memory": parameters["memory/prior_memory"][..., :1]}
    del smaller["decoder/layers/up/kernel"]
    start = dataclasses.replace(start, parameters=(*start.parameters, "nowhere"))
    with pytest.raises(initial.StartError) as error:
        initial.start_from(smaller, start)
    assert "memory/prior_memory: (8, 16) there, (8, 1) in this model" in str(error.value)
    assert "decoder/layers/up/kernel: this model has no such parameter" in str(error.value)
    assert "'nowhere' matches no parameter there" in str(error.value)


def test_another_runs_frozen_parameters_survive_a_resume(tiny, whole, tmp_path, monkeypatch):
    source, straight, stopped = (tmp_path / name for name in ("source", "straight", "stopped"))
    shutil.copytree(whole[0], source)
    changes = dict(start_from=StartConfig(str(source), ("^decoder/",)), frozen=("^decoder/",))
    config = _with(tiny, **changes, steps=10, checkpoint_every=4)
    evaluation = loop.train(config, straight, progress=False).evaluation
    with monkeypatch.context() as patch:
        _terminating(patch, 6)
        assert not loop.train(config, stopped, progress=False).finished
    again = loop.train(config, stopped, progress=False)
    assert again.finished and again.evaluation == evaluation
    _same_run(stopped, straight)
    arrays = _exported(source)
    assert (decoder := [name for name in arrays if name.startswith("decoder/")])
    for name in decoder:
        np.testing.assert_array_equal(_exported(stopped)[name], arrays[name])
    # A source that has changed since is not taken for what it was.
    _, meta = model_file.load_exported(source / "model.safetensors")
    arrays["decoder/norm/scale"] = arrays["decoder/norm/scale"] * 1.5
    model_file.save_exported(source / "model.safetensors", arrays, meta)
    with pytest.raises(loop.OtherRun, match="begun with other frozen parameters"):
        loop.train(config, stopped, progress=False)


def test_a_run_is_judged_by_the_corpus_that_is_named(tiny, tmp_path, monkeypatch, capfd):
    path = tmp_path / "other.txt"
    path.write_text("\n\n".join(f"{word} sees the town of oslo." for word in range(200)))
    texts = []

    class Spy(loop.Evaluator):
        def __init__(self, step, pieces, *rest):
            texts.extend(pieces.texts(range(len(pieces))))
            super().__init__(step, pieces, *rest)

    monkeypatch.setattr(loop, "Evaluator", Spy)
    config = _with(_with(tiny, steps=2), "data", held_out=str(path))
    assert loop.train(config, tmp_path / "run").finished
    shown = capfd.readouterr().err
    assert "2 steps are 32 pieces: 0.1 epochs\non 1 of 8 devices: cpu\n" in shown
    assert re.search(r"the first step was done after \d+\.\d s\n", shown)
    assert len(texts) > 2 and all(text[0].isdigit() and "oslo" in text for text in texts)
    gone = _with(config, "data", held_out=str(tmp_path / "no.txt"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        loop.train(gone, tmp_path / "gone", progress=False)
