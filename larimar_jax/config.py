"""`ml_collections` config → typed, frozen component configs, strictly.

A config file defines `get_config()` and returns an `ml_collections.ConfigDict` with the sections of
`Config` below. Every key must be there: a default that lives in code is a setting nobody sees.
"""

import dataclasses
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from larimar_jax import decoders, encoders
from larimar_jax import memory as memory_variants


class ConfigError(ValueError):
    """A config that names unknown keys, lacks keys, or holds values of the wrong type."""


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """An encoder or decoder: `source` names pretrained weights, or `sizes` one to be initialised.

    Exactly one of the two is set. In a config file the tower is written either as
    `dict(source="minilm")` or as `dict(family="bert", width=128, …)` with every size of the family.
    """

    source: str | None
    family: str | None
    sizes: Any


@dataclasses.dataclass(frozen=True)
class LexiconConfig:
    """entries: how many words, the most frequent of the corpus. gain: logits per unit of cosine.

    decay: factor on the gain from one generated token to the next.
    """

    entries: int
    gain: float
    decay: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Where encoder, memory and decoder meet (§2).

    latent: C. slots_per_layer: P, past key/value positions that a latent fills in each layer (the
    paper's is 1). tied_slots: key and value are the same vector (the paper's way). lexicon: how the
    innovation of a read enters the logits (§10); None is the paper's interface alone. dtype: the
    towers' compute dtype; parameters and memory algebra stay float32. remat: recompute layers in the
    backward pass.
    """

    encoder: TowerConfig
    decoder: TowerConfig
    latent: int
    slots_per_layer: int
    tied_slots: bool
    lexicon: LexiconConfig | None
    dtype: str
    remat: bool


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """A memory variant by name, with all of its hyperparameters except the latent size."""

    variant: str
    hyperparameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of Eq. 1's four terms (§5), β's schedule, and what the released code does differently.

    kl is the peak β; kl_cycles the number of its cycles over the run; free_bits a lower bound of the
    KL per element, in nats. count_padding averages cross-entropies over padding as well, as the
    released code does.
    """

    reconstruction: float
    autoencoding: float
    kl: float
    kl_cycles: int
    free_bits: float
    language: float
    count_padding: bool


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Corpus → episodes. episode: E facts; batch: B episodes; token lengths S and T are static.

    vocabulary: size of the byte-pair vocabulary trained on the corpus for towers without weights; 0
    when both towers bring their own tokenizer. unit: "sentence", or "chunk" for pieces that fill the
    token lengths.
    """

    corpus: str
    unit: str
    episode: int
    batch: int
    encoder_tokens: int
    decoder_tokens: int
    vocabulary: int
    seed: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. frozen: regexes on parameter paths. mesh: (data, fsdp, tensor)."""

    steps: int
    learning_rate: float
    warmup_steps: int
    decay: str
    weight_decay: float
    clip_norm: float
    frozen: tuple[str, ...]
    mesh: tuple[int, int, int]
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    keep: int
    seed: int


@dataclasses.dataclass(frozen=True)
class EditingConfig:
    """How the trained model is edited (§4, §6); nothing of it is used in training.

    ridge: λ of the streaming memory that facts are written into. scope_threshold: the least cosine
    between a query and a written prompt that lets the memory answer.
    """

    ridge: float
    scope_threshold: float


@dataclasses.dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    memory: MemoryConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainConfig
    editing: EditingConfig


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
    config = _build(Config, values, "", problems)
    problems += [] if problems else _ranges(config)
    if problems:
        raise ConfigError("The config does not fit:\n  " + "\n  ".join(problems))
    return config


# Settings that came after a model was saved, with what was computed before there was a choice.
_SINCE = {("memory", "variance"): "scalar"}


def parse_saved(values: Mapping[str, Any]) -> Config:
    """`parse` for the config inside a saved model, which may be older than a setting or two."""
    values = json.loads(json.dumps(values))
    for (section, key), before in _SINCE.items():
        if isinstance(values.get(section), dict):
            values[section].setdefault(key, before)
    return parse(values)


