"""torch's files without torch: what torch wrote, and what must not happen."""

import io
import json
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larimar_jax.weights import WeightsError, torch_pickle
from larimar_jax.weights.shards import Shards
from larimar_jax.weights.torch_files import TorchFile

GOLDEN = pathlib.Path(__file__).parent / "golden" / "torch"
FILES = ("plain.bin", "legacy.bin", "lightning.ckpt", "lightning_protocol_4.ckpt")


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_is_what_torch_wrote(file):
    source, expected = TorchFile(GOLDEN / file), np.load(GOLDEN / "expected.npz")
    assert set(source.shapes()) == set(expected.files)
    for name, shape in source.shapes().items():
        got = source.read(name)
        assert got.shape == shape == expected[name].shape
        assert got.dtype.name == (name if name == "bfloat16" else expected[name].dtype.name)
        np.testing.assert_array_equal(got.astype(expected[name].dtype), expected[name])


@pytest.mark.parametrize("file", FILES[2:])
def test_hyper_parameters_of_a_lightning_checkpoint(file):
    source = TorchFile(GOLDEN / file)
    assert source.hyper_parameters == {"latent": 8, "name": "tiny", "parts": [1, 2.5, None, True]}
    assert source.tree["epoch"] == 3
    assert TorchFile(GOLDEN / "plain.bin").hyper_parameters is None


