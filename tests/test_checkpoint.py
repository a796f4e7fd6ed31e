"""Checkpoints: exact, on any mesh, and whole or set aside; the single-file export."""

import logging
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from larimar_jax.train import export, sharding
from larimar_jax.train.checkpoint import CheckpointError, Checkpoints

PARAMS = {
    "decoder/up/kernel": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32),
    "decoder/norm/scale": np.linspace(0, 1, 8, dtype=np.float32),
}
MEMORY = {"memory/prior": np.eye(4, 6, dtype=np.float32), "memory/log_variance": np.float32(-1.5)}


def _stream():
    return iter(grain.MapDataset.range(100).seed(1).shuffle().repeat().batch(4).to_iter_dataset())


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


def test_only_the_newest_are_kept_and_an_empty_folder_gives_nothing(written, tmp_path):
    assert sorted(p.name for p in written.iterdir()) == ["3", "4"]
    assert _restore(tmp_path / "new")[0] is None


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "meta"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(written, damage, caplog):
    caplog.set_level(logging.WARNING)
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
    assert "DAMAGED checkpoint of step 4" in caplog.text and "step 3" in caplog.text
    assert (written / "damaged-4").is_dir()
    checkpoints = Checkpoints(written, 2)
    checkpoints.save(4, **_state((1, 1, 1), 4), data=stream, meta={})
    checkpoints.close()
    assert _restore(written)[0].step == 4


def test_a_changed_number_is_found_by_its_checksum(written, monkeypatch):
    from larimar_jax.train import checkpoint

    sums = checkpoint._checksums
    monkeypatch.setattr(
        checkpoint,
        "_checksums",
        lambda arrays: sums(
            {k: v + 1e-7 if "mu.decoder.norm" in k else v for k, v in arrays.items()}
        ),
    )
    with pytest.raises(CheckpointError, match="checksum of optimizer differs: 0.mu.decoder.norm"):
        _restore(written)


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
    export.save_exported(path, {**PARAMS, **MEMORY}, meta)
    arrays, found = export.load_exported(path, {**PARAMS, **MEMORY, "frozen": np.zeros(3)})
    assert found == meta
    for name, array in {**PARAMS, **MEMORY}.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == np.float32
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_an_export_in_half_precision_is_half_as_large(tmp_path, dtype, error):
    big = {"a/kernel": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    export.save_exported(tmp_path / "whole", big, {})
    export.save_exported(tmp_path / "half", big, {}, {"kernel$": dtype})
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "half")]
    assert sizes[0] - sizes[1] == 2 * 64 * 64
    arrays, _ = export.load_exported(tmp_path / "half")
    assert arrays["a/kernel"].dtype == np.float32
    np.testing.assert_allclose(arrays["a/kernel"], big["a/kernel"], rtol=error)
    with pytest.raises(ValueError, match="no parameter matches 'bias'"):
        export.save_exported(tmp_path / "none", big, {}, {"bias": dtype})
    if dtype == "float16":
        with pytest.raises(ValueError, match="store it as bfloat16"):
            large = {"a": np.full(2, 1e6, np.float32)}
            export.save_exported(tmp_path / "none", large, {}, {"a": dtype})
    assert not (tmp_path / "none").exists()


def test_a_damaged_or_foreign_export_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    export.save_exported(path, PARAMS, {"a": 1})
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:40], b"", b"\xff" * 100, whole + b"\0"):
        path.write_bytes(broken)
        with pytest.raises(export.ExportError, match="cannot be read"):
            export.load_exported(path)
    for place in (len(whole) - 3, len(whole) - 500):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(bytes(flipped))
        with pytest.raises(export.ExportError, match="damaged"):
            export.load_exported(path)
    path.write_bytes(whole)
    like = {"decoder/up/kernel": jnp.zeros((8, 15))}
    with pytest.raises(export.ExportError) as error:
        export.load_exported(path, like)
    assert "(8, 16) in the file, (8, 15) in the model" in str(error.value)
    assert "decoder/norm/scale: the model has no such parameter" in str(error.value)
    import safetensors.numpy

    safetensors.numpy.save_file(dict(a=np.zeros(3)), path)
    with pytest.raises(export.ExportError, match="not an export"):
        export.load_exported(path)
    with pytest.raises(FileNotFoundError):
        export.load_exported(tmp_path / "absent")
