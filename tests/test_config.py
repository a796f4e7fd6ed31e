"""Configs are strict: every offence is named, all at once."""

import pathlib

import pytest
from conftest import tiny_config

from larimar_jax import config
from larimar_jax.bench import reproduce, sweep

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def test_a_config_survives_the_trip_to_a_dict_and_back():
    parsed = config.parse(tiny_config())
    assert config.parse(config.to_dict(parsed)) == parsed
    assert parsed.train.mesh == (1, 1, 1)
    assert parsed.memory.variant == "direct"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path):
    values = config.load_dict(path)
    if path.stem.startswith("bench_"):
        values["data"] = dict.fromkeys(values["data"], "file")  # theirs to give, who has them
    parse = {"sweep": sweep.parse, "bench": reproduce.parse}
    parsed = parse.get(path.stem.partition("_")[0], config.parse)(values)
    assert parsed.name == path.stem


def test_all_offences_are_named_at_once():
    values = tiny_config()
    values["train"]["stepz"] = values["train"].pop("steps")
    values["data"]["batch"] = "three"
    values["model"]["decoder"]["family"] = "gpt5"
    values["memory"]["ridge"] = 1.0
    values["memory"]["initial"] = "ones"
    with pytest.raises(config.ConfigError) as error:
        config.parse(values)
    for words in (
        "train.stepz: unknown key",
        "train.steps: missing",
        "data.batch: expected int, got 'three'",
        "no 'gpt5'",
        "memory.ridge: unknown key",
        "memory.initial: must be one of",
    ):
        assert words in str(error.value)


def test_what_makes_no_sense_is_refused():
    values = tiny_config()
    values["editing"]["ridge"] = 0.0
    values["data"]["batch"] = 0
    with pytest.raises(config.ConfigError) as error:
        config.parse(values)
    for words in (
        "editing.ridge: must be above 0",
        "data.batch: must be above 0",
    ):
        assert words in str(error.value)


def test_a_bool_is_no_number():
    values = tiny_config()
    values["train"]["steps"] = True
    with pytest.raises(config.ConfigError, match="train.steps: expected int, got True"):
        config.parse(values)


def test_overrides_change_what_exists_and_nothing_else():
    values = config.override(
        tiny_config(), ["train.steps=7", "data.unit=chunk", "train.mesh=[2,1,1]"]
    )
    parsed = config.parse(values)
    assert (parsed.train.steps, parsed.data.unit, parsed.train.mesh) == (7, "chunk", (2, 1, 1))
    assert tiny_config()["train"]["steps"] == 4
    for wrong in ("train.stepz=1", "steps=1", "train.steps"):
        with pytest.raises(config.ConfigError, match="names no setting"):
            config.override(tiny_config(), [wrong])


def test_a_file_that_is_missing_or_says_nothing(tmp_path):
    with pytest.raises(config.ConfigError, match="no config file"):
        config.load(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(config.ConfigError, match="defines no get_config"):
        config.load(tmp_path / "empty.py")