def _ranges(config: Config) -> list[str]:
    """What is of the right type and still makes no sense."""
    positive = {
        "model.latent": config.model.latent,
        "model.slots_per_layer": config.model.slots_per_layer,
        "data.episode": config.data.episode,
        "data.batch": config.data.batch,
        "train.steps": config.train.steps,
        "train.learning_rate": config.train.learning_rate,
        "train.log_every": config.train.log_every,
        "train.evaluate_every": config.train.evaluate_every,
        "train.checkpoint_every": config.train.checkpoint_every,
        "train.keep": config.train.keep,
        "editing.ridge": config.editing.ridge,
    }
    problems = [
        f"{name}: must be above 0, got {value}" for name, value in positive.items() if value <= 0
    ]
    weights = config.objective
    if not (weights.reconstruction or weights.autoencoding or weights.language):
        problems.append(
            "objective: all three cross-entropies have weight 0; nothing is to be learned"
        )
    slots = config.memory.hyperparameters["slots"]
    if config.model.lexicon is not None and slots < config.model.latent:
        # Only then does M₀ read a query back as itself, so that an innovation is what was written.
        problems.append(
            f"memory.slots: a lexicon needs at least model.latent ({config.model.latent}), got {slots}"
        )
    return problems


def to_dict(config: Config) -> dict[str, Any]:
    """The nested dict that `parse` accepts; what checkpoints record."""
    values = dataclasses.asdict(config)
    for name in ("encoder", "decoder"):
        tower = getattr(config.model, name)
        values["model"][name] = (
            {"source": tower.source}
            if tower.source is not None
            else {"family": tower.family, **dataclasses.asdict(tower.sizes)}
        )
    values["memory"] = {"variant": config.memory.variant, **config.memory.hyperparameters}
    return json.loads(json.dumps(values))


def make_memory(config: Config):
    """The memory variant that the config names, built with its hyperparameters."""
    variant = memory_variants.variants()[config.memory.variant]
    return variant(latent=config.model.latent, **config.memory.hyperparameters)


def _build(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if kind is TowerConfig:
        return _tower(value, path, problems)
    if kind is MemoryConfig:
        return _memory(value, path, problems)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path, problems)
    return _scalar(kind, value, path, problems)


def _dataclass(
    kind: Any, value: Any, path: str, problems: list[str], given: tuple[str, ...] = ()
) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path or 'config'}: expected a section, got {value!r}")
        return None
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in given]
    prefix = f"{path}." if path else ""
    problems += [
        f"{prefix}{key}: unknown key; known: {', '.join(names)}"
        for key in value
        if key not in names
    ]
    problems += [f"{prefix}{name}: missing" for name in names if name not in value]
    built = {
        name: _build(hints[name], value[name], prefix + name, problems)
        for name in names
        if name in value
    }
    if given:
        return built
    # With an offence somewhere nothing is built: parse raises at its end.
    return None if problems else kind(**built)


def _tower(value: Any, path: str, problems: list[str]) -> TowerConfig | None:
    if not isinstance(value, Mapping) or ("source" in value) == ("family" in value):
        problems.append(
            f"{path}: write dict(source=NAME) or dict(family=NAME, …sizes), not {value!r}"
        )
        return None
    if "source" in value:
        problems += [f"{path}.{key}: unknown key beside source" for key in value if key != "source"]
        return TowerConfig(source=value["source"], family=None, sizes=None)
    families = (encoders if path.endswith("encoder") else decoders).families()
    if value["family"] not in families:
        problems.append(
            f"{path}.family: no {value['family']!r}; known: {', '.join(sorted(families))}"
        )
        return None
    sizes = {key: size for key, size in value.items() if key != "family"}
    built = _dataclass(families[value["family"]].CONFIG, sizes, path, problems)
    return TowerConfig(source=None, family=value["family"], sizes=built)


def _memory(value: Any, path: str, problems: list[str]) -> MemoryConfig | None:
    known = memory_variants.variants()
    if not isinstance(value, Mapping) or value.get("variant") not in known:
        problems.append(f"{path}.variant: must be one of {', '.join(sorted(known))}")
        return None
    variant = known[value["variant"]]
    given = {key: setting for key, setting in value.items() if key != "variant"}
    built = _dataclass(variant, given, path, problems, given=("latent",))
    return MemoryConfig(variant=value["variant"], hyperparameters=built)


def _scalar(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # A real hyperparameter is annotated "float or a traced array"; a file gives the float.
        kind = next(
            a for a in arguments if a in (int, float, str, bool) or dataclasses.is_dataclass(a)
        )
        return _build(kind, value, path, problems)
    if origin is tuple:
        size = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, (tuple, list)) or (size is not None and len(value) != size):
            problems.append(f"{path}: expected {size or 'a list of'} values, got {value!r}")
            return None
        return tuple(
            _scalar(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)
        )
    if origin is typing.Literal:
        if value not in arguments:
            problems.append(
                f"{path}: must be one of {', '.join(map(repr, arguments))}, got {value!r}"
            )
        return value
    # An int is a valid float; a bool is a valid nothing but bool, although Python says it is an int.
    wanted = (int, float) if kind is float else kind if isinstance(kind, type) else object
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind in (int, float)):
        problems.append(f"{path}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
        return None
    return float(value) if kind is float else value
