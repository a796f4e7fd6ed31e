"""Settings as frozen dataclasses: what each means, its one default, and how files and `--set` give it.

A config file defines `get_config()`, which returns an `ml_collections.ConfigDict` with sections as in
`Config` below, and states what differs from the defaults. An unknown key or a wrong value is an error;
one error names all of them. `to_dict` is the resolved config, which every run and model file records.
"""

import dataclasses
import hashlib
import os
import platform
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import ml_collections

from larimar_jax import decoders, encoders, schema
from larimar_jax import memory as memories
from larimar_jax.decoders.reader import ReaderConfig
from larimar_jax.layers import Remat
from larimar_jax.lora import LoraConfig
from larimar_jax.memory import addressing
from larimar_jax.schema import ConfigError, Count, Fraction, Natural, NonNegative, Positive, Regex

# Bytes of compiled programs on disk, and seconds to compile from which one is kept there.
PROGRAMS_BYTES, PROGRAMS_SECONDS = 256 << 20, 0.1


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """An encoder or decoder: `source` names pretrained weights, `family` and `sizes` an architecture.

    A config file writes `dict(source="minilm")`, or `dict(family="bert", width=128, …)`, which is then
    initialised, or both: loaded weights must be of these sizes, and a run can be planned without them.
    """

    source: str | None = None
    family: str | None = None
    sizes: Any = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Where encoder, memory and decoder meet (§2)."""

    encoder: TowerConfig
    decoder: TowerConfig
    latent: Count = 768  # C, the size of an encoding in the memory
    slots_per_layer: Count = 1  # P, past key/value positions that a latent fills in each layer
    tied_slots: bool = True  # key and value of such a position are one vector (the paper's way)
    # What a latent reaches the decoder by; the other holds zeros (an ablation of the paper's two ways).
    conditioning: Literal["both", "slots", "embedding"] = "both"
    reader: ReaderConfig | None = None  # in place of both (decoders/reader.py)
    lora: LoraConfig | None = None  # the decoder's changes act only where a memory conditions it
    # Compute dtype of the towers; parameters and memory algebra are float32.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # What the backward pass recomputes: "dots" all but matrix products, "layers" all of a layer.
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """A memory variant by its file's name, with its hyperparameters except the latent size.

    `addressing` is a kind's name, or a section: `dict(kind="gaussian", width=1e-3)`.
    """

    variant: str
    hyperparameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the four terms of Eq. 1 (§5), and the schedule of β."""

    reconstruction: float = 1.0
    autoencoding: float = 1.0
    kl: float = 0.5  # the largest β
    kl_cycles: int = 10  # cycles of β over the run; 0 for a constant β
    free_bits: float = 0.0  # lower bound of the KL divergence per element, in nats
    language: float = 1.0
    count_padding: bool = False  # average cross-entropies over padding too, as the released code


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """From a corpus to episodes."""

    corpus: str = "wikipedia-summaries"
    held_out: str | None = None  # corpus whose held-out documents judge a run; None for `corpus`
    unit: Literal["sentence", "chunk"] = "chunk"  # a chunk fills the token lengths
    episode: Annotated[tuple[Count, ...], schema.NOT_EMPTY] = (8,)  # sizes E; each compiles
    batch: Count = 8  # B, episodes of all processes together
    encoder_tokens: Count = 64
    decoder_tokens: Count = 64
    buckets: Count = 1  # pairs of lengths that pieces are sorted into, to pad less; each compiles
    vocabulary: Natural = 0  # byte-pair entries, trained for towers without a tokenizer; else 0
    phrases: Count = 524_288  # that a reader is fitted on; `batch` is of them
    workers: Natural = 0  # reading processes per host; 0 for threads, until tokens come too slowly
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Parameters that a run begins with, out of another run or an exported model."""

    path: str  # folder of a run, or an exported file
    parameters: tuple[Regex, ...]  # which, by their paths, such as "^memory/"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    steps: Count
    optimizer: Literal["adamw", "adam", "adafactor", "muon"] = "adamw"  # its moments are float32
    learning_rate: Positive = 5e-5
    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "constant"] = "cosine"  # of the rate, after the warm-up
    weight_decay: NonNegative = 0.0  # of AdamW and Adafactor
    clip_norm: NonNegative = 1.0  # largest global norm of a gradient; 0 for no limit
    accumulate: Count = 1  # parts of a batch that are computed in turn, for less memory
    ema: Fraction = 0.0  # decay of the average that is evaluated; 0 for none
    frozen: tuple[Regex, ...] = ()  # paths of parameters that are not trained
    start_from: StartConfig | None = None
    # What factors of the towers' products in a step are rounded to; None for model.dtype.
    products: Literal["float32", "bfloat16"] | None = None
    vocabulary_multiple: Count = 1  # tokens that a step's logits are filled up to; 128 suits GPUs
    mesh: tuple[int, int, int] = (1, 1, 1)  # devices along data, fsdp, tensor; a -1 takes the rest
    # What fsdp splits: the optimiser's state ("zero2"), or parameters too ("zero3").
    layout: Literal["zero2", "zero3"] = "zero3"
    # M₀ between steps: whole on each device, or its slots split over fsdp.
    memory_layout: Literal["replicated", "slots"] = "replicated"
    on_bad_step: Literal["stop", "skip"] = "stop"  # at a spike, or not finite; the state stays
    spike: NonNegative = 0.0  # nats of a loss above the running mean that are too many; 0: no check
    log_every: Count = 10
    evaluate_every: Count = 200
    edits: Natural = 0  # held-out texts that an evaluation edits in
    edit_records: str | None = None  # in their place: a file of CounterFact, or world:COUNT:SEED
    samples: Natural = 0  # of the edits, those whose continuations an evaluation writes down
    wandb: str | None = None  # project of Weights & Biases that gets what TensorBoard gets
    checkpoint_every: Count = 200
    keep: Count = 3  # newest checkpoints that stay on disk
    # Term of an evaluation whose best checkpoint stays too.
    best: Literal["reconstruction", "autoencoding", "language"] | None = None
    stall: NonNegative = 0.0  # seconds without a step after which a process ends; 0 for never
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class KeyFeaturesConfig:
    """Random features beside encodings in keys, for more facts than dimensions (latent_layout.py)."""

    count: Count  # F; the memory then has at least model.latent + F slots
    scale: Positive = 0.5  # their size beside an encoding of length 1
    length: Positive = 1.0  # ℓ, over which encodings differ


@dataclasses.dataclass(frozen=True)
class AnswerCodeConfig:
    """How an answer is written token by token (latent_layout.py)."""

    positions: Count = 12  # P tokens of a value; a longer answer is written in several
    width: Annotated[Count, schema.MULTIPLE_OF_32] = 256  # d, numbers per token
    limit: Positive = 40.0  # the most that a token's logit gains, in nats


@dataclasses.dataclass(frozen=True)
class EditingConfig:
    """How the trained model is edited (§4, §6); training uses none of it.

    Without key_features and answer_code, keys and values are encodings alone, as in the paper.
    """

    ridge: Positive = 1e-2  # λ of the streaming memory that facts are written into
    query_noise: float = 0.0  # ρ of that memory
    session_ridge: Positive = 1e-4  # λ of a memory that is read at written keys, where ρ is 0
    scope_threshold: float = 0.68  # least cosine of a query and a written prompt in scope
    key_features: KeyFeaturesConfig | None = None
    answer_code: AnswerCodeConfig | None = None
    answer_encoding: bool = True  # for the model's reader, where it has one


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run."""

    name: str
    model: ModelConfig
    memory: MemoryConfig
    train: TrainConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig = DataConfig()
    editing: EditingConfig = EditingConfig()


