"""The authors' checkpoint into a model of ours, against torch's numbers."""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from flax import nnx
from released import GOLDEN, converted, golden

from larimar_jax import cli, config, convert, pipeline, weights
from larimar_jax.data import vocabulary
from larimar_jax.memory.variance import SETTINGS
from larimar_jax.session import Session
from larimar_jax.weights import export, ibm, key_table, model_file
from larimar_jax.weights.huggingface import Folder
from larimar_jax.weights.key_table import WeightsError
from larimar_jax.weights.torch_checkpoint import Record, TorchCheckpoint


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return released.bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module", params=range(5))
def pair(request, tmp_path_factory, bases):
    """A converted model, loaded from its folder, and what torch computes with the original."""
    out = tmp_path_factory.mktemp("models") / "made"
    converted(request.param, out, bases)
    return request.param, pipeline.load(out), golden(request.param)


@pytest.fixture(scope="module")
def first(tmp_path_factory, bases):
    """The folder of the first setting, and what the checkpoint holds that it does not use."""
    out = tmp_path_factory.mktemp("first") / "model"
    return out, converted(0, out, bases)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens, mask, inputs):
    larimar = nnx.merge(graph, state)

    def logits(latent):
        hidden, _ = larimar.hidden(inputs, larimar.condition(latent))
        return larimar.decoder.logits(hidden)

    latent = larimar.encode(tokens, mask)
    return latent, logits(latent), logits(jnp.zeros_like(latent))


