"""Settings: one default each, refused with everything that is wrong at once, and the cache folder."""

import json
import os
import pathlib
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import tiny_config

from larimar_jax import config, schema
from larimar_jax.bench import reproduce, sweep

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
RESOLVED = json.loads((ROOT / "tests/golden/resolved_configs.json").read_text())


def test_a_config_survives_the_trip_to_a_dict_and_back():
    parsed = config.parse(tiny_config())
    assert config.parse(json.loads(json.dumps(config.to_dict(parsed)))) == parsed
    assert parsed.train.mesh == (1, 1, 1) and parsed.train.layout == "zero3"
    memory = parsed.memory
    assert memory.variant == "direct" and memory.hyperparameters["query"] == "posterior"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_resolve_to_what_they_are_recorded_as(path):
    names = runpy.run_path(str(path))
    if "get_variants" in names:
        for overrides in names["get_variants"]().values():
            config.load(ROOT / "configs/world.py", overrides)
        return
    values = config.load_dict(path)
    kind = path.stem.partition("_")[0]
    if kind == "bench":
        values["data"] = dict.fromkeys(values["data"], "file")  # a user's
        assert reproduce.parse(values)[0].name == path.stem
    elif kind == "sweep":
        schema.from_dict(sweep.Sweep, values | {"zsre": "file"})  # a user's
    else:
        parsed = config.load(path)
        assert json.loads(json.dumps(config.to_dict(parsed))) == RESOLVED[path.stem]
        assert parsed.name == path.stem


OFFENCES = {
    "objektive.kl=1": "objektive: unknown key; did you mean objective? known: name, model,",
    "steps=1": "steps: unknown key; known: name, model, memory, train,",
    "train.stepz=3": "train.stepz: unknown key; did you mean steps? known: steps, optimizer,",
    "train.ema=1.0": "train.ema: must be at least 0 and below 1",
    'train.frozen=["("]': "train.frozen[0]: '(' is no regular expression",
    "train.clip_norm=NaN": "train.clip_norm: must be finite",
    "train.start_from.path=x": "train.start_from.parameters: missing",
    "train.keep=True": "train.keep: expected int, got True",
    "data.batch=three": "data.batch: expected int, got 'three'",
    "data.episode=[]": "data.episode: needs at least one",
    "data.workers=-1": "data.workers: must be at least 0, got -1",
    "model.decoder.family=gpt3": "model.decoder.family: no 'gpt3'; did you mean gpt",
    "model.encoder.heads=3": "model.encoder: width 16 is not a multiple of 3 heads",
    "memory.ridge=1.0": "memory.ridge: unknown key",
    "memory.initial=ones": "memory.initial: must be one of 'identity', 'normal'",
    "memory.addressing=gausian": "memory.addressing.kind: no 'gausian'; did you mean gaussian?",
    "editing.ridge=0": "editing.ridge: must be above 0",
    "editing.answer_code.width=100": "editing.answer_code.width: must be a multiple of 32",
}


def test_all_offences_are_named_at_once_with_the_likely_spelling():
    values = tiny_config()
    del values["train"]["steps"]
    with pytest.raises(config.ConfigError) as error:
        config.load(values, list(OFFENCES))
    for words in (*OFFENCES.values(), "train.steps: missing"):
        assert words in str(error.value)
    for wrong in ("train.steps", "name.of.it=1"):
        with pytest.raises(config.ConfigError, match="Write it as section.key=value"):
            config.load(tiny_config(), [wrong])


def test_settings_that_contradict_each_other_are_refused():
    weights = dict(reconstruction=0.0, autoencoding=0.0, language=0.0)
    values = tiny_config() | dict(objective=weights)
    with pytest.raises(config.ConfigError) as error:
        config.load(values, ["train.accumulate=3"])
    assert "accumulate: 3 does not divide" in str(error.value)
    assert "nothing is learned" in str(error.value)


OVERRIDES = {
    "model.tied_slots=True": True,
    "model.tied_slots=true": True,
    "model.tied_slots=FALSE": False,
    "train.best=None": None,
    "memory.variant=none": "none",
    "train.best=null": None,
    "train.steps=7": 7,
    "train.learning_rate=1e-3": 1e-3,
    "train.mesh=[2,1,1]": (2, 1, 1),
    "train.mesh=(1, -1, 1)": (1, -1, 1),
    'train.frozen=["^a", "b"]': ("^a", "b"),
    "train.frozen=['^a']": ("^a",),
    "data.unit=chunk": "chunk",
    'data.unit="chunk"': "chunk",
    "data.corpus=hf:a,b#c=d": "hf:a,b#c=d",
    "model.lora.rank=4": 4,
}


@pytest.mark.parametrize("text, value", OVERRIDES.items())
def test_an_override_is_json_a_python_literal_or_a_text(text, value):
    lora = ["model.lora.modules=query"] if "lora" in text else []
    result = config.load(tiny_config(), [text, *lora])
    for name in text.partition("=")[0].split("."):
        result = getattr(result, name)
    assert result == value and type(result) is type(value)
    assert config.parse(tiny_config()).train.steps == 4


def test_a_config_is_read_from_any_folder_and_a_file_without_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert config.load("configs/tiny.py").name == "tiny"
    with pytest.raises(config.ConfigError, match="no config file"):
        config.load(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(config.ConfigError, match="defines no get_config"):
        config.load("empty.py")


# Programs of a shell's commands are compiled once, and never at the price of a command.

_SCRIPT = """
import jax, jax.numpy as jnp
from larimar_jax import config
config.PROGRAMS_SECONDS = 0.0
folder, hits = config.cache_programs(), []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(float(jax.jit(lambda x: jnp.sum(jnp.sin(x) * 3))(jnp.arange(4.0))))
print(sum(name.endswith("cache_hits") for name in hits), folder)
"""


def run_script(cache):
    """Return the number that a fresh process computes, its cache hits, and its folder of programs."""
    jax_own = ("JAX_COMPILATION", "JAX_PERSISTENT")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(jax_own)}
    environment = {**clean, "LARIMAR_CACHE": str(cache)}
    line = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    value, hits, folder = done.stdout.split()
    return value, int(hits), folder


def test_the_next_process_reads_what_the_last_compiled_unless_it_is_damaged(tmp_path):
    value, hits, folder = run_script(tmp_path)
    assert hits == 0 and folder.startswith(str(tmp_path / "programs"))
    again, hits, _ = run_script(tmp_path)
    assert again == value and hits >= 1
    files = list((tmp_path / "programs").rglob("*-cache"))
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    assert files and run_script(tmp_path)[0] == value


def test_without_a_writable_folder_or_with_jaxs_own_nothing_is_cached(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, own in ((tmp_path / "file", None), (tmp_path, "its own")):
        settings = SimpleNamespace(jax_compilation_cache_dir=own, update=pytest.fail)
        monkeypatch.setattr(config, "jax", SimpleNamespace(config=settings))
        monkeypatch.setenv("LARIMAR_CACHE", str(folder))
        assert config.cache_programs() is None
    assert not (tmp_path / "programs").exists()


def test_another_cpu_has_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LARIMAR_CACHE", str(tmp_path))
    here = config._processor()
    assert config.cache_folder() == tmp_path and here == config._processor()
    monkeypatch.setattr(config.platform, "machine", lambda: "other")
    assert config._processor() != here
