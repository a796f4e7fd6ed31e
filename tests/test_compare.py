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


def values():
    """A config as a nested dict, over a world of 150 subjects."""
    config = configs.to_dict(world.config(Path("none")))
    for tower in ("encoder", "decoder"):
        config["model"][tower]["max_length"] = 96
    config["data"] |= dict(corpus="world:150", encoder_tokens=64, decoder_tokens=64, batch=8)
    config["memory"] = dict(variant="direct", slots=8, initial_log_variance=-6.0)
    config["train"] |= dict(steps=5, log_every=2, checkpoint_every=4)
    return config


def run(folder, config=None, **options):
    options = dict(memories=["direct"], seeds=SEEDS, data=RECORDS, quiet=True) | options
    return compare.run(config or values(), folder, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison of two variants by the command, from beginning to end."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "variants.py").write_text(VARIANTS)
    body = f"def get_config():\n    return ConfigDict({values()!r})\n"
    (folder / "config.py").write_text(f"from ml_collections import ConfigDict\n{body}")
    line = ["compare", "--config", str(folder / "config.py"), "--out", str(folder / "out")]
    line += ["--variants", str(folder / "variants.py"), "--data", RECORDS, "--seeds", str(SEEDS)]
    assert cli.main(line) == 0
    return folder / "out"


def untimed(folder):
    return [row for row in runner.read_rows(folder) if "seconds" not in row]


def test_every_measure_is_there_for_every_seed_and_variant(whole):
    rows = runner.read_rows(whole)
    kinds = {(row["system"], row["case"], row["kind"]) for row in rows}
    once = {"step", "write_read", "compile"}
    for name in ("direct", "delta"):
        for kind in compare.Compare.kinds:
            assert {case for s, case, k in kinds if (s, k) == (name, kind)} == (
                {0} if kind in once else {0, 1}
            )
    assert {row["facts"] for row in rows if row["kind"] == "batch"} == {2, 4}
    counts = {
        k: sum(r["kind"] == k and r["system"] == "delta" for r in rows) for k in ("edit", "hard")
    }
    assert counts == {"edit": SEEDS * 4, "hard": SEEDS * 12}
    report = (whole / "report.md").read_text()
    assert all(f"| {name} |" in report for name in ("direct", "delta")) and "± " in report
    assert (whole / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # Seeds differ, in what they begin with and in the order of their data.
    losses = [r["loss_new"] for r in rows if r["kind"] == "edit" and r["system"] == "direct"]
    assert len(set(losses)) == len(losses)


def test_sigterm_saves_and_the_comparison_goes_on_with_the_same_steps(whole, tmp_path, monkeypatch):
    class Deadly(ensemble.Bar):
        def show(self, step, text):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ensemble, "Bar", Deadly)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path)
    assert stopped.value.code == distributed.RETRY
    assert [p.name for p in (tmp_path / "direct/checkpoints").iterdir()] == ["3"]
    run(tmp_path)
    assert untimed(tmp_path / "direct") == untimed(whole / "direct")


def test_a_finished_variant_is_not_trained_again_and_a_folder_is_of_one_config(whole, monkeypatch):
    monkeypatch.setattr(ensemble, "train", None)
    before = runner.read_rows(whole)
    run(whole, variants=whole.parent / "variants.py", memories=[])
    assert runner.read_rows(whole) == before
    faster = values()
    faster["train"]["learning_rate"] = 0.1
    with pytest.raises(loop.OtherRun, match="train.learning_rate: 0.02 in the folder, 0.1 now"):
        run(whole, faster)
    with pytest.raises(runner.DifferentSettings, match="options.seeds: 2 there, 3 now"):
        run(whole, seeds=3)


def test_a_seed_on_all_devices_is_a_single_run(whole):
    config = configs.parse(values())
    inputs = compare._inputs(config, RECORDS, whole, {}, True)
    data, step = config.data, ensemble.SeedStep(config, SEEDS)
    assert step.mesh.size == jax.device_count() == 8
    parameters = step.parameters()
    state, frozen = step.init({n: parameters[n] for n in step.trained}), step.freeze(parameters)
    stream = [data.episode, data.batch]
    batches = iter(episodes.episodes(inputs.training, *stream, data.seed, seeds=SEEDS))
    steps = []
    for _ in range(2):
        batch = jax.device_put(next(batches), step.batch_shardings)
        state, metrics = step.step(state, frozen, batch, step.keys())
        steps.append(jax.device_get(metrics))
    seed = 1
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    mesh = sharding.make_mesh((1, 1, 1))
    single = TrainStep(config, step.abstract, mesh)
    _, own = initialise(config, mesh)
    for name in own:
        np.testing.assert_allclose(parameters[name][seed], own[name], atol=1e-6, err_msg=name)
    state, frozen = single.init({n: own[n] for n in single.trained}), single.freeze(own)
    batches = iter(episodes.episodes(inputs.training, *stream, data.seed + seed))
    for both in steps:
        batch = sharding.place_batch(next(batches), mesh)
        state, metrics = single.step(state, frozen, batch)
        np.testing.assert_allclose(both["loss"][seed], metrics["loss"], rtol=1e-5)
        norms = (np.sqrt(m) for m in (both["gradient_squares"][seed], metrics["gradient_squares"]))
        np.testing.assert_allclose(*norms, rtol=1e-3, atol=1e-5)


