"""The paper's tables on the synthetic world: what the config runs, and what its runs do differently."""

import numpy as np
import pytest

from larimar_jax import config
from larimar_jax.bench import attack, reproduce, runner, scope_detection, stream
from larimar_jax.bench.fact_store import FactStore, encode_facts
from larimar_jax.bench.systems import Systems
from larimar_jax.data import edit_records, world


@pytest.fixture(scope="module")
def plan():
    return config.load_dict("configs/bench_world.py")


def test_every_run_of_the_config_is_a_benchmark_of_the_world_with_a_note(plan):
    _, tasks = reproduce.parse(plan)
    assert list(tasks) == list(plan["runs"]) and all(map(world.is_source, plan["data"].values()))
    assert all(task.data in plan["data"].values() for task in tasks.values())
    assert all(run["note"].strip() for run in plan["runs"].values())


def test_a_task_runs_on_records_of_the_world(tiny, tmp_path):
    task = scope_detection.Scope(data="world-hard:12", limit=6, others=1)
    summary = runner.run(task, tmp_path / "run", editor=tiny, quiet=True)
    assert summary["cases"] == 6 and summary["settings"]["data"]["name"] == "world-hard:12"


def test_a_slot_for_each_edit_gives_its_own_value_back(tiny):
    sizes = dict(edits=8, wordings=2, unwritten=0, every=4, queries=2)
    task = stream.Stream(data="world:6", keys="gaussian", **sizes)
    store = task._after(Systems(tiny), 8)
    assert store.model.memory.slots == 8 and int(store.state.count) == 8
    latent, _ = store.read([prompt for prompt, _ in store.facts])
    np.testing.assert_allclose(latent, store.values, atol=0.02 * np.abs(store.values).max())


def test_answers_that_a_memory_was_taught_are_attacked_before_and_after_the_edit(tiny):
    task = attack.Attack(data="world:30", facts=3, wordings=2, taught=True)
    cases = task.cases(Systems(tiny))
    queries = task._queries(Systems(tiny), cases[:2])
    right = [(case.record.prompt, case.record.target_true) for case in cases]
    edits = [(prompt, attack.UNKNOWN) for prompt, _ in right]
    memories = dict(before=[right] * 2, together=[edits] * 2)
    memories["alone"] = [[edits[0], *right[1:]], [right[0], edits[1], right[2]]]
    rows = np.arange(4)
    for memory, facts in memories.items():
        read = np.asarray(queries[memory].condition(rows).prefix.embedding)[:4]
        encoded = encode_facts(tiny, [*right, *edits], queries[memory].prompts)
        stores = [FactStore(encoded, each) for each in facts]
        latents = [store.read(case.wordings)[0] for store, case in zip(stores, cases, strict=False)]
        wanted = np.asarray(tiny.condition(np.concatenate(latents)).prefix.embedding)[:4]
        np.testing.assert_allclose(read, wanted, atol=1e-3 * np.abs(wanted).max())


def test_open_answers_alone_are_names_numbers_and_emblems():
    answers = [record.target_new for record in edit_records.load("world-open:50")]
    assert all(map(world.is_reserved, answers))
