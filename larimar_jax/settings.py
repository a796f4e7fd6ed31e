"""What can be set: the sections of a config, typed and frozen. `config.py` reads them from files."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from larimar_jax.layers import Remat


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """An encoder or decoder: `source` names pretrained weights, `family` and `sizes` what it is.

    In a config file the tower is written as `dict(source="minilm")`; as `dict(family="bert", width=128,
    …)` with every size of the family, and is then initialised; or as both, and the weights that are
    loaded must be of these sizes: then a run can be planned where the weights are not.
    """

    source: str | None
    family: str | None
    sizes: Any


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank changes of frozen kernels: x W + scale · (x A) B, with A [in, rank], B [rank, out].

    modules: a regex on the '/'-joined paths of linear maps in either tower, such as
    "^decoder/layers/attention/(query|value)$". A is drawn, B starts at zero. The decoder's act where a
    memory conditions it, and nowhere else: the base LM stays what it was.
    """

    rank: int
    scale: float
    modules: str


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Where encoder, memory and decoder meet (§2).

    latent: C. slots_per_layer: P, past key/value positions that a latent fills in each layer (the
    paper's is 1). tied_slots: key and value are the same vector (the paper's way). lora: low-rank
    changes of kernels that are themselves frozen; None for none. dtype: the towers' compute dtype;
    parameters and memory algebra stay float32. remat: what the backward pass computes again instead
    of keeping: "none", "dots" (all but matrix products), "layers" (each layer from its input).
    """

    encoder: TowerConfig
    decoder: TowerConfig
    latent: int
    slots_per_layer: int
    tied_slots: bool
    lora: LoraConfig | None
    dtype: Literal["float32", "bfloat16", "float16"]
    remat: Remat


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
    """Corpus → episodes. batch: B episodes of all processes; token lengths S and T are static.

    held_out: the corpus whose held-out documents a run is judged by; None for those of `corpus`.

    episode: the sizes E of episodes, in facts; each batch has one of them, drawn, and each of them is
    compiled once. vocabulary: size of the byte-pair vocabulary trained on the corpus for towers
    without weights; 0 when both towers bring their own tokenizer. unit: "sentence", or "chunk" for
    pieces that fill the token lengths. workers: processes that read and batch, per host; 0 does it in
    threads, which is enough until tokens come faster than a GPU trains.
    """

    corpus: str
    held_out: str | None
    unit: Literal["sentence", "chunk"]
    episode: tuple[int, ...]
    batch: int
    encoder_tokens: int
    decoder_tokens: int
    vocabulary: int
    workers: int
    seed: int


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """Parameters that a run begins with: those of another run, or of an exported model.

    path: a run's folder or an exported file. parameters: regexes on their paths, such as "^memory/".
    """

    path: str
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    optimizer: its moments are float32. decay: the shape of the learning rate's. weight_decay: of
    AdamW and Adafactor. clip_norm: the gradients' largest global norm; 0 leaves them be. accumulate:
    parts that a batch is computed in, one after the other, for less memory. ema: decay of the
    exponential moving average of parameters, which is what is evaluated and exported; 0 keeps none.
    frozen: regexes on parameter paths. start_from: where parameters come from that no tower's source
    gives; None for freshly drawn.

    products: what factors of the towers' products with parameters, and of their gradients, are rounded
    to in a step; None for model.dtype. With "bfloat16" and a model.dtype of float32 all else stays
    float32 (products.py). float16 is none of them: a gradient's factors would underflow there.

    mesh: devices along (data, fsdp, tensor). layout: what fsdp splits, the optimiser's state alone
    ("zero2": gradients are reduced to the part that each device updates, parameters are whole) or
    parameters too ("zero3"). memory_layout: M₀ "replicated", or split over fsdp by "slots" between
    steps.

    on_bad_step: a step that is not finite, or whose loss is more than `spike` nats above the running
    mean (0: no such check), never changes the state; the run then goes on ("skip") or ends ("stop").

    edits: held-out texts that are edited in at each evaluation. best: which of an evaluation's terms
    decides on the checkpoint that is kept beside the newest `keep`. stall: seconds without a step
    after which a process ends itself, so that a hung peer does not hold all others; 0 waits for ever.
    """

    steps: int
    optimizer: Literal["adamw", "adam", "adafactor"]
    learning_rate: float
    warmup_steps: int
    decay: Literal["cosine", "linear", "constant"]
    weight_decay: float
    clip_norm: float
    accumulate: int
    ema: float
    frozen: tuple[str, ...]
    start_from: StartConfig | None
    products: Literal["float32", "bfloat16"] | None
    mesh: tuple[int, int, int]
    layout: Literal["zero2", "zero3"]
    memory_layout: Literal["replicated", "slots"]
    on_bad_step: Literal["stop", "skip"]
    spike: float
    log_every: int
    evaluate_every: int
    edits: int
    checkpoint_every: int
    keep: int
    best: Literal["reconstruction", "autoencoding", "language"] | None
    stall: float
    seed: int


@dataclasses.dataclass(frozen=True)
class KeyFeaturesConfig:
    """Random features of encodings beside them, for more facts than encodings have dimensions
    (larimar_jax/latent_layout.py). count: F; the memory has at least model.latent + F slots then. scale: s,
    their size beside an encoding of length 1. length: ℓ, over which encodings differ.
    """

    count: int
    scale: float
    length: float


@dataclasses.dataclass(frozen=True)
class AnswerCodeConfig:
    """How an answer is written token by token (larimar_jax/answer_code.py).

    positions: P, tokens of an answer that are written; the language model finishes a longer one. width:
    d, numbers per token, a multiple of 32. limit: nats that a token's logit gains at most.
    """

    positions: int
    width: int
    limit: float


@dataclasses.dataclass(frozen=True)
class EditingConfig:
    """How the trained model is edited (§4, §6); nothing of it is used in training.

    ridge, query_noise: λ and ρ of the streaming memory that facts are written into. scope_threshold:
    the least cosine between a query and a written prompt that lets the memory answer. key_features and
    answer_code: what is written and asked beside an encoding; the paper's memory is of encodings alone,
    None and None.
    """

    ridge: float
    query_noise: float
    scope_threshold: float
    key_features: KeyFeaturesConfig | None
    answer_code: AnswerCodeConfig | None


@dataclasses.dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    memory: MemoryConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainConfig
    editing: EditingConfig