def zipped(path, content, **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        for key, raw in storages.items():
            archive.writestr(f"x/data/{key}", raw)
    return path


class Runs:
    """Makes a file if it is unpickled by Python's machine."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_something_runs_nothing(tmp_path, protocol, hidden, legacy):
    marker = tmp_path / "marker"
    evil = Runs(os.system, f"touch {marker}")
    content = pickle.dumps({"a": [1, {"b": evil}]} if hidden else evil, protocol)
    path = tmp_path / "evil.bin"
    if legacy:
        first = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})]
        path.write_bytes(b"".join(first) + content)
    else:
        zipped(path, content)
    with pytest.raises(WeightsError, match=r"asks for \w+\.system.*nothing of it was run"):
        TorchFile(path)
    assert not marker.exists()
    pickle.loads(content)  # the file is not harmless by accident
    assert marker.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, __import__, open, io.open_code, np.load, pickle.loads]
)
def test_other_names_are_refused(tmp_path, function):
    path = zipped(tmp_path / "evil.bin", pickle.dumps(Runs(function, "1"), 2))
    with pytest.raises(WeightsError, match="nothing of it was run"):
        TorchFile(path)


def tensor_pickle(offset=0, shape=(2,), strides=(1,), count=2, key="0", kind="FloatStorage"):
    """A state dict of one tensor, written by hand."""
    out = io.BytesIO()

    class Writer(pickle._Pickler):
        def save_global_name(self, module, name):
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    writer = Writer(out, 2)
    writer.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT)
    writer.save("t")
    writer.save_global_name("torch._utils", "_rebuild_tensor_v2")
    writer.write(pickle.MARK + pickle.MARK)
    writer.save("storage")
    writer.save_global_name("torch", kind)
    for value in (key, "cpu", count):
        writer.save(value)
    writer.write(pickle.TUPLE + pickle.BINPERSID)
    for value in (offset, shape, strides, False, None):
        writer.save(value)
    writer.write(pickle.TUPLE + pickle.REDUCE + pickle.SETITEM + pickle.STOP)
    return out.getvalue()


TENSOR = tensor_pickle()


def test_a_tensor_written_by_hand(tmp_path):
    path = zipped(tmp_path / "x.bin", tensor_pickle(), **{"0": np.float32([1, 2]).tobytes()})
    np.testing.assert_array_equal(TorchFile(path).read("t"), [1, 2])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(offset=1), "in a storage of 2"),
        (dict(shape=(3,)), "in a storage of 2"),
        (dict(shape=(1 << 60,), strides=(0,)), "in a storage of 2"),
        (dict(shape=(-1,)), "no counts"),
        (dict(strides=(-1,)), "no counts"),
        (dict(shape=(2, 1)), "no counts"),
        (dict(shape=(1,) * 65, strides=(1,) * 65), "no counts"),
        (dict(shape=(0, 1 << 63), strides=(1, 1)), "no counts"),
        (dict(count=-2), "kind, name and size"),
        (dict(kind="ComplexFloatStorage"), "asks for torch.ComplexFloatStorage"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(tmp_path, bad, message):
    path = zipped(tmp_path / "x.bin", tensor_pickle(**bad), **{"0": bytes(8)})
    with pytest.raises(WeightsError, match=message):
        TorchFile(path)


def test_storages_that_are_not_there_or_too_short(tmp_path):
    path = zipped(tmp_path / "x.bin", tensor_pickle())
    with pytest.raises(WeightsError, match="storage 0 is missing"):
        TorchFile(path).read("t")
    for size in (7, 9):
        path = zipped(tmp_path / "y.bin", tensor_pickle(), **{"0": bytes(size)})
        with pytest.raises(WeightsError, match=f"storage 0 has {size} bytes, not the 8"):
            TorchFile(path).read("t")


def test_compressed_entries_do_not_unpack_to_more_than_was_said(tmp_path):
    """What a deflated file of a few kilobytes may make: not gigabytes."""

    def deflated(content=TENSOR, order=b"little", how=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.bin", "w", how) as archive:
            archive.writestr("x/data.pkl", content)
            archive.writestr("x/byteorder", order)
            archive.writestr("x/data/0", np.float32([1, 2]).tobytes())
        return tmp_path / "x.bin"

    np.testing.assert_array_equal(TorchFile(deflated()).read("t"), [1, 2])
    with pytest.raises(WeightsError, match="data.pkl says 2000001 bytes"):
        TorchFile(deflated(b"]" * 2_000_000 + b"."))
    big = TorchFile(deflated(order=b"big" + bytes(1 << 22)))
    assert not big._file.big_endian
    with pytest.raises(WeightsError, match="compressed by method 14"):
        TorchFile(deflated(how=zipfile.ZIP_LZMA))


def test_pickles_beyond_all_real_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_INSTRUCTIONS", 100)
    with pytest.raises(WeightsError, match="over 100 instructions"):
        torch_pickle.load(b"]" * 100 + b".", "x.bin")
    monkeypatch.setattr(torch_pickle, "LIMIT", 50)
    with pytest.raises(WeightsError, match="or 50 bytes"):
        torch_pickle.load(b"]" * 60 + b".", "x.bin")
    (tmp_path / "x.bin").write_bytes(b"\x80\x02" + b"]" * 60 + b".")
    with pytest.raises(WeightsError, match="or 50 bytes"):
        TorchFile(tmp_path / "x.bin")


DOUBLING = b"K\x01" + b"2\x86" * 40  # spelled out, 2⁴⁰ numbers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # {path: 1, path: 1}, the path an Opaque of such a tuple.
        (b"}cpathlib\nPosixPath\n" + DOUBLING + b"\x85Rq\x00K\x01sh\x00K\x01s.", "of a Opaque twice"),
        # One list of 1000 pairs, copied for every call.
        (
            b"]q\x00(" + b"K\x01K\x02\x86" * 1000 + b"e0" + b"ctorch\nSize\nh\x00\x85R.",
            "a Size of 1000 items",
        ),
        (
            b"](" + b"".join(b"M%bK\x01\x86" % i.to_bytes(2, "little") for i in range(99)) + b"eq\x000"
            + b"ccollections\nOrderedDict\nq\x010" + b"h\x01h\x00\x85R0" * 99 + b"N.",
            "an? OrderedDict of 99 items",
        ),
        (b"}(" + b"K\x01" * 17 + b"tK\x01s.", "named by a tuple"),
        (b"}\x8a\x09" + bytes(8) + b"\x01K\x01s.", "named by a int"),
    ],
)
def test_pickles_that_make_much_of_little(content, message):
    with pytest.raises(WeightsError, match=message):
        torch_pickle.load(content, "x.bin")


def test_no_memory_is_an_error_of_the_file(monkeypatch):
    def step(*_):
        raise MemoryError

    monkeypatch.setattr(torch_pickle._Machine, "step", step)
    with pytest.raises(WeightsError, match="MemoryError"):
        torch_pickle.load(b"].", "x.bin")


def test_a_changed_byte_of_a_storage_is_noticed(tmp_path):
    path = zipped(tmp_path / "x.bin", tensor_pickle(), **{"0": np.float32([1, 2]).tobytes()})
    content = bytearray(path.read_bytes())
    content[content.index(np.float32([1, 2]).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="CRC"):
        TorchFile(path).read("t")


@pytest.mark.parametrize("file", FILES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_file_cut_anywhere_is_an_error_or_whole(tmp_path_factory, file, data):
    whole = (GOLDEN / file).read_bytes()
    keep = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / file
    path.write_bytes(whole[:keep])
    with pytest.raises(WeightsError):
        source = TorchFile(path)
        for name in source.shapes():
            source.read(name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",  # an entry twice
        b"K\x01\x85\x85\x85}h\x00K\x01s.",
        b"r\xff\xff\xff\xff.",
        b"}(K\x01u.",
        b"c__main__\n__dict__\n.",
        b"\x82\x01.",  # an extension code
        b"]\x94(" + b"\x85" * 50 + b"e.",
    ],
)
def test_malformed_pickles(content):
    with pytest.raises(WeightsError):
        torch_pickle.load(content, "x.bin")


def test_a_dict_is_not_named_by_what_takes_for_ever_to_hash():
    """Each of 200 tuples holds the one before twice: 2²⁰⁰ visits for its hash."""
    doubling = b"K\x01" + b"2\x86" * 200
    with pytest.raises(WeightsError, match="an entry named by a tuple"):
        torch_pickle.load(b"}" + doubling + b"K\x01s.", "x.bin")


def test_what_is_no_state_dict(tmp_path):
    with pytest.raises(WeightsError, match="no state dict but a list"):
        TorchFile(zipped(tmp_path / "x.bin", pickle.dumps([1, 2])))
    with pytest.raises(FileNotFoundError, match="no weights file"):
        TorchFile(tmp_path / "nowhere.bin")
    (tmp_path / "text.bin").write_text("version https://git-lfs")
    with pytest.raises(WeightsError, match="no torch file"):
        TorchFile(tmp_path / "text.bin")


@pytest.fixture
def sharded(tmp_path):
    for file in ("a.bin", "b.bin"):
        raw = {"0": np.float32([1, 2]).tobytes()}
        zipped(tmp_path / file, tensor_pickle().replace(b"t", file[0].encode(), 1), **raw)
    index = tmp_path / "pytorch_model.bin.index.json"

    def write(**where):
        index.write_text(json.dumps({"weight_map": where}))
        return index

    return write


def test_shards(sharded):
    source = Shards(sharded(a="a.bin", b="b.bin"), TorchFile)
    assert source.shapes() == {"a": (2,), "b": (2,)}
    np.testing.assert_array_equal(source.read("b"), [1, 2])


def test_one_file_at_a_time_keeps_a_storage(tmp_path):
    raw = {"0": np.float32([1, 2]).tobytes()}
    for name in "ab":
        part = tensor_pickle(shape=(1,)).replace(b"t", name.encode(), 1)
        zipped(tmp_path / f"{name}.bin", part, **raw)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.bin", "b": "b.bin"}}))
    source = Shards(index, TorchFile)
    for name in "aab":
        source.read(name)
    assert [source._files[name]._held is None for name in "ab"] == [True, False]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (dict(a="a.bin", b="c.bin", c="d.bin"), "not beside it: c.bin, d.bin"),
        (dict(a="../a.bin"), "leads outside its folder"),
        (dict(a="/etc/passwd"), "leads outside its folder"),
        (dict(a=3), "leads outside its folder or nowhere: 3"),
        (dict(a="b.bin", b="b.bin"), "a: not in b.bin"),
        (dict(a="a.bin", c="b.bin"), "b: in b.bin, not indexed\n  c: not in b.bin"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files(sharded, where, message):
    with pytest.raises((WeightsError, FileNotFoundError), match=message):
        Shards(sharded(**where), TorchFile)