def test_latents_and_conditioned_logits_are_torch_s(pair):
    _, loaded, want = pair
    inputs = (want[name] for name in ("tokens", "mask", "inputs"))
    latent, logits, zero = forward(loaded.graph, loaded.state, *inputs)
    np.testing.assert_allclose(latent, want["latents"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, want["logits"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(zero, want["zero"], rtol=1e-4, atol=1e-4)
    assert np.abs(want["logits"] - want["zero"]).max() > 1.0


def test_memory_and_its_variance_are_torch_s(pair):
    number, loaded, want = pair
    memory = config.make_memory(loaded.config)
    prepared = memory.prepare(loaded.model.memory.params())
    latents = jnp.asarray(want["latents"])
    state = memory.write(prepared, memory.empty(prepared), latents, latents)
    reading = memory.read(prepared, state, latents)
    np.testing.assert_allclose(memory.matrix(prepared, state), want["memory"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(reading.latent, want["read"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(reading.log_variance, want["log_variance"], rtol=1e-3, atol=2e-3)
    assert memory.variance == SETTINGS[number] and memory.steps == 15
    # Facts differ in it exactly where it depends on the query.
    apart = np.ptp(want["log_variance"], axis=0).max()
    assert (apart > 0.1) == (SETTINGS[number] in ("query", "both"))


def test_the_folder_is_a_model_that_can_be_edited(first):
    out, left = first
    names = ["decoder_tokenizer.json", "encoder_tokenizer.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    session = Session(pipeline.load(out))
    session.write("the capital of France is", "Japan")
    assert session.ask("the capital of France is", max_tokens=2).fact == 1
    arrays, meta = model_file.load_exported(out / "model.safetensors")
    assert arrays["memory/log_variance"].shape == ()
    assert arrays["to_slots/kernel"].shape == (8, 2 * 12)
    assert meta["converted"] == {"from": "setting_0.ckpt", "left": left}
    assert left == [
        "model.decoder.transformer.h.*.attn.bias",
        "model.decoder.transformer.h.*.attn.masked_bias",
        "model.encoder.embeddings.position_ids",
        "model.memory.memory_logvar",
        "model.encoder.linear.weight, rows 8 to 15 (the latent's log-variance)",
    ]


def test_tokenizers_are_the_base_models_and_three_more(pair):
    _, loaded, _ = pair
    encoder, decoder = loaded.encoder_tokenizer, loaded.decoder_tokenizer
    assert encoder.encode(["the capital"], multiple=1).ids.tolist() == [[2, 4, 8, 3]]
    assert (decoder.pad, decoder.bos, decoder.eos) == (50, 51, 52)
    assert decoder.vocab_size == 53 and decoder.prefix == ()


def test_hyper_parameters_reach_the_config_out_of_a_dict_or_any_namespace(pair):
    number, loaded, _ = pair
    settings = loaded.config
    assert settings.data.episode == (7,) and settings.objective.kl == 0.25
    assert settings.memory.hyperparameters["noise"] == 1e-5
    assert settings.editing.scope_threshold == (0.95 if number == 4 else 0.9)


def test_sizes_of_the_release_are_read_off_its_shapes():
    """Larimar-1.3B: BERT-large and GPT2-large, K = 512, C = 768 (§1)."""
    layer = "model.encoder.encoder.layer.{}.intermediate.dense.weight"
    block = "model.decoder.transformer.h.{}.mlp.c_fc.weight"
    shapes = {
        "model.encoder.embeddings.word_embeddings.weight": (28996, 1024),
        "model.encoder.embeddings.position_embeddings.weight": (512, 1024),
        "model.encoder.embeddings.token_type_embeddings.weight": (2, 1024),
        **{layer.format(i): (4096, 1024) for i in range(24)},
        "model.encoder.linear.weight": (1536, 1024),
        "model.decoder.transformer.wte.weight": (50260, 1280),
        "model.decoder.transformer.wpe.weight": (1024, 1280),
        **{block.format(i): (1280, 5120) for i in range(36)},
        "model.memory.memory_mean": (512, 768),
        "model.memory.w_logvar.weight": (512, 768 + 512 * 768),
    }

    def read(name):
        raise AssertionError("shapes are enough")

    source = SimpleNamespace(path="larimar-1.3b.ckpt", shapes=lambda: shapes, read=read)
    described = ibm.describe(source, None, ibm.Assumptions())
    settings = config.parse(described.config)
    sizes = ("depth", "heads", "mlp", "max_length", "vocab_size")
    towers = settings.model.encoder.sizes, settings.model.decoder.sizes
    shown = [tuple(getattr(tower, name) for name in sizes) for tower in towers]
    assert shown == [(24, 16, 4096, 512, 28996), (36, 20, 5120, 1024, 50260)]
    assert settings.model.latent == 768 and settings.memory.hyperparameters["slots"] == 512
    shapes = {
        target: key_table._transformed(shapes[name], key_table.TRANSFORMS.get(how, how))
        for name, target, how in described.keys
        if name in shapes and name.startswith(("model.encoder.linear", "model.memory.w_logvar"))
    }
    assert shapes == {
        "to_latent.kernel": (1024, 768),
        "memory.variance_by_query": (768, 512),
        "memory.variance_by_memory": (512, 768, 512),
    }


def refused(number, tmp_path, bases, kind=WeightsError):
    """Return the error of a conversion, which leaves neither the folder nor what it would become."""
    out = tmp_path / "models" / "made"
    with pytest.raises(kind) as caught:
        converted(number, out, bases)
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return str(caught.value)


def zeros(*shape):
    return np.zeros(shape, np.float32)


NESTED = Record()
for _ in range(60):
    NESTED = (NESTED, NESTED)
ODD = {
    "ordering": NESTED,
    "beta": "much",
    "learning_rate": None,
    "episode_sizes": [3, NESTED],
    "pseudoinverse_approx_step": 0,
    "observation_noise_std": float("nan"),
    "w_logvar_setting": 10**5000,
}
BERT, GPT, LAYER = "model.encoder.", "model.decoder.transformer.", "model.encoder.encoder.layer."
# Tensors of the first checkpoint (None: gone) and hyperparameters that differ, and parts of the error.
REFUSED = {
    "problems of all parts": (
        {
            BERT + "embeddings.extra": zeros(3),
            BERT + "pooler.dense.bias": None,
            GPT + "h.1.ln_2.bias": None,
            GPT + "linear.weight": zeros(23, 8),
            "model.memory.w_logvar": zeros(4),
            BERT + "linear.weight": zeros(17, 18),
        },
        {},
        [
            "unused: model.encoder.embeddings.extra",
            "missing: encoder.pooler.bias",
            "missing: decoder.layers.mlp_norm.bias, layers [1]",
            f"misshapen: {GPT}linear.weight gives (8, 23), to_slots.kernel is (8, 24)",
            "misshapen: model.memory.w_logvar gives (4,), memory.log_variance is ()",
            f"misshapen: {BERT}linear.weight gives (18, 17), to_latent.kernel is (18, 8)",
        ],
    ),
    # Where sizes are missing, the names that differ are still in the error.
    "sizes that are missing": (
        {
            "odd": zeros(3),
            "model.memory.memory_mean": None,
            "model.memory.w_logvar": None,
            BERT + "pooler.dense.bias": None,
            GPT + "h.1.ln_2.bias": None,
            GPT + "wte.weight": None,
            GPT + "wpe.weight": zeros(12),
        },
        {},
        [
            f"misshapen: {GPT}wpe.weight (12,), not 2 axes",
            f"missing: {GPT}h.1.ln_2.bias",
            f"missing: {GPT}wte.weight",
            f"missing: {BERT}pooler.dense.bias",
            "missing: model.memory.memory_mean",
            "missing: model.memory.w_logvar",
            "unused: odd",
        ],
    ),
    # A lone name does not make a model of as many layers.
    **{
        f"a lone layer {number}": (
            {f"{LAYER}{number}.output.dense.bias": zeros(8)},
            {},
            [
                f"layers: {LAYER}{number} is the last",
                f"missing: {LAYER}{number}.output.dense.weight",
            ],
        )
        for number in (7, 1_000_000, 999_999_999)
    },
    "odd hyperparameters": ({}, ODD, [*(f"{name} is " for name in ODD), "beta is 'much'"]),
    "another way of training": (
        {"model.memory.lstm_z.weight_ih_l0": zeros(16, 8)},
        {"ordering": True, "direct_writing": False, "w_logvar_setting": 3},
        [
            "ordering is True; False is",
            "direct_writing is False; True is",
            "w_logvar_setting is 3; 0 is",
            "model.memory.lstm_z.*: the episode is ordered by an LSTM",
        ],
    ),
    "a head of its own": (
        {"model.decoder.lm_head.weight": np.ones((53, 12), np.float32)},
        {},
        ["lm_head.weight is not the embedding table"],
    ),
}


@pytest.mark.parametrize("tensors, hyper, texts", REFUSED.values(), ids=REFUSED)
def test_all_that_does_not_fit_is_one_error(tensors, hyper, texts, tmp_path, bases, monkeypatch):
    class Changed(TorchCheckpoint):
        @property
        def hyper_parameters(self):
            return {**super().hyper_parameters, **hyper}

        def shapes(self):
            shapes = super().shapes() | {n: a.shape for n, a in tensors.items() if a is not None}
            return {name: shapes[name] for name in shapes if tensors.get(name, 0) is not None}

        def read(self, name):
            return tensors[name] if name in tensors else super().read(name)

    monkeypatch.setattr(convert, "TorchCheckpoint", Changed)
    shown = refused(0, tmp_path, bases)
    assert [text for text in texts if text not in shown] == []
    assert len(shown) < 20_000
    if "unused: odd" in texts:
        assert len(shown.splitlines()) == 1 + len(texts)


def test_head_sizes_that_do_not_divide_name_their_options(tmp_path, bases):
    odd = ibm.Assumptions(decoder_head=0, rotary=5)
    with pytest.raises(WeightsError) as caught:
        converted(4, tmp_path / "made", bases, assumptions=odd)
    for text in ("18 is not a multiple of heads of 64; set --encoder-head", "set --rotary, even"):
        assert text in str(caught.value)
    assert "16 is not a multiple of heads of 0; set --decoder-head-size" in str(caught.value)


def test_tokenizers_of_other_models_are_refused(tmp_path, bases):
    shown = refused(0, tmp_path, bases[::-1])
    assert "the encoder's tokenizer has 50 tokens, its table 40 rows" in shown
    assert "the decoder's tokenizer has 43 tokens, its table 53 rows" in shown
    assert "there is no tokenizer in" in refused(0, tmp_path, [tmp_path] * 2, FileNotFoundError)


def test_a_folder_that_is_there_is_left_alone(tmp_path, bases):
    (tmp_path / "made").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        converted(0, tmp_path / "made", bases)
    with pytest.raises(FileExistsError, match="is there already"):
        convert.to_huggingface("smol", tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_own_tokenizers_are_used_or_refused(first, tmp_path):
    out = Path(shutil.copytree(first[0], tmp_path / "made"))
    settings, beside = pipeline.load(out).config, out / "tokenizer.json"

    def refuse(values, message):
        with pytest.raises(ValueError, match=message):
            vocabulary.tokenizers(config.parse(values), lambda: pytest.fail("trained"), beside)

    values = config.to_dict(settings)
    (out / "encoder_tokenizer.json").rename(out / "moved")
    refuse(values, "encoder bring no tokenizer.*NAME_tokenizer.json")
    (out / "moved").rename(out / "encoder_tokenizer.json")
    data, decoder = values["data"], values["model"]["decoder"]
    large = values | {"data": data | {"vocabulary": 300}}
    refuse(large, "data.vocabulary is 300, and both towers bring one")
    values["model"]["decoder"] = decoder | {"vocab_size": 52}
    refuse(values, "vocab_size 52: less than the 53 tokens of its tokenizer")
    values["model"]["decoder"] = dict(source="smollm2")
    refuse(values, "decoder_tokenizer.json: a tower with a source")


def same_tower(one, two):
    assert one.config == two.config
    first, second = (nnx.to_pure_dict(nnx.state(module, nnx.Param)) for module in (one, two))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def same_tokenizer(one, two):
    assert (one.bos, one.eos, one.pad) == (two.bos, two.eos, two.pad)
    texts = ["the capital of France is", "Fact 1 is new"]
    np.testing.assert_array_equal(one.encode(texts).ids, two.encode(texts).ids)
    assert one.vocab_size == two.vocab_size


def check_towers(loaded, folder):
    for name, load in (("encoder", weights.load_encoder), ("decoder", weights.load_decoder)):
        module, tokenizer = load(str(folder / name))
        same_tower(module, getattr(loaded.model, name))
        same_tokenizer(tokenizer, getattr(loaded, f"{name}_tokenizer"))


@pytest.mark.parametrize("number", [0, 4])
def test_exported_towers_come_back_bit_for_bit(number, tmp_path, bases):
    converted(number, tmp_path / "model", bases)
    convert.to_huggingface(tmp_path / "model", tmp_path / "towers")
    check_towers(pipeline.load(tmp_path / "model"), tmp_path / "towers")


def test_so_do_a_sentence_encoder_and_a_trained_vocabulary(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(pipeline, "load", lambda source: tiny)
    convert.to_huggingface("tiny", tmp_path / "towers")
    check_towers(tiny, tmp_path / "towers")
    modules = json.loads((tmp_path / "towers" / "encoder" / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]


def test_large_models_are_cut_into_parts(tmp_path):
    arrays = {f"t{i}": np.full((4, 5), i, np.float32) for i in range(5)}
    arrays["large"] = np.zeros(100, np.float32)
    export.write_tensors(tmp_path, iter(arrays.items()), limit=200)
    parts = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert parts == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert not list(tmp_path.glob("*.part"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    source = Folder(tmp_path).tensors()
    assert source.shapes().keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(source.read(name), array)


def test_a_failing_export_leaves_nothing(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(pipeline, "load", lambda source: tiny)
    monkeypatch.setattr(export, "write_tower", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert.to_huggingface("tiny", tmp_path / "towers")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_convert_and_export(tmp_path, bases, capsys, monkeypatch):
    line = ["convert", "ibm", str(GOLDEN / "setting_4.ckpt"), str(tmp_path / "model")]
    line += ["--encoder-tokenizer", str(bases[0]), "--decoder-tokenizer", str(bases[1])]
    assert cli.main(line) == 2
    assert "--encoder-head-size" in capsys.readouterr().err
    sizes = ["--encoder-head-size", "9", "--decoder-head-size", "8", "--rotary", "4"]
    assert cli.main([*line, *sizes, "--scope-threshold", "0.8"]) == 0
    shown = capsys.readouterr()
    assert "left: model.memory.memory_logvar" in shown.err
    assert f"--model {tmp_path / 'model'}" in shown.out
    assert pipeline.load(tmp_path / "model").scope_threshold == 0.8
    assert cli.main(["export", "hf", str(tmp_path / "model"), str(tmp_path / "towers")]) == 0
    assert (tmp_path / "towers" / "decoder" / "config.json").is_file()
    assert cli.main(["export", "hf", str(tmp_path / "none"), str(tmp_path / "t")]) == 2
    assert "There is no model" in capsys.readouterr().err

    class Hub:
        def create_repo(self, name, private, exist_ok):
            assert (name, private, exist_ok) == ("org/towers", True, True)

        def upload_folder(self, repo_id, folder_path):
            if not (Path(folder_path) / "encoder" / "model.safetensors").is_file():
                raise huggingface_hub.errors.LocalTokenNotFoundError("no token")
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    line = ["export", "hf", str(tmp_path / "model"), str(tmp_path / "pushed"), "--push"]
    assert cli.main([*line, "towers"]) == 2 and not (tmp_path / "pushed").exists()
    assert "write it as ORG/NAME" in capsys.readouterr().err
    assert cli.main([*line, "org/towers"]) == 0
    assert capsys.readouterr().out.endswith("https://hub/org/towers\n")
    with pytest.raises(ConnectionError, match="hf auth login"):
        export.push(tmp_path, "org/towers")
