"""The model file: it comes back as it went, and a damaged or foreign one is refused."""

import numpy as np
import pytest

from larimar_jax.weights import model_file

PARAMS = {
    "decoder/up/kernel": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32),
    "decoder/norm/scale": np.linspace(0, 1, 8, dtype=np.float32),
    "memory/log_variance": np.float32(-1.5),
}


def test_an_export_comes_back_as_it_went(tmp_path):
    path, meta = tmp_path / "model.safetensors", {"config": {"name": "é"}, "step": 3}
    model_file.save_exported(path, PARAMS, meta)
    arrays, loaded = model_file.load_exported(path)
    assert loaded == meta
    for name, array in PARAMS.items():
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
    import safetensors.numpy

    safetensors.numpy.save_file(dict(a=np.zeros(3)), path)
    with pytest.raises(model_file.ExportError, match="not an export"):
        model_file.load_exported(path)
    with pytest.raises(FileNotFoundError):
        model_file.load_exported(tmp_path / "absent")
