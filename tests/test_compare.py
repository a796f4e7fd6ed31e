"""A comparison of variants: seeds side by side are single runs, and it goes on where it was stopped."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world

from larimar_jax import cli, memory, model, schema, scoring
from larimar_jax import config as configs
from larimar_jax.bench import compare, memory_edits, runner
from larimar_jax.data import edit_records, episodes
from larimar_jax.train import distributed, ensemble, loop, sharding
from larimar_jax.train.step import TrainStep, initialise

SEEDS, RECORDS = 2, "world:4"
VARIANTS = (
    'def get_variants():\n    return {"direct": [], "delta": ["memory.variant=delta_rule"]}\n'
)


def values(**memory):
    """A config as a nested dict, over a world of 150 subjects."""
    config = configs.to_dict(world.config(Path("none")))
    for tower in ("encoder", "decoder"):
        config["model"][tower]["max_length"] = 96
    config["data"] |= dict(corpus="world:150", encoder_tokens=64, decoder_tokens=64, batch=8)
    config["memory"] = dict(variant="direct", slots=8, initial_log_variance=-6.0) | memory
    config["train"] |= dict(steps=5, log_every=2, checkpoint_every=4)
    return config


def run(folder, config=None, **options):
    options = dict(memories=["direct"], seeds=SEEDS, data=RECORDS, quiet=True) | options
    return compare.run(config or values(), folder, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison of two variants by the command, from beginning to end."""
    folder = tmp_path_factory.mktemp("compare")
    body = f"def get_config():\n    return ConfigDict({values()!r})\n"
    (folder / "config.py").write_text(f"from ml_collections import ConfigDict\n{body}")
    (folder / "variants.py").write_text(VARIANTS)
    line = ["compare", "--config", str(folder / "config.py"), "--out", str(folder / "out")]
    line += ["--variants", str(folder / "variants.py"), "--data", RECORDS, "--seeds", str(SEEDS)]
    assert cli.main(line) == 0
    return folder / "out"


