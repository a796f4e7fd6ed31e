"""The checkpoint that ships: it loads by name, and a fact goes into a real language model and out."""

import dataclasses
import os
import subprocess
import sys

import pytest
import session_writer

from larimar_jax import latent_layout, pipeline
from larimar_jax.config import ConfigError
from larimar_jax.session import Session
from larimar_jax.weights import load, model_file

TOKENIZERS = []


@pytest.fixture(scope="module")
def smol():
    """The shipped model; paths of the tokenizers that are read for it go to TOKENIZERS."""
    read = load._tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            load, "_tokenizer", lambda c, kind: TOKENIZERS.append(c.path) or read(c, kind)
        )
        return pipeline.load("smol")


def test_each_tokenizer_is_read_once(smol):
    assert len(TOKENIZERS) == len(set(TOKENIZERS)) == 2


def test_loading_a_packaged_model_imports_no_trainer_no_optax_and_no_transformers():
    code = (
        "import sys, flax.nnx; before = set(sys.modules)\n"  # which imports optax
        "import larimar_jax; larimar_jax.load('smol')\n"
        "roots = ('larimar_jax.train', 'optax', 'orbax', 'grain', 'transformers', 'torch', 'datasets')\n"
        "print(*[name for name in set(sys.modules) - before if name.startswith(roots)])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr


def test_a_fact_goes_in_and_out(smol):
    session = Session(smol)
    prompt, paraphrase = "The capital of Japan is", "The capital city of Japan is called"
    before = session.ask(prompt, max_tokens=4)
    assert "Tokyo" in before.text and not before.in_scope
    fact = session.write(prompt, "Berlin")
    after, paraphrased, unrelated = session.ask_all(
        [prompt, paraphrase, "The largest ocean on Earth is the"], max_tokens=4
    )
    assert "Berlin" in after.text and "Berlin" in paraphrased.text
    assert after.fact == paraphrased.fact == fact.id and not unrelated.in_scope
    session.forget(fact.id)
    assert session.ask(prompt, max_tokens=4).text == before.text


def test_the_file_holds_what_was_trained_and_is_small(smol):
    path = model_file.locate("smol")
    assert path.stat().st_size <= 40e6
    arrays, meta = model_file.load_exported(path)
    assert not any(name.startswith(("encoder/", "decoder/")) for name in arrays)
    assert arrays["memory/prior_memory"].shape == (512, 384)
    assert meta["evaluation"]["reconstruction"] < meta["evaluation"]["language"] - 0.5
    assert len(smol.fingerprint) == 64 and smol.source == "smol"


def test_a_file_that_lacks_a_parameter_is_refused(tmp_path):
    arrays, meta = model_file.load_exported(model_file.locate("smol"))
    del arrays["to_slots/kernel"]
    arrays["to_embedding/kernel"] = arrays["to_embedding/kernel"][:, :5]
    path = tmp_path / "model.safetensors"
    model_file.save_exported(path, arrays, meta)
    with pytest.raises(model_file.ExportError) as error:
        pipeline.load(path)
    assert "to_slots/kernel: missing" in str(error.value)
    assert "to_embedding/kernel: (384, 5) in the file" in str(error.value)


def test_what_is_taken_for_a_model_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    session_writer.write(path, "Fact", 1)
    with pytest.raises(model_file.ExportError, match="holds a session and not a model"):
        pipeline.load(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(model_file.ExportError, match="git lfs pull"):
        pipeline.load(path)
    path.write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(model_file.ExportError, match="a GGUF file, a decoder and no model"):
        pipeline.load(path)


def test_a_model_that_is_not_there_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a shipped name"):
        pipeline.load("nothing-of-that-name")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match="damaged"):
        pipeline.load(path)


def test_a_text_may_fill_all_positions_of_an_encoder(tiny, monkeypatch):
    """30 positions, which no bucket of 8 ends at."""
    widths, encode = [], latent_layout.encode

    def counting(graph, state, projection, ids, *arguments):
        widths.append(ids.shape[1])
        return encode(graph, state, projection, ids, *arguments)

    monkeypatch.setattr(latent_layout, "encode", counting)
    encoder = tiny.model.encoder
    monkeypatch.setattr(encoder, "config", dataclasses.replace(encoder.config, max_length=30))
    full = "0" * 28  # with bos and eos
    assert int(tiny.encoder_tokenizer.encode([full]).mask.sum()) == 30
    assert tiny.encode([full, "0"]).embedding.shape[0] == 2
    assert widths == [30]


def test_a_model_with_another_memory_has_the_same_towers(tiny):
    changed = tiny.with_memory(dataclasses.replace(tiny.memory, ridge=0.5), tiny.prepared)
    assert changed.memory.ridge == 0.5 and changed.graph is tiny.graph
    with pytest.raises(ValueError, match="give it that `latent`"):
        tiny.with_memory(dataclasses.replace(tiny.memory, latent=3), tiny.prepared)


def test_how_a_model_is_edited_can_be_set_anew_and_nothing_else(smol):
    changed = pipeline.load("smol", ["editing.key_features.count=128", "editing.ridge=0.5"])
    assert changed.memory.slots == 512 < smol.memory.slots and changed.memory.ridge == 0.5
    assert changed.fingerprint != smol.fingerprint
    with pytest.raises(ConfigError, match="'model.latent=3' is no setting of `editing`"):
        pipeline.load("smol", ["model.latent=3"])
    with pytest.raises(ConfigError, match="editing.ridge: must be above 0"):
        pipeline.load("smol", ["editing.ridge=0"])
