"""Checkpoints: exact, on any mesh, and whole or set aside; the single-file export."""

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

from larimar_jax import config as configs
from larimar_jax import model
from larimar_jax.config import StartConfig
from larimar_jax.train import checkpoint, loop, sharding, start
from larimar_jax.train.checkpoint import CheckpointError, Checkpoints
from larimar_jax.train.step import TrainStep
from larimar_jax.weights import model_file

PARAMS = {
    "decoder/up/kernel": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32),
    "decoder/norm/scale": np.linspace(0, 1, 8, dtype=np.float32),
}
MEMORY = {
    "memory/prior_memory": np.eye(4, 6, dtype=np.float32),
    "memory/log_variance": np.float32(-1.5),
}


def _stream():
    numbers = grain.MapDataset.range(100).seed(1).shuffle().repeat().batch(4)
    # Without threads to read ahead, which take longer to start than all of these numbers.
    return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _state(mesh_shape, step=0):
    """(params, memory, optimizer) on a mesh, different at each step."""
    mesh = sharding.make_mesh(mesh_shape)
    rules = [("kernel", P("fsdp", "tensor"), False), ("scale", P(), False)]
    where = sharding.shardings(mesh, PARAMS, rules)
    params = sharding.place(jax.tree.map(lambda a: a + np.float32(step), PARAMS), where)
    memory = sharding.place(MEMORY, sharding.replicated(mesh))
    optimizer = optax.adam(1e-3).init(params)
    counts = sharding.place(optimizer[0].count, sharding.replicated(mesh))
    optimizer = (optimizer[0]._replace(count=counts), *optimizer[1:])
    return dict(params=params, memory=memory, optimizer=optimizer)


