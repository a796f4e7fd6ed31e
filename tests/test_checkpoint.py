"""Checkpoints: exact on any mesh, whole or set aside; the parameters that another run starts from."""

import itertools
import json
import resource
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import world
from jax.sharding import PartitionSpec as P
from long.kill_saves import kills

from larimar_jax import model
from larimar_jax.config import StartConfig
from larimar_jax.train import checkpoint, initial, sharding
from larimar_jax.train.checkpoint import CheckpointError, Checkpoints
from larimar_jax.train.step import TrainState, TrainStep

KERNEL, SCALE, PRIOR = "decoder/up/kernel", "decoder/norm/scale", "memory/prior_memory"
PARAMS = {
    KERNEL: np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32),
    SCALE: np.linspace(0, 1, 8, dtype=np.float32),
    PRIOR: np.eye(4, 6, dtype=np.float32),
    "memory/log_variance": np.float32(-1.5),
}
ALONE = (1, 1, 1)


def _batches():
    numbers = grain.MapDataset.range(100).seed(1).shuffle().repeat().batch(4)
    # Without threads to read ahead, which take longer to start than all of these numbers.
    return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _state(step, mesh_shape=ALONE):
    """A state on a mesh, different at each step."""
    mesh = sharding.make_mesh(mesh_shape)
    where = {name: P("fsdp", "tensor") if name == KERNEL else P() for name in PARAMS}
    where = {name: jax.NamedSharding(mesh, spec) for name, spec in where.items()}
    params = {name: array + np.float32(step) for name, array in PARAMS.items()}
    params = jax.device_put(params, where)
    adam = optax.adam(1e-3).init(params)
    rest = (np.int32(step), adam[0].count, np.float32(step))
    step, count, loss = jax.device_put(rest, sharding.replicated(mesh))
    return TrainState(step, params, (adam[0]._replace(count=count), *adam[1:]), {}, loss)


def _like(state):
    shape = jax.ShapeDtypeStruct
    return jax.tree.map(lambda a: shape(a.shape, a.dtype, sharding=a.sharding), state)


def _same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def _save(folder, scores, first=1, keep=2, best="loss", note=None):
    """Save a step for each score; None is a save without an evaluation."""
    with Checkpoints(folder, keep, best) as checkpoints:
        batches = _batches()
        for step, score in enumerate(scores, first):
            next(batches)
            evaluation = None if score is None else {"loss": score}
            checkpoints.save(step, _state(step), batches, {"config": {"a": 1}}, evaluation)
        checkpoints.wait()
        return checkpoints.steps()


def _restore(folder, **options):
    """(state, meta) and the iterator; TypeError where there is none."""
    batches = _batches()
    with Checkpoints(folder, 2) as checkpoints:
        return *checkpoints.restore(_like(_state(0)), batches, **options), batches


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 3 and 4; four were saved and two are kept."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    assert _save(folder, [None] * 4) == [3, 4]
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_restore_is_exact(saved):
    state, meta, batches = _restore(saved)
    _same(state, _state(4))
    assert meta["config"] == {"a": 1} and meta["step"] == 4
    assert set(meta["environment"]["packages"]) >= {"jax", "flax", "grain"}
    assert sorted(path.name for path in saved.iterdir()) == ["3", "4"]
    assert {"params", "memory", "optimizer", "meta"} < {p.name for p in (saved / "4").iterdir()}
    rows = list(itertools.islice(_batches(), 5))
    np.testing.assert_array_equal(next(batches), rows[4])


def test_a_run_saved_on_4x2_comes_back_bit_for_bit_on_other_meshes(tmp_path):
    def step_on(mesh):
        settings = dict(mesh=mesh, layout="zero3", memory_layout="slots", ema=0.9)
        config = world.config(tmp_path / "never read", **settings)
        abstract = model.AbstractModel(model.abstract(config))
        return TrainStep(config, abstract, sharding.make_mesh(mesh))

    like, draw = step_on((4, 2, 1)).abstract_state(), np.random.default_rng(0)

    def fill(leaf):
        return jax.device_put(draw.integers(0, 99, leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(fill, like)
    state = state._replace(step=jax.device_put(np.int32(3), like.step.sharding))
    assert not state.params[PRIOR].sharding.is_fully_replicated
    with Checkpoints(tmp_path / "run", 2) as checkpoints:
        checkpoints.save(3, state, _batches(), {})
    expected = jax.tree.map(np.asarray, state)
    for mesh in ((2, 4, 1), (8, 1, 1), ALONE):
        step = step_on(mesh)
        with Checkpoints(tmp_path / "run", 2) as checkpoints:
            state, _ = checkpoints.restore(step.abstract_state(), _batches())
        _same(state, expected)
        dtypes = (jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, expected))
        assert next(dtypes) == next(dtypes)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == step.state_shardings


@pytest.mark.parametrize("without", ["memory/", "decoder/"])
def test_a_run_that_trains_no_memory_or_only_memory_is_saved_and_restored(tmp_path, without):
    def part(state):
        params = {n: a for n, a in state.params.items() if not n.startswith(without)}
        return state._replace(params=params)

    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(1, part(_state(1)), _batches(), {"config": {}}, None)
        checkpoints.wait()
        state, _ = checkpoints.restore(_like(part(_state(0))), _batches())
        _same(state, part(_state(1)))
        with pytest.raises(CheckpointError, match="arrays that this run does not have: optimizer/"):
            fewer = _like(part(_state(0)))._replace(optimizer=())
            checkpoints.restore(fewer, _batches())


def test_the_best_stays_when_a_run_is_resumed_until_a_better_one_comes(tmp_path):
    _save(tmp_path, [3.0, 1.0, float("nan")], keep=1)
    assert _save(tmp_path, [2.0, None, 1.5], first=4, keep=1) == [2, 6]
    assert int(_restore(tmp_path)[0].step) == 6
    assert _save(tmp_path, [0.5, None], first=7, keep=1) == [7, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_harms_no_other(tmp_path):
    """A limit on the size of a file stands for a full disk: the system refuses the write itself."""
    run = tmp_path / "run"
    _save(run, [None, None])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32))
    state = _state(3)._replace(params=_state(3).params | {KERNEL: big})
    with Checkpoints(run, 2) as checkpoints:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            checkpoints.save(3, state, _batches(), {})
            with pytest.raises(CheckpointError) as error:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step 3 could not be written" in str(error.value)
    assert "File too large" in str(error.value) and "Whole ones there: 1, 2." in str(error.value)
    assert int(_restore(run)[0].step) == 2
    # What the failed one left is gone after the next save.
    assert _save(run, [None], first=3) == [2, 3]
    assert sorted(path.name for path in run.iterdir()) == ["2", "3"]


