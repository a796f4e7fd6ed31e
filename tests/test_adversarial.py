"""Files that are made to harm: each ends in a clear error, runs nothing and leaves nothing behind.

    pytest tests/test_adversarial.py --hypothesis-profile=long      # thousands of files; an hour

What broke a reader is in pytest's folder whole-KIND, and belongs in golden/damaged from then on.
"""

import re

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from larimar_jax.weights import WeightsError

DAMAGED = sorted((fuzz.GOLDEN / "damaged").iterdir())


@pytest.mark.parametrize("path", DAMAGED, ids=lambda path: path.name)
def test_a_file_that_once_broke_a_reader_is_read_or_refused(path, tmp_path):
    assert fuzz.check(path.name.partition(".")[2], path.read_bytes(), tmp_path) is None


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_files_are_read_whole_and_read_or_refused_when_they_are_changed(kind, tmp_path_factory):
    """A reader that refused the whole file would prove nothing."""
    path = tmp_path_factory.mktemp(f"whole-{kind}-") / f"x.{kind}"
    path.write_bytes(fuzz.seeds()[kind])
    if kind == "config.json":
        with pytest.raises(WeightsError, match="unknown encoder family"):
            fuzz.load(kind, path)  # a decoder's; read as an encoder's at last
    else:
        fuzz.load(kind, path)

    @given(st.randoms(use_true_random=True))
    def changed(rng):
        assert fuzz.check(kind, fuzz.mutate(kind, rng), path.parent) is None

    changed()


@pytest.mark.parametrize("kind", ("bin", "ckpt", "gguf", "safetensors"))
@given(share=st.floats(0, 1))
def test_a_file_that_is_cut_anywhere_is_refused_by_name(tmp_path_factory, kind, share):
    path, whole = tmp_path_factory.mktemp("cut") / f"x.{kind}", fuzz.seeds()[kind]
    path.write_bytes(whole[: int(share * (len(whole) - 33))])
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        fuzz.load(kind, path)


def test_what_runs_or_breaks_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "load", lambda kind, path: fuzz.MARKER.touch())
    assert fuzz.check("bin", b"", tmp_path) == "something in the file was run"
    fuzz.MARKER.unlink()
    monkeypatch.setattr(fuzz, "load", lambda kind, path: 1 / 0)
    assert "ZeroDivisionError" in fuzz.check("bin", b"", tmp_path)