def _abstract(state):
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 3 and 4; four were saved and two are kept."""
    folder = tmp_path_factory.mktemp("made") / "run"
    checkpoints, stream = Checkpoints(folder, 2), _stream()
    for step in range(1, 5):
        next(stream)
        checkpoints.save(step, **_state((1, 1, 1), step), data=stream, meta={"config": {"a": 1}})
    checkpoints.close()
    return folder


@pytest.fixture
def written(made, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def _restore(folder, mesh=(1, 1, 1), **options):
    checkpoints, stream = Checkpoints(folder, 2), _stream()
    try:
        restored = checkpoints.restore(**_abstract(_state(mesh)), data=stream, **options)
    finally:
        checkpoints.close()
    return restored, stream


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_a_restore_is_exact_on_any_mesh(written, mesh):
    restored, stream = _restore(written, mesh)
    assert restored.step == 4 and restored.meta["config"] == {"a": 1}
    assert set(restored.meta["environment"]["packages"]) >= {"jax", "flax", "grain"}
    for name, array in PARAMS.items():
        np.testing.assert_array_equal(restored.params[name], array + np.float32(4))
    for name, array in MEMORY.items():
        np.testing.assert_array_equal(restored.memory[name], array)
    assert restored.params["decoder/up/kernel"].sharding.mesh.size == np.prod(mesh)
    expected = _state(mesh, 4)["optimizer"]
    assert jax.tree.structure(restored.optimizer) == jax.tree.structure(expected)
    fresh = _stream()
    rows = [next(fresh) for _ in range(5)]
    np.testing.assert_array_equal(next(stream), rows[4])


def test_a_run_saved_on_4x2_comes_back_bit_for_bit_on_other_meshes(tmp_path):
    corpus = tmp_path / "world.jsonl"  # named in the config, never read

    def on(mesh):
        settings = dict(mesh=mesh, layout="zero3", memory_layout="slots", ema=0.9)
        config = world.config(corpus, **settings)
        stepper = TrainStep(
            config, model.AbstractModel(model.abstract(config)), sharding.make_mesh(mesh)
        )
        saved = loop._Saved(Checkpoints(tmp_path / "run", 2), stepper)
        return stepper, saved, {"config": configs.to_dict(config), "tokenizers": {}}

    stepper, saved, meta = on((4, 2, 1))
    draw = np.random.default_rng(0)

    def fill(leaf):
        return jax.device_put(draw.integers(0, 99, leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = jax.tree.map(fill, stepper.abstract())._replace(
        step=fill(stepper.abstract().step) * 0 + 3
    )
    assert not state.params["memory/prior_memory"].sharding.is_fully_replicated
    stream = _stream()
    for _ in range(3):
        next(stream)
    saved.save(3, state, stream, meta, None)
    saved.checkpoints.close()
    expected, rows = jax.tree.map(np.asarray, state), [next(stream) for _ in range(3)]
    for mesh in ((2, 4, 1), (8, 1, 1), (1, 1, 1)):
        stepper, saved, meta = on(mesh)
        stream = _stream()
        found = saved.restore(stepper.abstract(), stream, meta)
        saved.checkpoints.close()
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
        ):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes(), (mesh, path)
        places = jax.tree.map(lambda leaf: leaf.sharding, found)
        assert places == stepper.state_shardings
        np.testing.assert_array_equal([next(stream) for _ in range(3)], rows)


def _save_all(checkpoints, scores, first=1):
    for step, score in enumerate(scores, first):
        evaluation = None if score is None else {"loss": score}
        state = _state((1, 1, 1), step)
        checkpoints.save(step, **state, data=_stream(), meta={}, evaluation=evaluation)
    checkpoints.wait()


def test_the_best_is_kept_by_a_run_that_goes_on(tmp_path):
    for first, scores in ((1, [3.0, 1.0, float("nan")]), (4, [2.0, None, 1.5])):
        checkpoints = Checkpoints(tmp_path, 1, "loss")
        _save_all(checkpoints, scores, first)
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, 1, "loss")
    assert checkpoints.steps() == [2, 6] and checkpoints.best == 2
    like = _abstract(_state((1, 1, 1)))
    assert checkpoints.restore(**like, data=_stream()).step == 6
    best = checkpoints.restore(**like, data=_stream(), best=True)
    assert best.step == 2 and best.meta["evaluation"] == {"loss": 1.0}
    np.testing.assert_array_equal(
        best.params["decoder/norm/scale"], PARAMS["decoder/norm/scale"] + np.float32(2)
    )
    # A better one takes its place.
    _save_all(checkpoints, [0.5, None], 7)
    assert checkpoints.steps() == [7, 8] and checkpoints.best == 7
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_harms_no_other(tmp_path):
    """A limit on the size of a file stands for a full disk: the system refuses the write itself."""
    checkpoints = Checkpoints(tmp_path / "run", 2)
    _save_all(checkpoints, [None, None])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = _state((1, 1, 1), 3)
    big = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    state["params"]["decoder/up/kernel"] = jnp.asarray(big)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        checkpoints.save(3, **state, data=_stream(), meta={})
        with pytest.raises(CheckpointError) as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step 3 could not be written" in str(error.value)
    assert "File too large" in str(error.value) and "Whole ones there: 1, 2." in str(error.value)
    checkpoints.close()
    restored, _ = _restore(tmp_path / "run")
    assert restored.step == 2
    checkpoints = Checkpoints(tmp_path / "run", 2)
    checkpoints.save(3, **_state((1, 1, 1), 3), data=_stream(), meta={})
    checkpoints.close()
    # What the failed one left is gone.
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["2", "3"]


def test_only_the_newest_are_kept_and_an_empty_folder_gives_nothing(written, tmp_path):
    assert sorted(p.name for p in written.iterdir()) == ["3", "4"]
    assert _restore(tmp_path / "new")[0] is None


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "meta"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(written, damage, capsys):
    if damage == "cut":
        for file in (f for f in (written / "4" / "optimizer").rglob("*") if f.is_file()):
            file.write_bytes(file.read_bytes()[:20])
    elif damage == "bit":
        # The stored numbers themselves, which no container checks.
        for file in (f for f in (written / "4" / "params").rglob("*") if f.is_file()):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(bytes(content))
    elif damage == "missing":
        shutil.rmtree(written / "4" / "memory")
    else:
        (written / "4" / "meta" / "metadata").write_text("{")
    restored, stream = _restore(written)
    assert restored.step == 3
    np.testing.assert_array_equal(
        restored.params["decoder/norm/scale"], PARAMS["decoder/norm/scale"] + np.float32(3)
    )
    said = capsys.readouterr().err
    assert "DAMAGED checkpoint of step 4" in said and "checkpoint of step 3" in said
    assert (written / "damaged-4").is_dir()
    checkpoints = Checkpoints(written, 2)
    checkpoints.save(4, **_state((1, 1, 1), 4), data=stream, meta={})
    checkpoints.close()
    assert _restore(written)[0].step == 4


# Items are stored alike; of the arrays, one stands for all.
FILES = ("*", "data/*", "meta/*", "memory/**/*")


def test_damage_to_any_file_is_found_or_harmless(made, tmp_path, capsys):
    draw = np.random.default_rng(0)
    top = made / "4"
    files = sorted(f for pattern in FILES for f in top.glob(pattern) if f.is_file())
    files = [f for f in files if f.name != "commit_success.txt" or f.parent == top]
    assert len(files) > 12
    like, found = _abstract(_state((1, 1, 1))), {3: 0, 4: 0}
    for number, (file, damage) in enumerate(itertools.product(files, ("flip", "cut", "remove"))):
        run = Path(shutil.copytree(made, tmp_path / str(number)))
        target = run / file.relative_to(made)
        content = bytearray(target.read_bytes())
        if damage == "flip":
            content[draw.integers(len(content))] ^= 1 << draw.integers(8)
            target.write_bytes(content)
        elif damage == "cut":
            target.write_bytes(content[: draw.integers(len(content))])
        else:
            target.unlink()
        checkpoints, stream = Checkpoints(run, 2), _stream()
        restored = checkpoints.restore(**like, data=stream)
        checkpoints.close()
        step = restored.step
        found[step] += 1
        assert ("DAMAGED" in capsys.readouterr().err) == (step == 3), (target, damage)
        expected = _state((1, 1, 1), step)
        for name in expected:
            jax.tree.map(np.testing.assert_array_equal, getattr(restored, name), expected[name])
        fresh = _stream()
        rows = [next(fresh) for _ in range(step + 1)]
        np.testing.assert_array_equal(next(stream), rows[step])
    assert min(found.values()) > 10


@pytest.mark.parametrize("item", ["meta", "data"])
def test_a_changed_digit_is_found_by_its_checksum(written, item, capsys):
    """What is still JSON, and would be taken for another place in the data or another config."""
    if item == "meta":
        file, before, after = written / "4" / "meta" / "metadata", '"a": 1', '"a": 3'
    else:
        (file,) = (written / "4" / "data").glob("*.json")
        before, after = (f'"next_index": {n}' for n in (4, 5))
    text = file.read_text()
    assert before in text
    json.loads(text.replace(before, after))
    file.write_text(text.replace(before, after))
    assert _restore(written)[0].step == 3
    assert f"checksum of {item} differs" in capsys.readouterr().err


def test_a_changed_number_is_found_by_its_checksum(written, monkeypatch):
    sums = checkpoint.array_checksums
    monkeypatch.setattr(
        checkpoint,
        "array_checksums",
        lambda arrays: sums(
            {k: v + 1e-7 if "mu.decoder.norm" in k else v for k, v in arrays.items()}
        ),
    )
    with pytest.raises(CheckpointError, match="checksum of optimizer differs: 0.mu.decoder.norm"):
        _restore(written)


def _others(mesh=(1, 8, 1)):
    """Parameters of another run over the same model, by path."""
    state = _state(mesh, 50)
    return {**state["params"], **{n: a + 9 for n, a in state["memory"].items()}}


def test_parts_of_a_checkpoint_begin_another_run_where_its_own_were(written):
    mine = _others()
    taken = start.replace(mine, StartConfig(str(written), ("^memory/", "up/kernel")))
    np.testing.assert_array_equal(taken["decoder/up/kernel"], PARAMS["decoder/up/kernel"] + 4)
    assert taken["decoder/up/kernel"].sharding == mine["decoder/up/kernel"].sharding
    for name, array in MEMORY.items():
        np.testing.assert_array_equal(taken[name], array)
        assert taken[name].sharding.is_equivalent_to(mine[name].sharding, array.ndim)
    assert taken["decoder/norm/scale"] is mine["decoder/norm/scale"]
    # The optimiser is not even looked at, and one checkpoint may be named.
    shutil.rmtree(written / "3" / "optimizer")
    taken = start.replace(mine, StartConfig(str(written / "3"), ("up/kernel",)))
    np.testing.assert_array_equal(taken["decoder/up/kernel"], PARAMS["decoder/up/kernel"] + 3)


def test_parts_that_do_not_fit_are_one_error_that_names_all(written, tmp_path):
    mine = {**_others(), "memory/prior_memory": jnp.zeros((5, 6))}
    del mine["decoder/norm/scale"]
    said = StartConfig(str(written), ("^decoder/", "^memory/", "^encoder/", "^heads/"))
    with pytest.raises(start.StartError) as error:
        start.replace(mine, said)
    for offence in (
        "'^encoder/' matches no parameter",
        "'^heads/' matches no parameter",
        "decoder/norm/scale: this model has no such parameter",
        "memory/prior_memory: (4, 6) there, (5, 6) in this model",
    ):
        assert offence in str(error.value)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        start.replace(mine, StartConfig(str(tmp_path / "absent"), ("^memory/",)))
    for step, part in (("4", "d/*"), ("3", "_METADATA")):
        for file in (written / step / "params").glob(part):
            file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="may be damaged"):
            start.replace(mine, StartConfig(str(written / step), ("up/kernel",)))


def test_nothing_restorable_is_an_error_with_every_reason(written):
    for step in (3, 4):
        shutil.rmtree(written / str(step) / "params")
    with pytest.raises(CheckpointError) as error:
        _restore(written)
    assert all(f"step {step}" in str(error.value) for step in (3, 4))


def test_what_the_check_raises_is_no_damage(written):
    def refuse(meta):
        raise KeyError("another run")

    with pytest.raises(KeyError, match="another run"):
        _restore(written, check=refuse)
    assert _restore(written)[0].step == 4


def test_an_export_comes_back_as_it_went(tmp_path):
    path, meta = tmp_path / "model.safetensors", {"config": {"name": "é"}, "step": 3}
    model_file.save_exported(path, {**PARAMS, **MEMORY}, meta)
    arrays, found = model_file.load_exported(path, {**PARAMS, **MEMORY, "frozen": np.zeros(3)})
    assert found == meta
    for name, array in {**PARAMS, **MEMORY}.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == np.float32
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_an_export_in_half_precision_is_half_as_large(tmp_path, dtype, error):
    big = {"a/kernel": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    model_file.save_exported(tmp_path / "whole", big, {})
    model_file.save_exported(tmp_path / "half", big, {}, {"kernel$": dtype})
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "half")]
    assert sizes[0] - sizes[1] == 2 * 64 * 64
    arrays, _ = model_file.load_exported(tmp_path / "half")
    assert arrays["a/kernel"].dtype == np.float32
    np.testing.assert_allclose(arrays["a/kernel"], big["a/kernel"], rtol=error)
    with pytest.raises(ValueError, match="no parameter matches 'bias'"):
        model_file.save_exported(tmp_path / "none", big, {}, {"bias": dtype})
    if dtype == "float16":
        with pytest.raises(ValueError, match="store it as bfloat16"):
            large = {"a": np.full(2, 1e6, np.float32)}
            model_file.save_exported(tmp_path / "none", large, {}, {"a": dtype})
    assert not (tmp_path / "none").exists()


def test_a_damaged_or_foreign_export_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    model_file.save_exported(path, PARAMS, {"a": 1})
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:40], b"", b"\xff" * 100, whole + b"\0"):
        path.write_bytes(broken)
        with pytest.raises(model_file.ExportError, match="damaged, half written"):
            model_file.load_exported(path)
    for place in (len(whole) - 3, len(whole) - 500):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(bytes(flipped))
        with pytest.raises(model_file.ExportError, match="damaged"):
            model_file.load_exported(path)
    path.write_bytes(whole)
    like = {"decoder/up/kernel": jnp.zeros((8, 15))}
    with pytest.raises(model_file.ExportError) as error:
        model_file.load_exported(path, like)
    assert "(8, 16) in the file, (8, 15) in the model" in str(error.value)
    assert "decoder/norm/scale: the model has no such parameter" in str(error.value)
    import safetensors.numpy

    safetensors.numpy.save_file(dict(a=np.zeros(3)), path)
    with pytest.raises(model_file.ExportError, match="not an export"):
        model_file.load_exported(path)
    with pytest.raises(FileNotFoundError):
        model_file.load_exported(tmp_path / "absent")
