"""Files that are made to harm: each ends in a clear error, runs nothing and leaves nothing behind."""

import pathlib
import random
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax.weights import WeightsError
from larimar_jax.weights.key_table import fill

sys.path.insert(0, str(pathlib.Path(__file__).parent / "fuzz"))
import fuzz  # noqa: E402

CORPUS = sorted(path.name for path in fuzz.CORPUS.iterdir())
MESSAGES = {
    "os-system.bin": "asks for posix.system.*nothing of it was run",
    "inst-eval.bin": "asks for builtins.eval.*nothing of it was run",
    "doubling-tuple.bin": "an entry named by a tuple",
    "stride-0.bin": "in a storage of 2",
    "cut.safetensors": "cannot be read as safetensors.*Fetch it again",
    "kind-99.gguf": "of kind 99.*Take an F16",
    "metadata-2-to-60.gguf": "more than it has room for",
    "missing.index.json": "names files that are not beside it: c.safetensors",
    "astray.index.json": r"leads outside its folder or nowhere: \.\./a.safetensors",
}


@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus(name, tmp_path):
    content = (fuzz.CORPUS / name).read_bytes()
    assert fuzz.check(name.partition(".")[2], content, tmp_path) is None


@pytest.mark.parametrize(("name", "message"), MESSAGES.items())
def test_what_is_said(name, message, tmp_path):
    path = tmp_path / name
    path.write_bytes((fuzz.CORPUS / name).read_bytes())
    with pytest.raises((WeightsError, FileNotFoundError), match=message):
        fuzz.load(name.partition(".")[2], path)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_whole_files_are_read(kind, tmp_path):
    """Otherwise the fuzzer would prove nothing."""
    path = tmp_path / f"x.{kind}"
    path.write_bytes(fuzz.seeds()[kind])
    if kind == "config.json":
        with pytest.raises(WeightsError, match="unknown encoder family"):
            fuzz.load(kind, path)  # a decoder's; read as an encoder's at last
    else:
        fuzz.load(kind, path)


@pytest.mark.parametrize("kind", ("bin", "ckpt", "gguf", "safetensors"))
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_files_cut_or_changed_anywhere(tmp_path_factory, kind, data):
    """What is cut is refused; what is changed is read in the shapes that it names, or refused."""
    folder, whole = tmp_path_factory.mktemp("changed"), fuzz.seeds()[kind]
    path = folder / f"cut.{kind}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        fuzz.load(kind, path)
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    assert fuzz.check(kind, bytes(changed), folder) is None


def test_a_few_hundred_changed_files(tmp_path):
    for number in range(300):
        rng = random.Random(number)
        kind = rng.choice(fuzz.KINDS)
        found = fuzz.check(kind, fuzz.mutate(kind, rng), tmp_path)
        assert found is None, f"{kind}, seed {number}: {found}"


def test_the_fuzzer_notices_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "load", lambda kind, path: fuzz.MARKER.touch())
    assert fuzz.check("bin", b"", tmp_path) == "something in the file was run"
    fuzz.MARKER.unlink()
    monkeypatch.setattr(fuzz, "load", lambda kind, path: 1 / 0)
    assert "ZeroDivisionError" in fuzz.check("bin", b"", tmp_path)


class Failing:
    """A source whose last tensor can't be read."""

    path = "failing"

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, 0

    def shapes(self):
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name):
        self.reads += 1
        if self.reads == len(self.tensors):
            raise WeightsError("failing: cut short")
        return self.tensors[name]


def test_nothing_is_left_half_loaded():
    """An error in the last tensor leaves the abstract module as it was, without a number in it."""

    class Two(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(np.zeros((2, 2), np.float32))
            self.b = nnx.Param(np.zeros(3, np.float32))

    abstract = nnx.eval_shape(Two)
    source = Failing({"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float32)})
    with pytest.raises(WeightsError, match="cut short"):
        fill(abstract, (("a", "a", "copy"), ("b", "b", "copy")), source)
    assert source.reads == 2
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(abstract)))