def test_a_memory_takes_the_settings_that_it_has(tmp_path):
    config = values()
    config["memory"] |= dict(query="prior", noise=1e-3)
    parsed = compare.settings_of(config)
    assert set(parsed) == set(memory.variants())
    growing = configs.make_memory(parsed["growing"])
    assert (growing.slots, growing.noise, growing.ridge) == (8, 1e-3, 0.1)
    assert configs.make_memory(parsed["newton_schulz"]).query == "prior"
    (tmp_path / "variants.py").write_text(
        'def get_variants():\n    return {"a": ["memory.variant=dual", "memory.query=prior"], "b": []}'
    )
    with pytest.raises(schema.ConfigError, match="variant a: .*memory.query: unknown key"):
        compare.settings_of(config, file=tmp_path / "variants.py")
    with pytest.raises(schema.ConfigError, match="no 'drect'; did you mean direct"):
        compare.settings_of(config, ["drect"])
    (tmp_path / "variants.py").write_text("variants = {}")
    with pytest.raises(compare.UnknownVariants, match="defines no get_variants"):
        compare.settings_of(config, file=tmp_path / "variants.py")


def test_edits_are_those_of_the_memory_s_functions_and_the_package_s_scores(tiny):
    records = edit_records.load("world:3")
    abstract = model.AbstractModel(model.abstract(tiny.config))
    own = dict(model.parameters(tiny.model))
    # The second of two models is the one that is looked at.
    parameters = {name: jnp.stack([0.9 * array, array]) for name, array in own.items()}
    tokenizers = (tiny.encoder_tokenizer, tiny.decoder_tokenizer)
    trained = configs.make_memory(tiny.config)
    models = memory_edits.EditedModels(
        abstract, parameters, dict.fromkeys(own, 0), trained, tokenizers
    )
    keys, values = (array[1] for array in models.facts(records))
    prompts = [record.prompt for record in records]
    batch = tokenizers[0].encode(prompts)
    want = tiny.model.encode(jnp.asarray(batch.ids), jnp.asarray(batch.mask))
    np.testing.assert_allclose(keys, want, atol=1e-5)
    editing = dataclasses.replace(trained, query="prior")
    prepared = editing.prepare(tiny.model.memory.params())
    state = editing.write(prepared, editing.empty(prepared), keys, values)
    want = editing.read(prepared, state, keys).latent
    written = models.write(models.prepared, *models.facts(records))
    latents = models.read(written, models.facts(records)[0])
    np.testing.assert_allclose(latents[1], want, atol=1e-4)
    queries = [memory_edits._query("edit", record, record.prompt) for record in records]
    losses, greedy = models.score(queries, latents)
    pairs = [(record.target_new, record.target_true) for record in records]
    condition = tiny.model.condition(latents[1])
    scores = scoring.judge(tiny.model, tokenizers[1], prompts, pairs, condition)
    np.testing.assert_allclose(losses[1], scores.loss, rtol=1e-4)
    np.testing.assert_array_equal(greedy[1], scores.accuracy == 1.0)
    lone = models.recall(*models.facts(records), models.facts(records)[0])
    for row in range(3):
        fact = (keys[row : row + 1], values[row : row + 1])
        state = editing.write(prepared, editing.empty(prepared), *fact)
        want = editing.read(prepared, state, fact[0]).latent[0]
        np.testing.assert_allclose(lone[1, row], want, atol=1e-4)


def test_records_without_a_displaced_answer_are_refused():
    models = object.__new__(memory_edits.EditedModels)
    record = dataclasses.replace(edit_records.load("world:1")[0], target_true="")
    with pytest.raises(ValueError, match=r"records \[0\] have no answer that the edit displaces"):
        next(memory_edits.rows(models, [record]))