def test_every_measure_is_there_for_every_seed_and_variant(whole):
    rows = runner.read_rows(whole)
    of = {(row["system"], row["kind"], row["case"]): row for row in rows}
    once, kinds = {"step", "write_read", "compile"}, compare.Compare.kinds
    cases = [(k, seed) for k in kinds for seed in ((0,) if k in once else range(SEEDS))]
    assert set(of) == {(name, *case) for name in ("direct", "delta") for case in cases}
    assert {row["facts"] for row in rows if row["kind"] == "batch"} == {2, 4}
    count = {kind: sum(row["kind"] == kind for row in rows) for kind in ("edit", "hard")}
    assert count == {"edit": 2 * SEEDS * 4, "hard": 2 * SEEDS * 4 * 3}
    report = (whole / "report.md").read_text()
    assert "| direct |" in report and "| delta |" in report and " ± " in report
    assert (whole / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_sigterm_saves_and_the_comparison_goes_on_with_the_same_steps(whole, tmp_path, monkeypatch):
    class Deadly(ensemble.Bar):
        def show(self, step, text):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(ensemble, "Bar", Deadly)
        run(tmp_path)
    assert stopped.value.code == distributed.RETRY
    assert [p.name for p in (tmp_path / "direct/checkpoints").iterdir()] == ["3"]
    run(tmp_path)
    rows, want = (runner.read_rows(f / "direct") for f in (tmp_path, whole))
    assert [r for r in rows if "seconds" not in r] == [r for r in want if "seconds" not in r]
    # A finished variant is not trained again, and a folder is of one config.
    monkeypatch.setattr(ensemble, "train", None)
    run(tmp_path)
    assert runner.read_rows(tmp_path) == rows
    faster = values()
    faster["train"]["learning_rate"] = 0.1
    with pytest.raises(loop.OtherRun, match="train.learning_rate: 0.02 in the folder, 0.1 now"):
        run(tmp_path, faster)
    with pytest.raises(runner.DifferentSettings, match="options.seeds: 2 there, 3 now"):
        run(tmp_path, seeds=3)


def test_a_seed_on_all_devices_is_a_single_run(whole):
    config, seed, mesh = configs.parse(values()), 1, sharding.make_mesh((1, 1, 1))
    pieces = compare._inputs(config, RECORDS, whole, {}, True).training
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    both = ensemble.SeedStep(config, SEEDS)
    single = TrainStep(changed, both.abstract, mesh)
    assert both.mesh.size == jax.device_count() == 8
    parameters, own = both.parameters(), initialise(changed, mesh)[1]
    for name in own:
        np.testing.assert_allclose(parameters[name][seed], own[name], atol=1e-6, err_msg=name)
    begun, alone = (
        [step.init({name: arrays[name] for name in step.trained}), step.freeze(arrays)]
        for step, arrays in ((both, parameters), (single, own))
    )
    data = (pieces, config.data.episode, config.data.batch)
    batches = iter(episodes.episodes(*data, 0, seeds=SEEDS)), iter(episodes.episodes(*data, seed))
    for _ in range(2):
        batch = jax.device_put(next(batches[0]), both.batch_shardings)
        begun[0], metrics = both.step(*begun, batch, both.keys())
        batch = sharding.place_batch(next(batches[1]), mesh)
        alone[0], want = single.step(*alone, batch)
        np.testing.assert_allclose(metrics["loss"][seed], want["loss"], rtol=1e-5)
        norms = (np.sqrt(each["gradient_squares"]) for each in (metrics, want))
        np.testing.assert_allclose(next(norms)[seed], next(norms), rtol=1e-3, atol=1e-5)


def test_a_memory_takes_the_settings_that_it_has(tmp_path):
    config, file = values(query="prior", noise=1e-3), tmp_path / "variants.py"
    parsed = compare.settings_of(config)
    assert set(parsed) == set(memory.variants())
    growing, newton = (configs.make_memory(parsed[n]) for n in ("growing", "newton_schulz"))
    assert (growing.slots, growing.noise, growing.ridge, newton.query) == (8, 1e-3, 0.1, "prior")
    file.write_text(VARIANTS.replace("delta_rule", 'dual", "memory.query=prior'))
    with pytest.raises(schema.ConfigError, match="variant delta: memory.query: unknown key"):
        compare.settings_of(config, file=file)
    with pytest.raises(schema.ConfigError, match="no 'drect'; did you mean direct"):
        compare.settings_of(config, ["drect"])
    file.write_text("variants = {}")
    with pytest.raises(compare.UnknownVariants, match="defines no get_variants"):
        compare.settings_of(config, file=file)


def test_edits_are_those_of_the_memory_s_functions_and_the_package_s_scores(tiny):
    records = edit_records.load("world:3")
    own, tokenizers = (
        dict(model.parameters(tiny.model)),
        (tiny.encoder_tokenizer, tiny.decoder_tokenizer),
    )
    # The second of two models is the one that is looked at.
    parameters = {name: jnp.stack([0.9 * array, array]) for name, array in own.items()}
    abstract, editing = (
        model.AbstractModel(model.abstract(tiny.config)),
        configs.make_memory(tiny.config),
    )
    models = memory_edits.EditedModels(
        abstract, parameters, dict.fromkeys(own, 0), editing, tokenizers
    )
    keys, values = models.facts(records)
    batch = tokenizers[0].encode([record.prompt for record in records])
    want = tiny.model.encode(jnp.asarray(batch.ids), jnp.asarray(batch.mask))
    np.testing.assert_allclose(keys[1], want, atol=1e-5)
    editing = dataclasses.replace(editing, query="prior")
    prepared = editing.prepare(tiny.model.memory.params())

    def read(rows):
        state = editing.write(prepared, editing.empty(prepared), keys[1, rows], values[1, rows])
        return editing.read(prepared, state, keys[1, rows]).latent

    latents = models.read(models.write(models.prepared, keys, values), keys)
    np.testing.assert_allclose(latents[1], read(np.arange(3)), atol=1e-4)
    np.testing.assert_allclose(
        models.recall(keys, values, keys)[1, 2:], read(np.array([2])), atol=1e-4
    )
    queries = [memory_edits._query("edit", record, record.prompt) for record in records]
    losses, greedy = models.score(queries, latents)
    pairs = [(query.new, query.true) for query in queries]
    condition = tiny.model.condition(latents[1])
    scores = scoring.judge(tiny.model, tokenizers[1], [q.prompt for q in queries], pairs, condition)
    np.testing.assert_allclose(losses[1], scores.loss, rtol=1e-4)
    np.testing.assert_array_equal(greedy[1], scores.accuracy == 1.0)
    bare = [dataclasses.replace(records[0], target_true="")]
    with pytest.raises(ValueError, match=r"records \[0\] have no answer that the edit displaces"):
        next(memory_edits.rows(models, bare))
