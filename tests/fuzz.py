"""Damaged files for every reader of weights, tokenizers and configs: see test_adversarial.py.

Small valid files are changed at random: bytes, lengths, JSON values, pickle instructions that would
run something. Whatever a file holds, a reader either reads it or raises WeightsError,
FileNotFoundError or TextTooLong, within 5 s and 1 GB, and runs nothing of it. A file that once broke
that is in golden/damaged.
"""

import functools
import io
import json
import pathlib
import random
import resource
import shutil
import struct
import tempfile
import time
import traceback
import zipfile

import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parent / "golden"
SECONDS, MEGABYTES = 5, 1000
# Where a pickle that runs would leave its trace.
MARKER = pathlib.Path(tempfile.gettempdir()) / "larimar-fuzz-marker"
KINDS = ("bin", "ckpt", "config.json", "gguf", "index.json", "safetensors")
KINDS += ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


def load(kind: str, path: pathlib.Path) -> None:
    """Reads a file of that kind as a user's call would, to its last tensor.

    Raises:
      WeightsError, FileNotFoundError, TextTooLong: what may be wrong with a file.
    """
    from larimar_jax import decoders, encoders, weights
    from larimar_jax.weights import gguf, huggingface, safetensors_files, torch_checkpoint
    from larimar_jax.weights.load import describe

    readers = {
        "safetensors": safetensors_files.Safetensors,
        "gguf": gguf.Gguf,
        "bin": torch_checkpoint.TorchCheckpoint,
        "ckpt": torch_checkpoint.TorchCheckpoint,
        "index.json": lambda index: safetensors_files.Shards(index, safetensors_files.Safetensors),
    }
    if kind in readers:
        for name in ("a", "b") if kind == "index.json" else ():
            content = safetensors.numpy.save({name: np.ones(3, np.float32)})
            (path.parent / f"{name}.safetensors").write_bytes(content)
        source = readers[kind](path)
        for name, shape in source.shapes().items():
            if source.read(name).shape != shape:
                raise AssertionError(f"{name} is not of the shape that the header says")
        if kind == "gguf":
            source.config()
            source.tokenizer().encode(["a text"], 32)
        if kind == "ckpt":
            source.hyper_parameters  # noqa: B018
        return
    folder = path.parent / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(seeds()["safetensors"])
    others = ("config.json", "tokenizer.json", "tokenizer_config.json")
    if kind == "vocab.txt":
        others = ()
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    for other in others:
        (folder / other).write_bytes(seeds()[other])
    (folder / kind).write_bytes(path.read_bytes())
    if kind != "config.json":
        huggingface.Folder(folder).tokenizer().encode(["a text", "né 東京"], 64)
        return
    for family in (decoders, encoders):
        try:
            describe(huggingface.Folder(folder), family)
        except weights.WeightsError:
            if family is encoders:
                raise


@functools.cache
def seeds() -> dict[str, bytes]:
    """A small valid file of each kind."""
    import gguf
    import test_gguf

    from larimar_jax.weights import Tokenizer

    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    tokenizer = Tokenizer.train(["a few words to learn from"], 280)
    rows, kind = np.ones((8, 32), np.float32), gguf.GGMLQuantizationType.Q4_1
    with tempfile.TemporaryDirectory() as folder:
        matrices = {"token_embd.weight": rows, "blk.0.attn_q.weight": rows}
        matrices["blk.0.ffn_up.weight"] = (gguf.quantize(rows, kind), kind)
        sizes = test_gguf.SIZES | dict(block_count=2, embedding_length=32, attention__head_count=4)
        path = pathlib.Path(folder) / "x.gguf"
        gguf_bytes = test_gguf.write(path, matrices, tokenizer=tokenizer, **sizes).read_bytes()
    index = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    named = {"bos_token": "<BOS>", "pad_token": "<PAD>"}
    named["eos_token"] = {"__type": "AddedToken", "content": "<EOS>"}
    return {
        "bin": (GOLDEN / "torch" / "plain.bin").read_bytes(),
        "ckpt": (GOLDEN / "torch" / "lightning.ckpt").read_bytes(),
        "config.json": (GOLDEN / "tiny_qwen2_window" / "config.json").read_bytes(),
        "gguf": gguf_bytes,
        "index.json": json.dumps(index).encode(),
        "safetensors": safetensors.numpy.save(tensors),
        "tokenizer.json": tokenizer.backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(named).encode(),
        "vocab.txt": (GOLDEN / "tokenizers" / "cased" / "vocab.txt").read_bytes(),
    }


def mutate(kind: str, rng: random.Random) -> bytes:
    """A file that was a valid one of that kind."""
    data = seeds()[kind]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if kind in ("bin", "ckpt") and rng.random() < 0.7:
            data = _inside_zip(data, rng)
        elif kind.endswith("json") and rng.random() < 0.7:
            data = _json(data, rng)
        else:
            data = _bytes(data, rng)
    return data