def test_a_run_killed_while_saving_loses_the_checkpoint_being_written_and_no_other(tmp_path):
    killed = kills(tmp_path / "run", count=3, seed=0, interval=2, pause=0.01)
    assert len(killed) == 3 and killed[-1].restored > 0


def test_an_empty_folder_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "new", 2) as checkpoints:
        assert checkpoints.restore(_like(_state(0)), _batches()) is None


def _flip(file, at):
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 1
    file.write_bytes(content)


def _damage(folder, kind):
    # Still JSON: it would be taken for another place in the data, or another config.
    changes = {"data": ('"next_index": 4', '"next_index": 5'), "meta": ('"a": 1', '"a": 3')}
    file, (before, after) = folder / "meta" / "metadata", changes[kind]
    text = file.read_text()
    assert before in text
    json.loads(text.replace(before, after))
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize("kind", ["meta", "data"])
def test_a_damaged_newest_checkpoint_falls_back_with_a_report(copy, kind, capsys):
    _damage(copy / "4", kind)
    state, _, batches = _restore(copy)
    _same(state, _state(3))
    report = capsys.readouterr().err
    assert "DAMAGED checkpoint of step 4" in report and "checkpoint of step 3" in report
    assert "checksum of meta differs" in report
    assert (copy / "damaged-4").is_dir()
    with Checkpoints(copy, 2) as checkpoints:
        checkpoints.save(4, _state(4), batches, {})
    assert int(_restore(copy)[0].step) == 4


def test_damage_to_any_file_is_detected_or_harmless(saved, tmp_path, capsys):
    draw, top = np.random.default_rng(0), saved / "4"
    # Items are stored alike; of the arrays, one stands for all.
    files = sorted(f for p in ("*", "meta/*", "memory/**/*") for f in top.glob(p) if f.is_file())
    files = [f for f in files if f.name != "commit_success.txt" or f.parent == top]
    assert len(files) > 10
    counts = {3: 0, 4: 0}
    for number, (file, damage) in enumerate(itertools.product(files, ("flip", "cut", "remove"))):
        run = Path(shutil.copytree(saved, tmp_path / str(number)))
        target = run / file.relative_to(saved)
        content = target.read_bytes()
        if damage == "flip":
            _flip(target, draw.integers(len(content)))
        elif damage == "cut":
            target.write_bytes(content[: draw.integers(len(content))])
        else:
            target.unlink()
        state, _, batches = _restore(run)
        step = int(state.step)
        counts[step] += 1
        assert ("DAMAGED" in capsys.readouterr().err) == (step == 3), (target, damage)
        _same(state, _state(step))
        want = next(itertools.islice(_batches(), step, None))
        np.testing.assert_array_equal(next(batches), want)
    assert min(counts.values()) > 8


def test_a_changed_number_is_detected_by_its_checksum(copy, monkeypatch):
    sums = checkpoint.array_checksums
    monkeypatch.setattr(
        checkpoint,
        "array_checksums",
        lambda arrays: sums({k: v + 1e-7 if f"mu.{SCALE}" in k else v for k, v in arrays.items()}),
    )
    with pytest.raises(CheckpointError, match=f"checksum of optimizer differs: 0.0.mu.{SCALE}"):
        _restore(copy)


def test_nothing_restorable_is_an_error_with_every_reason(copy):
    for step in (3, 4):
        shutil.rmtree(copy / str(step) / "params")
    with pytest.raises(CheckpointError) as error:
        _restore(copy)
    assert all(f"step {step}" in str(error.value) for step in (3, 4))


def test_what_the_check_raises_is_no_damage(copy):
    def refuse(meta):
        raise KeyError("another run")

    with pytest.raises(KeyError, match="another run"):
        _restore(copy, check=refuse)
    assert int(_restore(copy)[0].step) == 4


def test_parts_of_a_checkpoint_start_another_run_whatever_its_optimiser_is(copy):
    shutil.rmtree(copy / "3" / "optimizer")
    own = _state(50, (1, 8, 1)).params
    started, _ = initial.start_from(own, StartConfig(str(copy / "3"), ("up/kernel",)))
    np.testing.assert_array_equal(started[KERNEL], PARAMS[KERNEL] + np.float32(3))
    assert started[SCALE] is own[SCALE]


def test_parts_of_what_is_absent_or_damaged_start_nothing(copy, tmp_path):
    own = _state(50, (1, 8, 1)).params
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        initial.start_from(own, StartConfig(str(tmp_path / "absent"), ("^memory/",)))
    for step, part in (("4", "d/*"), ("3", "_METADATA")):
        for file in (copy / step / "params").glob(part):
            file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="may be damaged"):
            initial.start_from(own, StartConfig(str(copy / step), ("up/kernel",)))
