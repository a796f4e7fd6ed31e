"""Folders laid out as on Hugging Face, and ids of its hub."""

import json
import pathlib
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants, errors

from larimar_jax import weights
from larimar_jax.weights import WeightsError, huggingface
from larimar_jax.weights.huggingface import Folder
from larimar_jax.weights.safetensors_files import Safetensors

GOLDEN = pathlib.Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tiny_folder(tmp_path):
    """A tiny GPT-2 with a tokenizer, as fetched from the hub."""
    path = tmp_path / "tiny"
    shutil.copytree(GOLDEN / "tiny_gpt2", path)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDEN / "tokenizers" / "gpt2" / file, path)
    resize(path, len(json.loads((path / "vocab.json").read_text())))
    return path


def resize(path, rows):
    """Gives a folder an embedding table of so many rows."""
    source = Safetensors(path / "model.safetensors")
    tensors = {name: source.read(name) for name in source.shapes()}
    table = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = np.resize(table, (rows, table.shape[1]))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    change(path, vocab_size=rows)


def change(path, **settings):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))


def test_a_gpt2_gets_its_special_tokens(tiny_folder):
    model, tokenizer = weights.load_decoder(str(tiny_folder))
    size = len(json.loads((tiny_folder / "vocab.json").read_text()))
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (size, size + 1, size + 2)
    assert model.config.vocab_size == model.embeddings.shape[0] == size + 3
    assert weights.load_tokenizer(str(tiny_folder)).hash == tokenizer.hash
    (tiny_folder / "1_Pooling").mkdir()
    (tiny_folder / "1_Pooling" / "config.json").write_text("null")
    assert weights.load_decoder(str(tiny_folder))


