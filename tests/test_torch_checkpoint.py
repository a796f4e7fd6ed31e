"""torch's files without torch: read as torch wrote them, and nothing in them is run."""

import io
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest

from larimar_jax.weights import WeightsError, torch_checkpoint
from larimar_jax.weights.torch_checkpoint import TorchCheckpoint

GOLDEN = pathlib.Path(__file__).parent / "golden" / "torch"
FILES = ("plain.bin", "lightning.ckpt", "lightning_protocol_4.ckpt")


@pytest.mark.parametrize("file", FILES)
def test_every_tensor_is_what_torch_wrote(file):
    source, expected = TorchCheckpoint(GOLDEN / file), np.load(GOLDEN / "expected.npz")
    assert set(source.shapes()) == set(expected.files)
    for name, shape in source.shapes().items():
        tensor = source.read(name)
        assert tensor.shape == shape == expected[name].shape
        assert tensor.dtype.name == (name if name == "bfloat16" else expected[name].dtype.name)
        np.testing.assert_array_equal(tensor.astype(expected[name].dtype), expected[name])


@pytest.mark.parametrize("file", FILES[1:])
def test_hyper_parameters_of_a_lightning_checkpoint(file):
    source = TorchCheckpoint(GOLDEN / file)
    assert source.hyper_parameters == {"latent": 8, "name": "tiny", "parts": [1, 2.5, None, True]}
    assert source.tree["epoch"] == 3
    assert TorchCheckpoint(GOLDEN / "plain.bin").hyper_parameters is None