_NUMBERS = (0, 1, 2, 7, 8, 9, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """A bit, a byte or a number becomes another; a piece goes, comes twice or is another file's."""
    out = bytearray(data)
    if not out:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
    at, size = rng.randrange(len(out)), rng.choice((1, 2, 4, 8, 30, 200))
    other = seeds()[rng.choice(KINDS)]
    begin, number = rng.randrange(len(other)), rng.choice(_NUMBERS)
    end, piece = rng.choice(
        (
            (at + 1, bytes([out[at] ^ 1 << rng.randrange(8)])),
            (at + 1, bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])),
            (at + size, b""),
            (at, out[at : at + size]),
            (len(out), b""),
            (at + rng.choice((0, size)), other[begin : begin + size]),
            (at + 8, struct.pack("<Q", number)),
            (at + 4, struct.pack("<I", number & 0xFFFFFFFF)),
        )
    )
    out[at:end] = piece
    return bytes(out)


def _json(data: bytes, rng: random.Random) -> bytes:
    """One value of the document becomes another, goes, or comes twice."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    places = []

    def walk(node, depth=0):
        if depth < 6 and isinstance(node, dict | list):
            items = node.items() if isinstance(node, dict) else enumerate(node)
            for key, value in list(items)[:60]:
                places.append((node, key))
                walk(value, depth + 1)

    walk(document)
    strange = (None, True, 0, -1, 1.5, 1e308, 1 << 70, "", "x", "../x", [], {}, [[]], {"a": None})
    if not places or rng.random() < 0.05:
        return json.dumps(rng.choice(strange)).encode()
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    elif isinstance(node, dict) and rng.random() < 0.2:
        node[rng.choice(("x", "", key + "s"))] = node[key]
    else:
        node[key] = rng.choice((*strange, rng.choice(places)[1]))
    return json.dumps(document).encode()


def _evil(rng: random.Random) -> bytes:
    """Instructions that would run something, at the end or in the middle of a pickle."""
    command = f"touch {MARKER}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    code = f"open({str(MARKER)!r}, 'w')".encode()
    source = b"X" + struct.pack("<I", len(code)) + code
    names = "os.system posix.system subprocess.getoutput builtins.eval __builtin__.exec"
    names += " torch._utils._rebuild_tensor_v2 torch.serialization.load torch.FloatStorage"
    names += " pytorch_lightning.x.system transformers.os.system builtins.getattr"
    full = rng.choice(names.split()).encode()
    module, _, name = full.rpartition(b".")
    argument = source if name in (b"eval", b"exec") else text
    named = b"c" + module + b"\n" + name + b"\n"
    short = b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93"
    function = rng.choice((named, short))
    return rng.choice(
        (
            function + argument + b"\x85R",
            function + argument + b"\x85\x81",
            function + argument + b"\x85}\x92",
            b"(" + function + argument + b"o",
            b"(" + argument + b"i" + module + b"\n" + name + b"\n",
            function + b"}" + argument + b"Nsb",
            function + b"(" + argument + b"tR.",
            argument + b"Q",
            b"r" + struct.pack("<I", rng.choice(_NUMBERS) & 0xFFFFFFFF),
            b"2\x86" * rng.choice((3, 60)),
            b"\x82\x01",
        )
    )


def _pickle(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5 or not data:
        return _bytes(data, rng)
    at = rng.choice((rng.randrange(len(data)), max(0, data.rfind(b"."))))
    return data[:at] + _evil(rng) + data[at:]


def _inside_zip(data: bytes, rng: random.Random) -> bytes:
    """The zip again, whole, with an entry changed: else its checksums would stop everything."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except Exception:  # noqa: BLE001 - whatever an earlier change made of it
        return _bytes(data, rng)
    if not entries:
        return _bytes(data, rng)
    name = rng.choice([*entries, *[n for n in entries if n.endswith("data.pkl")] * 20])
    entries[name] = _pickle(entries[name], rng)
    if rng.random() < 0.05:
        entries[rng.choice(("x/data.pkl", "data.pkl", "../x", name + "0"))] = entries.pop(name)
    out = io.BytesIO()
    how = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", how) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return out.getvalue()


def check(kind: str, data: bytes, folder: pathlib.Path) -> str | None:
    """What is wrong with how a file is read, or None."""
    from transformers import AutoTokenizer  # noqa: F401 - what is imported once should not count

    from larimar_jax.weights import TextTooLong, WeightsError

    path = folder / f"x.{kind}"
    path.write_bytes(data)
    MARKER.unlink(missing_ok=True)
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(kind, path)
    except (WeightsError, FileNotFoundError, TextTooLong) as error:
        if not str(error).strip():
            return "an error that says nothing"
    except BaseException as error:  # noqa: BLE001 - every other kind is a finding
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "".join(traceback.format_tb(error.__traceback__)[-2:]) + type(error).__name__
    if MARKER.exists():
        return "something in the file was run"
    if time.monotonic() - begin > SECONDS:
        return f"it took over {SECONDS} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    return f"it took {grown:.0f} MB" if grown > MEGABYTES else None
