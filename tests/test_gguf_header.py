"""Headers of GGUF files, written by hand: those that lie about what follows are refused at once."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax.weights import WeightsError
from larimar_jax.weights.gguf import Gguf


def header(version=3, tensors=(), metadata=(), counts=None):
    """A file written by hand: metadata (name, type, bytes), tensors (name, shape, kind, offset)."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    count = counts or (len(tensors), len(metadata) + 1)
    out = b"GGUF" + struct.pack("<IQQ", version, *count)
    out += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for name, kind, raw in metadata:
        out += text(name) + struct.pack("<I", kind) + raw
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + bytes(256)


GOOD = ("a", (4,), 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(tensors=[GOOD, GOOD]), "'a' is there twice"),
        (header(metadata=[("k", 0, b"1"), ("k", 0, b"1")]), "'k' is there twice"),
        (header(tensors=[("a", (4,), 99, 0)]), "of kind 99"),
        (header(tensors=[("a", (4,), 0, 1 << 40)]), "ends after the file"),
        (header(tensors=[("a", (1 << 40, 1 << 40), 0, 0)]), "ends after the file"),
        (header(tensors=[("a", (0,), 0, 0)]), "of shape"),
        (header(tensors=[("a", (33,), 8, 0)]), "in blocks of 32"),
        (header(tensors=[("a", (1,) * 9, 0, 0)]), "9 axes"),
        (header(tensors=[("a", (9,), 0, 0), ("b", (4,), 0, 32)]), "tensors a and b overlap"),
        (header(tensors=[GOOD, ("b", (4,), 0, 16)]), "b begins at 16, no multiple of 32"),
        (header(counts=(1 << 60, 1)), "more than it has room for"),
        (header(counts=(0, 1 << 60)), "more than it has room for"),
        (header(metadata=[("k", 8, struct.pack("<Q", 1 << 62))]), "ends after the file"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 8, 1 << 60))]), "more than it has room"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 4, 1 << 60))]), "more than it has room"),
        (header(metadata=[("k", 9, struct.pack("<IQ", 9, 1) * 50)]), "nested too deep"),
        (header(metadata=[("k", 77, b"")]), "a value of type 77"),
        (header(metadata=[("general.alignment", 4, struct.pack("<I", 0))]), "alignment of 0"),
        (header(metadata=[("k", 8, struct.pack("<Q", 1) + b"\xff")]), "no UTF-8"),
    ],
)
def test_files_that_lie(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        Gguf(path)


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("k", 8, struct.pack("<Q", 3 << 30), "longer than that of any model"),
        ("k", 9, struct.pack("<IQ", 0, 1 << 30), "more than the header of any model has"),
        ("k", 9, struct.pack("<IQ", 8, 1 << 28), "more than the header of any model has"),
        ("k", 9, struct.pack("<IQ", 9, 1 << 28), "more than the header of any model has"),
        ("general.architecture", 9, struct.pack("<IQ", 0, 0), "there twice"),
    ],
)
def test_counts_that_a_large_file_has_room_for(tmp_path, key, kind, value, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(metadata=[(key, kind, value)]))
    os.truncate(path, 4 << 30)  # a hole, which takes no room
    with pytest.raises(WeightsError, match=message):
        Gguf(path)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_file_cut_anywhere(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "x.gguf"
    whole = header(tensors=[GOOD], metadata=[("k", 4, b"1234")])
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 256 + 15))])
    with pytest.raises(WeightsError, match="cannot be read as GGUF"):
        Gguf(path)


def test_a_good_file_by_hand(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(header(tensors=[GOOD, ("b", (4,), 0, 32)]))
    assert Gguf(path).shapes() == {"a": (4,), "b": (4,)}
    np.testing.assert_array_equal(Gguf(path).read("a"), np.zeros(4))
