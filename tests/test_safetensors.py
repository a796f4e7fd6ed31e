"""Safetensors files and their indexes: read as written, and refused where they lie."""

import json
import os
import pathlib
import struct
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax.weights import WeightsError
from larimar_jax.weights.safetensors import Safetensors
from larimar_jax.weights.shards import Shards

ROW = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
NEXT = ROW | {"data_offsets": [16, 32]}


def file(text, data=32):
    """A file of this header, as JSON or as what becomes JSON, and bytes of data."""
    text = text if isinstance(text, str) else json.dumps(text)
    return struct.pack("<Q", len(text)) + text.encode() + bytes(range(data))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("float64", [1e-300, 1 + 2**-40]),
        ("float32", [1.5, -2.0]),
        ("float16", [0.5, 65504]),
        ("bfloat16", [0.5, 1e38]),
        ("int64", [2**40 + 1, -1]),
        ("int32", [2**31 - 1, -1]),
        ("int16", [2**15 - 1, -1]),
        ("int8", [127, -128]),
        ("uint8", [0, 255]),
        ("bool", [True, False]),
    ],
)
def test_every_kind_of_number_keeps_its_digits(tmp_path, kind, values):
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    want = np.asarray([values, values[::-1]]).astype(dtype)
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"before": np.ones(3, np.uint8), "a": want}, path)
    source = Safetensors(path)
    got = source.read("a")
    assert source.shapes() == {"before": (3,), "a": (2, 2)}
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)


def test_scalars_and_empty_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"one": np.asarray(3, np.float32), "none": np.ones((0, 4), np.float32)}
    safetensors.numpy.save_file(tensors, path)
    source = Safetensors(path)
    assert source.read("one").shape == () and source.read("one") == 3
    assert source.read("none").shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file({"a": ROW, "b": NEXT}, 31), "cannot be read"),
        (file({"a": ROW, "b": NEXT}, 33), "cannot be read"),
        (file({"a": ROW, "b": ROW | {"data_offsets": [8, 24]}}, 24), "cannot be read"),
        (file({"a": ROW | {"data_offsets": [16, 32]}}), "cannot be read"),
        (file({"a": ROW | {"data_offsets": [16, 0]}}, 16), "cannot be read"),
        (file({"a": ROW | {"data_offsets": [-16, 0]}}, 16), "cannot be read"),
        (file({"a": ROW | {"data_offsets": [0, 15]}}, 15), "cannot be read"),
        (file({"a": ROW | {"shape": 4}}, 16), "cannot be read"),
        (file({"a": {"dtype": "F32", "shape": [4]}}, 16), "cannot be read"),
        (file({"a": ROW | {"dtype": "F33"}}, 16), "cannot be read"),
        (
            file('{"a": ' + json.dumps(ROW) + ', "a": ' + json.dumps(NEXT) + "}"),
            "duplicate keys: a",
        ),
        (file('{"a": {"dtype": "F32", "shape": [4], "shape": [8]}}'), "duplicate keys: shape"),
        (file("[" * 10**5), "cannot be read"),
        (struct.pack("<Q", 50) + b"{}", "cannot be read"),
        (struct.pack("<Q", 0) + b"{}", "a header of 0 bytes"),
    ],
)
def test_headers_that_lie(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        Safetensors(path)


def test_many_duplicates_are_told_at_once(tmp_path):
    path = tmp_path / "x.safetensors"
    rows = (f'"{n % 30000}": {json.dumps(ROW)}' for n in range(60000))
    path.write_bytes(file("{" + ", ".join(rows) + "}"))
    start = time.monotonic()
    with pytest.raises(WeightsError, match="duplicate keys: 0, 1, 10,"):
        Safetensors(path)
    assert time.monotonic() - start < 10  # a comparison of each with each takes minutes


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_files_cut_or_changed_anywhere(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    whole = file({"a": ROW, "b": NEXT})
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        Safetensors(path)
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 33))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        source = Safetensors(path)
        shapes = source.shapes()
        assert {name: source.read(name).shape for name in shapes} == shapes
    except WeightsError as error:
        assert str(path) in str(error)


def test_nothing_of_a_file_stays_mapped_and_a_later_cut_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file({"a": ROW, "b": NEXT}))
    source = Safetensors(path)
    assert source.read("b").tobytes() == bytes(range(16, 32))
    maps = pathlib.Path("/proc/self/maps")
    assert not maps.exists() or "x.safetensors" not in maps.read_text()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightsError, match="shorter than when it was opened"):
        source.read("b")


def shards(folder, weight_map, **files):
    """An index, and files of one float per name that they hold."""
    for name, held in files.items():
        tensors = {tensor: np.ones(1, np.float32) for tensor in held}
        safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return Shards(index, Safetensors)


ONE, TWO = "one.safetensors", "two.safetensors"


def test_an_index_that_fits_its_shards(tmp_path):
    source = shards(tmp_path, {"a": ONE, "b": TWO, "c": TWO}, one="a", two="bc")
    assert source.shapes() == {"a": (1,), "b": (1,), "c": (1,)}
    assert source.read("c") == 1


def test_every_misfit_of_an_index_is_in_one_error(tmp_path):
    with pytest.raises(WeightsError) as caught:
        shards(tmp_path, {"a": ONE, "b": TWO, "c": TWO}, one="abx", two="b")
    assert str(caught.value).split("\n")[1:] == [
        "  b: in one.safetensors, the index has it in two.safetensors",
        "  x: in one.safetensors, not indexed",
        "  c: not in two.safetensors, where the index has it",
    ]


def test_every_missing_shard_is_in_one_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="one.safetensors, two.safetensors"):
        shards(tmp_path, {"a": ONE, "b": TWO})


@pytest.mark.parametrize(
    "astray", ["../one.safetensors", "/one.safetensors", "in/one.safetensors", "..", "", 3, None]
)
def test_an_index_that_leads_elsewhere(tmp_path, astray):
    with pytest.raises(WeightsError, match="leads outside its folder") as caught:
        shards(tmp_path, {"a": ONE, "b": astray, "c": "../two"}, one="a")
    assert str(astray) in str(caught.value) and "../two" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "is not JSON"),
        ('{"weight_map": {"a": "one", "a": "two"}}', "duplicate keys: a"),
        (json.dumps({"weight_map": {"a": "x" * 5000}}), "leads outside its folder or nowhere"),
        (json.dumps({"weight_map": {"a": "x\0"}}), "leads outside its folder or nowhere"),
        (json.dumps({"weight_map": {"a": "\ud800"}}), "are not beside it"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises((WeightsError, FileNotFoundError), match=message):
        Shards(index, Safetensors)