def zipped(path, content, how=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("x/data.pkl", content)
        for name, raw in entries.items():
            archive.writestr(f"x/{name}" if name == "byteorder" else f"x/data/{name[1:]}", raw)
    return path


def load(path, content):
    return TorchCheckpoint(zipped(path / "x.bin", content)).tree


class Call:
    """Makes a file if it is unpickled by Python's machine."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_runs_something_runs_nothing(tmp_path, protocol, nested):
    marker = tmp_path / "marker"
    evil = Call(os.system, f"touch {marker}")
    content = pickle.dumps([1, [evil]] if nested else evil, protocol)
    with pytest.raises(WeightsError, match=r"asks for \w+\.system.*nothing of it was run"):
        load(tmp_path, content)
    assert not marker.exists()
    pickle.loads(content)  # the file is not harmless by accident
    assert marker.exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, __import__, open, io.open_code, np.load, pickle.loads]
)
def test_other_names_are_refused(tmp_path, function):
    with pytest.raises(WeightsError, match="nothing of it was run"):
        load(tmp_path, pickle.dumps(Call(function, "1"), 2))


def test_a_file_cannot_change_what_stands_for_its_names(tmp_path):
    """A state for a function would be set as its attributes, and outlive the file."""
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"torch\nSize", b"builtins\nset"):
        content = b"c" + name + b"\nN}X\x04\x00\x00\x00nameK\x01s\x86b."
        with pytest.raises(WeightsError, match="a state for a"):
            load(tmp_path, content)
    assert not hasattr(torch_checkpoint._tensor, "name")


def tensor_pickle(name="t", offset=0, shape=(2,), strides=(1,), count=2, kind="FloatStorage"):
    """A state dict of one tensor, written by hand."""
    out = io.BytesIO()
    writer = pickle._Pickler(out, 2)

    def named(module, attribute):
        writer.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())

    writer.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT)
    writer.save(name)
    named("torch._utils", "_rebuild_tensor_v2")
    writer.write(pickle.MARK + pickle.MARK)
    writer.save("storage")
    named("torch", kind)
    for value in ("0", "cpu", count):
        writer.save(value)
    writer.write(pickle.TUPLE + pickle.BINPERSID)
    for value in (offset, shape, strides, False, None):
        writer.save(value)
    writer.write(pickle.TUPLE + pickle.REDUCE + pickle.SETITEM + pickle.STOP)
    return out.getvalue()


ONE_TWO = np.float32([1, 2]).tobytes()


def test_a_tensor_written_by_hand(tmp_path):
    path = zipped(tmp_path / "x.bin", tensor_pickle(), _0=ONE_TWO)
    np.testing.assert_array_equal(TorchCheckpoint(path).read("t"), [1, 2])


def test_a_buffer_of_many_tensors_is_read_once(tmp_path):
    path = zipped(tmp_path / "x.bin", tensor_pickle(offset=1, shape=(1,)), _0=ONE_TWO)
    source = TorchCheckpoint(path)
    np.testing.assert_array_equal(source.read("t"), [2])
    path.unlink()
    np.testing.assert_array_equal(source.read("t"), [2])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(offset=1), "in a storage of 2"),
        (dict(shape=(1 << 60,), strides=(0,)), "in a storage of 2"),
        (dict(shape=(-1,)), "no counts"),
        (dict(shape=(2, 1)), "no counts"),
        (dict(shape=(1,) * 65, strides=(1,) * 65), "no counts"),
        (dict(shape=(0, 1 << 63), strides=(1, 1)), "no counts"),
        (dict(count=-2), "with its name and size"),
        (dict(kind="ComplexFloatStorage"), "asks for torch.ComplexFloatStorage"),
        (dict(kind="Size"), "a storage of a type"),
    ],
)
def test_tensors_that_do_not_fit_their_storage(tmp_path, bad, message):
    with pytest.raises(WeightsError, match=message):
        TorchCheckpoint(zipped(tmp_path / "x.bin", tensor_pickle(**bad), _0=bytes(8)))


def test_storages_that_are_missing_or_of_another_size(tmp_path):
    with pytest.raises(WeightsError, match="0 is missing"):
        TorchCheckpoint(zipped(tmp_path / "x.bin", tensor_pickle())).read("t")
    for size in (7, 9):
        path = zipped(tmp_path / "y.bin", tensor_pickle(), _0=bytes(size))
        with pytest.raises(WeightsError, match=f"storage 0 has {size} bytes, not the 8"):
            TorchCheckpoint(path).read("t")


def test_a_changed_byte_of_a_storage_is_noticed(tmp_path):
    path = zipped(tmp_path / "x.bin", tensor_pickle(), _0=ONE_TWO)
    content = bytearray(path.read_bytes())
    content[content.index(ONE_TWO)] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="CRC"):
        TorchCheckpoint(path).read("t")


def test_entries_that_are_not_as_torch_writes_them(tmp_path, monkeypatch):
    """A deflated file of a few kilobytes could unpack to gigabytes."""
    path = zipped(tmp_path / "x.bin", tensor_pickle(), zipfile.ZIP_DEFLATED, _0=ONE_TWO)
    with pytest.raises(WeightsError, match="is compressed, which torch does not do"):
        TorchCheckpoint(path)
    with pytest.raises(WeightsError, match="big-endian"):
        TorchCheckpoint(zipped(path, tensor_pickle(), byteorder=b"big"))
    monkeypatch.setattr(torch_checkpoint, "_LONGEST_PICKLE", 50)
    with pytest.raises(WeightsError, match="a data.pkl of 61 bytes"):
        load(tmp_path, b"]" * 60 + b".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ccollections\nOrderedDict\n]\x85R.", "takes 0 positional arguments"),
        (b"}\x8a\x09" + bytes(8) + b"\x01K\x01s.", "named by a int"),
        # Tuples that hold the one before twice: 2²⁰⁰ visits for a hash.
        (b"}K\x01\x85q\x00" + b"0h\x00h\x00\x86q\x00" * 200 + b"K\x01s.", "named by a tuple"),
        (b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "'a' twice"),
        (b"\x96" + struct.pack("<Q", 1 << 40) + b".", "cannot be read"),  # BYTEARRAY8
        (b".", "cannot be read"),
        (b"}h\x00K\x01s.", "cannot be read"),
        (b"Nr\xff\xff\xff\xff.", "no state dict but a NoneType"),  # memo 4 billion: one entry
        (b"\x82\x01.", "cannot be read"),  # an extension code
    ],
)
def test_pickles_that_are_malformed_or_make_much_of_little(tmp_path, content, message):
    with pytest.raises(WeightsError, match=message):
        load(tmp_path, content)


def test_no_memory_is_an_error_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_checkpoint._Unpickler, "load", exhausted)
    with pytest.raises(WeightsError, match="MemoryError"):
        load(tmp_path, b"].")


def exhausted(_):
    raise MemoryError


def test_what_is_no_state_dict_or_no_torch_file(tmp_path):
    with pytest.raises(WeightsError, match="no state dict but a list"):
        load(tmp_path, pickle.dumps([1, 2]))
    with pytest.raises(FileNotFoundError, match="no weights file"):
        TorchCheckpoint(tmp_path / "nowhere.bin")
    for content in (b"version https://git", pickle.dumps({})):
        (tmp_path / "other.bin").write_bytes(content)
        with pytest.raises(WeightsError, match="no torch file since 1.6"):
            TorchCheckpoint(tmp_path / "other.bin")