Source = str | Path | ml_collections.ConfigDict | Mapping[str, Any]


def load(source: Source, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a file, a ConfigDict or a mapping, with overrides; raises ConfigError."""
    return parse(schema.override(load_dict(source), overrides))


def load_dict(source: Source) -> dict[str, Any]:
    """Return the nested dict behind a config file, a ConfigDict, or a mapping.

    A path is looked up here, then in the clone that the package is installed from.
    """
    if isinstance(source, ml_collections.ConfigDict):
        return source.to_dict()
    if isinstance(source, Mapping):
        return dict(source)
    beside = Path(__file__).resolve().parents[1] / source
    path = beside if beside.is_file() and not Path(source).is_file() else Path(source)
    if not path.is_file():
        raise ConfigError(
            f"There is no config file at {path}. Give the path of a Python file that defines "
            "get_config(), such as configs/tiny.py."
        )
    names = runpy.run_path(str(path))
    if "get_config" not in names:
        raise ConfigError(f"{path} defines no get_config(), which returns the file's ConfigDict.")
    return names["get_config"]().to_dict()


def parse(values: Mapping[str, Any]) -> Config:
    """Return the typed config of a nested dict.

    Raises:
      ConfigError: naming every unknown key, missing key and wrong value.
    """
    config = schema.from_dict(Config, values, _READERS)
    problems, parts, batch, goal = [], config.train.accumulate, config.data.batch, config.objective
    if batch % parts:
        problems.append(f"train.accumulate: {parts} does not divide data.batch ({batch})")
    if not (goal.reconstruction or goal.autoencoding or goal.language):
        problems.append("objective: all three cross-entropies have weight 0; nothing is learned")
    if config.model.reader and not (config.editing.answer_encoding or config.editing.answer_code):
        problems.append("editing: without answer_encoding and answer_code a reader reads nothing")
    schema.refuse(problems)
    return config


def to_dict(value: Any) -> Any:
    """Return a resolved config, or a part of it, as what `parse` accepts: JSON with every default."""
    if isinstance(value, TowerConfig):
        names = {"source": value.source, "family": value.family}
        sizes = to_dict(value.sizes) or {}
        return {key: name for key, name in names.items() if name is not None} | sizes
    if isinstance(value, MemoryConfig):
        return {"variant": value.variant, **to_dict(value.hyperparameters)}
    if isinstance(value, addressing.Addressing):
        return addressing.to_config(value)
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, tuple | list) else value


def make_memory(config: Config) -> memories.Memory:
    """Return the memory variant that the config names, with its hyperparameters."""
    variant = memories.variants()[config.memory.variant]
    return variant(latent=config.model.latent, **config.memory.hyperparameters)


def _read_tower(value: Any, path: str, problems: list[str]) -> TowerConfig | None:
    if not isinstance(value, Mapping) or not {"source", "family"} & set(value):
        problems.append(
            f"{path}: write dict(source=NAME), dict(family=NAME, …sizes), or both, not {value!r}"
        )
        return None
    settings = dict(value)
    source = settings.pop("source", None)
    if "source" in value and not isinstance(source, str):
        problems.append(f"{path}.source: expected str, got {source!r}")
    if "family" not in settings:
        problems += [f"{path}.{key}: unknown key beside source" for key in settings]
        return TowerConfig(source)
    families = (encoders if path.endswith("encoder") else decoders).families()
    named = schema.named(settings, "family", families, path, problems)
    if named is None:
        return None
    name, sizes = named
    sizes = schema.read(families[name].CONFIG, sizes, path, problems, {})
    return TowerConfig(source, name, sizes)


def _read_memory(value: Any, path: str, problems: list[str]) -> MemoryConfig | None:
    variants = memories.variants()
    named = schema.named(value, "variant", variants, path, problems)
    if named is None:
        return None
    name, rest = named
    rest = schema.fields(variants[name], rest, path, problems, _READERS, without=("latent",))
    return MemoryConfig(name, rest)


def _read_addressing(value: Any, path: str, problems: list[str]) -> addressing.Addressing | None:
    named = schema.named(value, "kind", addressing.KINDS, path, problems)
    return named and schema.read(addressing.KINDS[named[0]], named[1], path, problems, {})


_READERS = {
    TowerConfig: _read_tower,
    MemoryConfig: _read_memory,
    addressing.Addressing: _read_addressing,
}


def cache_folder() -> Path:
    """Return $LARIMAR_CACHE, or ~/.cache/larimar: for corpora and programs."""
    return Path(os.environ.get("LARIMAR_CACHE") or Path.home() / ".cache" / "larimar")


def cache_programs() -> Path | None:
    """Keep compiled programs on disk for later processes; return the folder.

    None, and nothing changes, where JAX has one (JAX_COMPILATION_CACHE_DIR) or none can be written.
    """
    folder = cache_folder() / "programs" / _processor()
    if jax.config.jax_compilation_cache_dir:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # A home that is read-only, or absent: every process compiles.
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Least recently used programs are removed first. A limit also brings JAX's lock between processes.
    jax.config.update("jax_compilation_cache_max_size", PROGRAMS_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", PROGRAMS_SECONDS)
    return folder


def _processor() -> str:
    """Return a name of this kind of CPU, which JAX's keys ignore."""
    names = [platform.machine(), platform.processor()]
    if (described := Path("/proc/cpuinfo")).is_file():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        names += sorted({line for line in lines if line.startswith(kinds)})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
