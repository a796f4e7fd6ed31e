"""`ml_collections` config → typed, frozen component configs, strictly.

A config file defines `get_config()` and returns an `ml_collections.ConfigDict` with the sections of
`Config` below. Every key must be there: a default that lives in code is a setting nobody sees.
"""

import dataclasses
import importlib.util
import json
import pathlib
import re
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from larimar_jax import decoders, encoders, strict
from larimar_jax import memory as memory_variants
from larimar_jax.settings import Config, MemoryConfig, TowerConfig


class ConfigError(ValueError):
    """A config that names unknown keys, lacks keys, or holds values of the wrong type."""


def load(source: str | pathlib.Path | ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Reads a config file (or takes a ConfigDict) and returns it typed.

    Raises:
      ConfigError: naming at once every unknown key, missing key and value of a wrong type.
    """
    return parse(load_dict(source))


def load_dict(
    source: str | pathlib.Path | ml_collections.ConfigDict | Mapping[str, Any],
) -> dict[str, Any]:
    """The nested plain dict behind a config file, a ConfigDict, or a mapping."""
    if isinstance(source, ml_collections.ConfigDict):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(source)
    path = pathlib.Path(source)
    if not path.is_file():
        raise ConfigError(
            f"There is no config file at {path}. Give the path of a Python file that defines "
            "get_config(), such as configs/tiny.py."
        )
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(
            f"{path} defines no get_config(). A config file returns its ConfigDict from it."
        )
    return module.get_config().to_dict()


def override(values: Mapping[str, Any], assignments: typing.Sequence[str]) -> dict[str, Any]:
    """Applies `section.key=value` assignments (value as JSON, else a string) to a nested dict.

    Raises:
      ConfigError: where the key does not exist; an override never creates one.
    """
    changed = json.loads(json.dumps(values))
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        *parents, leaf = path.split(".")
        section = changed
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not separator or not isinstance(section, dict) or leaf not in section:
            raise ConfigError(
                f"The override {assignment!r} names no setting of this config. Write it as "
                "section.key=value, for example train.steps=100."
            )
        try:
            section[leaf] = json.loads(text)
        except json.JSONDecodeError:
            section[leaf] = text
    return changed


def parse(values: Mapping[str, Any]) -> Config:
    """Nested dict → `Config`. Raises ConfigError with every offence at once."""
    problems: list[str] = []
    config = strict.build(Config, values, "", problems, _SPECIAL)
    problems += [] if problems else _ranges(config)
    if problems:
        raise ConfigError("The config does not fit:\n  " + "\n  ".join(problems))
    return config


def _ranges(config: Config) -> list[str]:
    """What is of the right type and still makes no sense."""
    positive = {
        "model.latent": config.model.latent,
        "model.slots_per_layer": config.model.slots_per_layer,
        "data.episode": min(config.data.episode, default=0),
        "data.batch": config.data.batch,
        "train.steps": config.train.steps,
        "train.learning_rate": config.train.learning_rate,
        "train.accumulate": config.train.accumulate,
        "train.log_every": config.train.log_every,
        "train.evaluate_every": config.train.evaluate_every,
        "train.checkpoint_every": config.train.checkpoint_every,
        "train.keep": config.train.keep,
        "editing.ridge": config.editing.ridge,
    }
    problems = [
        f"{name}: must be above 0, got {value}" for name, value in positive.items() if value <= 0
    ]
    least = {
        "data.workers": config.data.workers,
        "train.weight_decay": config.train.weight_decay,
        "train.clip_norm": config.train.clip_norm,
        "train.ema": config.train.ema,
        "train.spike": config.train.spike,
        "train.edits": config.train.edits,
        "train.stall": config.train.stall,
    }
    problems += [
        f"{name}: must not be below 0, got {value}" for name, value in least.items() if value < 0
    ]
    if config.train.ema >= 1:
        problems.append(f"train.ema: must be below 1, got {config.train.ema}; 0.999 is usual")
    batch, parts = config.data.batch, config.train.accumulate
    if parts > 0 and batch % parts:
        problems.append(f"train.accumulate: {parts} does not divide data.batch ({batch})")
    if config.model.lora is not None:
        if config.model.lora.rank < 1:
            problems.append(f"model.lora.rank: must be above 0, got {config.model.lora.rank}")
        problems += _regex("model.lora.modules", config.model.lora.modules)
    key_features, answer_code = config.editing.key_features, config.editing.answer_code
    if key_features is not None:
        problems += [
            f"editing.key_features.{name}: must be above 0, got {value}"
            for name, value in dataclasses.asdict(key_features).items()
            if value <= 0
        ]
    if answer_code is not None:
        if answer_code.positions < 1:
            problems.append(f"editing.answer_code.positions: must be above 0, got {answer_code.positions}")
        if answer_code.width < 32 or answer_code.width % 32:
            problems.append(
                f"editing.answer_code.width: must be a multiple of 32, got {answer_code.width}; 96 is usual"
            )
        if answer_code.limit <= 0:
            problems.append(f"editing.answer_code.limit: must be above 0, got {answer_code.limit}")
    patterns = {"train.frozen": config.train.frozen}
    if config.train.start_from is not None:
        patterns["train.start_from.parameters"] = config.train.start_from.parameters
    for name, regexes in patterns.items():
        problems += [problem for regex in regexes for problem in _regex(name, regex)]
    weights = config.objective
    if not (weights.reconstruction or weights.autoencoding or weights.language):
        problems.append(
            "objective: all three cross-entropies have weight 0; nothing is to be learned"
        )
    return problems


def _regex(name: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name}: {pattern!r} is no regular expression ({error})"]
    return []


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict that `parse` accepts; what checkpoints record."""
    values = dataclasses.asdict(config)
    for name in ("encoder", "decoder"):
        tower = getattr(config.model, name)
        values["model"][name] = {
            **({} if tower.source is None else {"source": tower.source}),
            **({} if tower.family is None else {"family": tower.family}),
            **({} if tower.sizes is None else dataclasses.asdict(tower.sizes)),
        }
    values["memory"] = {"variant": config.memory.variant, **config.memory.hyperparameters}
    return json.loads(json.dumps(values))


def make_memory(config: Config):
    """The memory variant that the config names, built with its hyperparameters."""
    variant = memory_variants.variants()[config.memory.variant]
    return variant(latent=config.model.latent, **config.memory.hyperparameters)


def _tower(value: Any, path: str, problems: list[str]) -> TowerConfig | None:
    if not isinstance(value, Mapping) or not {"source", "family"} & set(value):
        problems.append(
            f"{path}: write dict(source=NAME), dict(family=NAME, …sizes), or both, not {value!r}"
        )
        return None
    source = value.get("source")
    if "source" in value and not isinstance(source, str):
        problems.append(f"{path}.source: expected str, got {source!r}")
    if "family" not in value:
        problems += [f"{path}.{key}: unknown key beside source" for key in value if key != "source"]
        return TowerConfig(source=source, family=None, sizes=None)
    families = (encoders if path.endswith("encoder") else decoders).families()
    if value["family"] not in families:
        problems.append(
            f"{path}.family: no {value['family']!r}; known: {', '.join(sorted(families))}"
        )
        return None
    sizes = {key: size for key, size in value.items() if key not in ("source", "family")}
    built = strict.section(families[value["family"]].CONFIG, sizes, path, problems, {})
    return TowerConfig(source=source, family=value["family"], sizes=built)


def _memory(value: Any, path: str, problems: list[str]) -> MemoryConfig | None:
    known = memory_variants.variants()
    if not isinstance(value, Mapping) or value.get("variant") not in known:
        problems.append(f"{path}.variant: must be one of {', '.join(sorted(known))}")
        return None
    variant = known[value["variant"]]
    given = {key: setting for key, setting in value.items() if key != "variant"}
    built = strict.section(variant, given, path, problems, {}, given=("latent",))
    return MemoryConfig(variant=value["variant"], hyperparameters=built)


_SPECIAL = {TowerConfig: _tower, MemoryConfig: _memory}
