"""Ids of the Hugging Face hub: one format is fetched, and what was fetched is found again."""

import json
import pathlib
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from larimar_jax import weights
from larimar_jax.weights import hub

GOLDEN = pathlib.Path(__file__).parent / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BEST = [
    (["model.safetensors", "pytorch_model.bin", "model-1.safetensors"], {"model.safetensors"}),
    (
        ["model.safetensors.index.json", "pytorch_model.bin", "model.safetensors"],
        {"model.safetensors"},
    ),
    (
        ["model.safetensors.index.json", "model-1-of-2.safetensors", "pytorch_model.bin"],
        {"model.safetensors.index.json", "model-*.safetensors"},
    ),
    (
        ["pytorch_model.bin", "adapter_model.safetensors", "onnx/model.safetensors"],
        {"pytorch_model.bin"},
    ),
    (
        ["pytorch_model.bin.index.json", "flax_model.msgpack"],
        {"pytorch_model.bin.index.json", "pytorch_model-*.bin"},
    ),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's own layout."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def snapshot(cache, names, tree=()):
    """Files of the tiny GPT-2 as the cache keeps org/tiny; tree: all that the hub has of it."""
    repo = cache / "models--org--tiny"
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name in names:
        shutil.copy(GOLDEN / "tiny_gpt2" / name, folder)
    if tree:
        (repo / "trees").mkdir()
        said = {name: {"size": 1, "blob_id": "0"} for name in tree}
        (repo / "trees" / f"{COMMIT}.json").write_text(
            json.dumps({"format_version": 1, "files": said})
        )
    return folder


@pytest.fixture
def a_hub(monkeypatch, tmp_path):
    """A hub with org/tiny, whose files a test sets; what is fetched from it is recorded."""
    state = SimpleNamespace(files=["config.json"], asked=[], fetched=[])

    def info(self, name, revision=None):
        state.asked.append((name, revision))
        if name != "org/tiny":
            raise errors.RepositoryNotFoundError("404", response=_response(404))
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in state.files])

    def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        assert not local_files_only
        state.fetched.append((repo_id, revision, set(allow_patterns) - set(hub._SETTINGS)))
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
    assert weights.locate("org/tiny@v2") == tmp_path
    assert a_hub.fetched == [("org/tiny", "v2", wanted)]


def test_a_model_without_weights_that_are_read(a_hub):
    a_hub.files += ["tiny.Q4_0.gguf", "tf_model.h5"]
    with pytest.raises(FileNotFoundError, match="has none of model.safetensors.*GGUF files"):
        hub.fetch("org/tiny")
    assert a_hub.fetched == []


def test_a_model_that_is_not_on_the_hub(a_hub):
    with pytest.raises(FileNotFoundError, match="no file or folder 'org/other'.*no such model.*login"):
        weights.load_decoder("org/other")


def test_the_hub_is_asked_once_for_a_model(a_hub, monkeypatch):
    a_hub.files += ["model.safetensors"]
    tiny = str(GOLDEN / "tiny_gpt2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: tiny)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        weights.load_decoder("org/tiny")
    assert a_hub.asked == [("org/tiny", None)]


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
    folder = snapshot(
        cache,
        ["config.json", "model.safetensors"],
        tree=["config.json", "model.safetensors", "pytorch_model.bin", "README.md"],
    )
    assert hub.fetch("org/tiny") == folder


def test_without_a_network_or_a_cache(cache, monkeypatch):
    unreachable(monkeypatch, errors.HTTPError("no route"))
    with pytest.raises(FileNotFoundError, match=r"is not in the.*\(HTTPError\).*`hf download org/tiny`"):
        hub.fetch("org/tiny")
    with pytest.raises(FileNotFoundError, match="`hf download org/tiny --revision v2`"):
        hub.fetch("org/tiny@v2")


@pytest.mark.parametrize(
    ("names", "tree"), [(["config.json"], ()), (["model.safetensors"], ["config.json"])]
)
def test_a_cache_that_holds_a_part(cache, monkeypatch, names, tree):
    """As a program leaves it that wanted the config alone, or a download that was broken off."""
    unreachable(monkeypatch, errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1"))
    snapshot(cache, names, tree)
    with pytest.raises(FileNotFoundError, match="in the hub's cache.*hf download org/tiny"):
        hub.fetch("org/tiny")


def test_what_is_written_as_an_id():
    for source in ("org/name", "org/name@main", "org/name@refs/pr/1", "0rg_/n.a-m_e"):
        assert hub.is_id(source), source
    for source in (
        *("name", "/a/b", "a/b/c", "./a", "../a", "a/", "a b/c", "a/b.", "a/b-", "a/b..c", "a/b--c"),
        *("a/b@", "ä/b", "a/" + "b" * 96, "a/b\n", ""),
    ):
        assert not hub.is_id(source), source


def test_what_is_nowhere():
    with pytest.raises(FileNotFoundError, match="neither a packaged name.*nor a folder.*hub id"):
        weights.load_decoder("gpt5")
