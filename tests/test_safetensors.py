"""Safetensors files and their indexes: read as written, and refused where they lie."""

import json
import os
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from larimar_jax.weights import WeightsError
from larimar_jax.weights.safetensors_files import Safetensors, Shards

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
    others = {"before": np.ones(3, np.uint8), "none": np.ones((0, 4), np.float32)}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": want, "scalar": want[0, :1].reshape(()), **others}, path)
    source = Safetensors(path)
    assert source.shapes() == {"before": (3,), "a": (2, 2), "scalar": (), "none": (0, 4)}
    assert source.read("a").dtype == dtype and source.read("none").shape == (0, 4)
    np.testing.assert_array_equal(source.read("a"), want)
    np.testing.assert_array_equal(source.read("scalar"), want[0, 0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 4000,
        struct.pack("<Q", 50) + b"{}",
        file("[" * 10**5),
        file({"a": ROW, "b": NEXT}, 31),
        file({"a": ROW, "b": ROW | {"data_offsets": [8, 24]}}, 24),
        *(
            file({"a": ROW | changed})
            for changed in (
                {"data_offsets": [-16, 0]},
                {"data_offsets": [0, 160]},
                {"shape": [1 << 40, 1 << 40]},
                {"dtype": "F33"},
            )
        ),
        file('{"a": ' + json.dumps(ROW) + ', "a": ' + json.dumps(NEXT) + "}"),
    ],
)
def test_headers_that_lie(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as safetensors.*Fetch it again"):
        Safetensors(path)


def test_files_that_are_missing_or_of_numbers_that_are_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights file"):
        Safetensors(path)
    path.write_bytes(file({"a": {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}}, 64))
    with pytest.raises(WeightsError, match=r"a \(F8_E4M3\).*unquantised"):
        Safetensors(path)


def test_nothing_of_a_file_stays_mapped_and_a_later_cut_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file({"a": ROW, "b": NEXT}))
    source = Safetensors(path)
    assert source.read("b").tobytes() == bytes(range(16, 32))
    maps = pathlib.Path("/proc/self/maps")
    assert not maps.exists() or "x.safetensors" not in maps.read_text()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        source.read("b")


def shards(folder, places, **files):
    """An index, and files of one float per name that they hold."""
    for name, tensors in files.items():
        content = {tensor: np.ones(1, np.float32) for tensor in tensors}
        safetensors.numpy.save_file(content, folder / f"{name}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(places if isinstance(places, str) else json.dumps({"weight_map": places}))
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


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": ONE, "b": TWO}, "not beside it: one.safetensors, two.safetensors"),
        *(
            ({"a": ONE, "b": astray, "c": "../two"}, r"outside its folder or nowhere: .*\.\./two")
            for astray in (
                "../one.safetensors",
                "/etc/passwd",
                "in/" + ONE,
                "..",
                "",
                3,
                None,
                "x\0",
            )
        ),
        ({"a": "x" * 5000 + ".bin"}, "leads outside its folder or nowhere: xxx"),
        ({"a": "\ud800.bin"}, "not beside it"),
        ({}, "no weight_map"),
        ("[]", "no weight_map"),
        ("[" * 10**5, "is not JSON"),
    ],
)
def test_an_index_that_is_none_or_leads_elsewhere(tmp_path, places, message):
    with pytest.raises((WeightsError, FileNotFoundError), match=message):
        shards(tmp_path, places)