def test_a_gptj_whose_ids_go_up_to_its_tables_end_gets_tokens_that_it_does_not_use(tiny_folder):
    folder = tiny_folder.parent / "gptj"
    shutil.copytree(GOLDEN / "tiny_gptj", folder)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(tiny_folder / file, folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    spare = {f"<|extratoken_{i + 1}|>": size + i for i in range(5)}
    (folder / "added_tokens.json").write_text(json.dumps(spare))
    source = Safetensors(folder / "model.safetensors")
    tensors = {name: source.read(name) for name in source.shapes()}
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
        tensors[name] = np.resize(tensors[name], (size + 5, *tensors[name].shape[1:]))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    change(folder, vocab_size=size + 5)
    model, tokenizer = weights.load_decoder(str(folder))
    assert model.config.vocab_size == tokenizer.vocab_size == size + 5
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (size, size + 1, size + 2)
    framed = [tokenizer.bos, *tokenizer.ids("a fox"), tokenizer.eos, tokenizer.pad]
    assert tokenizer.decode(framed) == "a fox"


def test_only_tokens_of_ours_become_new_rows(tiny_folder):
    rows = len(json.loads((tiny_folder / "vocab.json").read_text()))
    resize(tiny_folder, rows - 1)
    with pytest.raises(WeightsError, match="has ids up to .* of different models"):
        weights.load_decoder(str(tiny_folder))
    llama = tiny_folder.parent / "llama"
    shutil.copytree(GOLDEN / "tiny_llama", llama)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizers" / "gpt2" / file, llama)
    with pytest.raises(WeightsError, match="tokenizer has ids up to 399 and the embedding table"):
        weights.load_decoder(str(llama))


def test_a_table_needs_a_row_for_the_largest_id(tiny_folder):
    vocabulary = json.loads((tiny_folder / "vocab.json").read_text())
    vocabulary[max(vocabulary, key=vocabulary.get)] = 900  # and none between
    (tiny_folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert Folder(tiny_folder).tokenizer().vocab_size >= 901
    with pytest.raises(WeightsError, match="has ids up to 90"):
        weights.load_decoder(str(tiny_folder))


def test_weights_are_looked_for_in_order(tiny_folder):
    (tiny_folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert isinstance(Folder(tiny_folder).tensors(), Safetensors)
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no torch file"):
        Folder(tiny_folder).tensors()
    (tiny_folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of model.safetensors, .*pytorch_model.bin"):
        Folder(tiny_folder).tensors()


def test_a_folder_with_torch_files(tiny_folder):
    (tiny_folder / "model.safetensors").unlink()
    shutil.copy(GOLDEN / "torch" / "plain.bin", tiny_folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="unused: whole.*\n(.*\n)*.*missing: word.embedding"):
        weights.load_decoder(str(tiny_folder))
    (tiny_folder / "pytorch_model.bin").rename(tiny_folder / "part.bin")
    names = np.load(GOLDEN / "torch" / "expected.npz").files
    index = {"weight_map": dict.fromkeys(names, "part.bin")}
    (tiny_folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert Folder(tiny_folder).tensors().read("part").shape == (2, 4)


ODD = {
    **dict(n_embd=("32", -32, 0), n_head=(0,), n_layer=(1 << 40, 2.5, None), n_positions=([64],)),
    **dict(vocab_size=({}, 1 << 40), num_labels=(1 << 40,), layer_norm_epsilon=("small",)),
    **dict(activation_function=("relu",), model_type=(7, "mamba", "no-such-model")),
}


@pytest.mark.parametrize(("name", "value"), [(n, odd) for n in ODD for odd in ODD[n]])
def test_settings_that_no_model_has(tiny_folder, name, value):
    change(tiny_folder, **{name: value})
    with pytest.raises(WeightsError):
        weights.load_decoder(str(tiny_folder))


def test_a_folder_tells_its_number_of_heads(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    config.pop("n_head")
    (tiny_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="does not say its num_attention_heads"):
        weights.load_decoder(str(tiny_folder))


def test_a_sentencepiece_model_is_told_how_to_be_saved(tiny_folder):
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tiny_folder / file).unlink(missing_ok=True)
    (tiny_folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="SentencePiece's; save it once with transformers"):
        weights.load_tokenizer(str(tiny_folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "a list where a dict belongs"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[" * 100000, "is not JSON"),
        ("config.json", "{}", "model_type"),
        ("tokenizer_config.json", "3", "a int where a dict belongs"),
        ("tokenizer_config.json", '{"bos_token": 3}', "the tokenizer of .*damaged"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "the tokenizer of .*damaged"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', None),
        ("tokenizer.json", "{}", "damaged or of another format"),
        ("vocab.json", "[" * 10**5, "damaged or of another format"),
        ("vocab.json", '{"a": -1}', "damaged or of another format"),
        ("merges.txt", "a\n", "damaged or of another format"),
        ("1_Pooling/config.json", '{"pooling_mode_cls_token": true}', "pools by"),
    ],
)
def test_files_with_other_content(tiny_folder, file, content, message):
    (tiny_folder / "1_Pooling").mkdir()
    (tiny_folder / file).write_text(content)
    if message is None:  # code that the folder names is never loaded
        assert weights.load_decoder(str(tiny_folder))
        return
    with pytest.raises(WeightsError, match=message):
        weights.load_decoder(str(tiny_folder))


def test_a_folder_without_its_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        weights.load_encoder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no tokenizer in .*no tokenizer.json"):
        Folder(tmp_path).tokenizer()


def test_steps_that_are_not_computed_are_an_error(tmp_path):
    shutil.copytree(GOLDEN / "tiny_bert_mean", tmp_path, dirs_exist_ok=True)
    assert Folder(tmp_path).pooling() == {"pooling": "mean", "normalize": True}
    steps = json.loads((tmp_path / "modules.json").read_text())
    steps.insert(2, {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    for content, message in ((steps, "steps Dense, which are not computed"), ({}, "a dict where")):
        (tmp_path / "modules.json").write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=message):
            Folder(tmp_path).pooling()


def test_towers_are_told_apart_without_being_read(tiny_folder):
    """By file names, sizes and safetensors headers: a GPT-J has 24 GB."""
    before = weights.fingerprint(str(tiny_folder))
    assert weights.fingerprint(str(tiny_folder)) == before
    moved = tiny_folder.rename(tiny_folder.with_name("moved"))
    assert weights.fingerprint(str(moved)) == before
    file = moved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    assert weights.fingerprint(str(moved)) != before
    file.write_bytes(content)
    (moved / "notes.txt").write_text("new")
    assert weights.fingerprint(str(moved)) != before
    assert len(weights.fingerprint("minilm")) == 64


# The hub ---------------------------------------------------------------------------------------

ONE, SHARDED = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_SHARDED = "pytorch_model.bin", "pytorch_model.bin.index.json"
BEST = [
    ([ONE, TORCH, "model-1.safetensors"], {ONE}),
    ([SHARDED, TORCH, ONE], {ONE}),
    ([SHARDED, "model-1-of-2.safetensors", TORCH], {SHARDED, "model-*.safetensors"}),
    ([TORCH, "adapter_model.safetensors", "onnx/model.safetensors"], {TORCH}),
    ([TORCH_SHARDED, "flax_model.msgpack"], {TORCH_SHARDED, "pytorch_model-*.bin"}),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's own layout."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def snapshot(cache, names, tree=()):
    """Files of the tiny GPT-2 as the cache has org/tiny; tree: all that the hub has of it."""
    repo = cache / "models--org--tiny"
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name in names:
        shutil.copy(GOLDEN / "tiny_gpt2" / name, folder)
    if tree:
        (repo / "trees").mkdir()
        files = {name: {"size": 1, "blob_id": "0"} for name in tree}
        content = {"format_version": 1, "files": files}
        (repo / "trees" / f"{COMMIT}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def a_hub(monkeypatch, tmp_path):
    """A hub with org/tiny, whose files a test sets; requests and downloads are recorded."""
    state = SimpleNamespace(files=["config.json"], requests=[], downloads=[])

    def info(self, name, revision=None):
        state.requests.append((name, revision))
        if name != "org/tiny":
            raise errors.RepositoryNotFoundError("404", response=_response(404))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in state.files])

    def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        assert not local_files_only
        state.downloads.append((repo_id, revision, set(allow_patterns) - set(huggingface.SETTINGS)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return state


def _response(status):
    return SimpleNamespace(headers={}, status_code=status, request=None, url="")


def unreachable(monkeypatch, error):
    def info(self, name, revision=None):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)


@pytest.mark.parametrize(("files", "wanted"), BEST)
def test_one_format_is_fetched(a_hub, tmp_path, files, wanted):
    a_hub.files += files
    assert weights.open_checkpoint("org/tiny@v2").path == tmp_path
    assert a_hub.downloads == [("org/tiny", "v2", wanted)]


def test_models_that_are_not_on_the_hub_or_of_no_format(a_hub):
    a_hub.files += ["tiny.Q4_0.gguf", "tf_model.h5"]
    with pytest.raises(FileNotFoundError, match="has none of model.safetensors.*GGUF files"):
        huggingface.fetch("org/tiny")
    assert a_hub.downloads == []
    with pytest.raises(FileNotFoundError, match="file or folder 'org/other'.*no such model.*login"):
        weights.load_decoder("org/other")


def test_the_hub_is_asked_once_for_a_model(a_hub, monkeypatch):
    a_hub.files += ["model.safetensors"]
    tiny = str(GOLDEN / "tiny_gpt2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: tiny)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        weights.load_decoder("org/tiny")
    assert a_hub.requests == [("org/tiny", None)]


@pytest.mark.parametrize(
    "error",
    [
        errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1"),
        errors.HTTPError("no route"),
        errors.HfHubHTTPError("down", response=_response(503)),
    ],
)
def test_without_a_network_the_cache_is_used(cache, monkeypatch, error):
    unreachable(monkeypatch, error)
    kind = type(error).__name__
    with pytest.raises(FileNotFoundError, match=rf"({kind}).*`hf download org/tiny`"):
        huggingface.fetch("org/tiny")
    with pytest.raises(FileNotFoundError, match="is not in .*`hf download org/tiny --revision v2`"):
        huggingface.fetch("org/tiny@v2")
    files = ["config.json", "model.safetensors"]
    folder = snapshot(cache, files, tree=[*files, "pytorch_model.bin", "README.md"])
    assert huggingface.fetch("org/tiny") == folder


@pytest.mark.parametrize(
    ("names", "tree"), [(["config.json"], ()), (["model.safetensors"], ["config.json"])]
)
def test_a_cache_that_holds_a_part(cache, monkeypatch, names, tree):
    """As a program leaves it that wanted the config alone, or a download that was broken off."""
    unreachable(monkeypatch, errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1"))
    snapshot(cache, names, tree)
    with pytest.raises(FileNotFoundError, match="in the hub's cache.*hf download org/tiny"):
        huggingface.fetch("org/tiny")


def test_what_is_written_as_an_id():
    for source in ("org/name", "org/name@main", "org/name@refs/pr/1", "0rg_/n.a-m_e"):
        assert huggingface.is_id(source), source
    wrong = "name /a/b a/b/c ./a ../a a/ a/b. a/b- a/b..c a/b--c a/b@ ä/b".split()
    for source in (*wrong, "a b/c", "a/" + "b" * 96, "a/b\n", ""):
        assert not huggingface.is_id(source), source
