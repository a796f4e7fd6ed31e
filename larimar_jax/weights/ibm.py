"""The released checkpoint (§9): a Lightning file with both towers, what lies between them, and M₀.

`describe` infers from names, shapes and hyperparameters which model a file holds. It returns that
model's config, and one key table for the whole of it (see weights/key_table.py).
"""

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from larimar_jax import decoders, encoders
from larimar_jax.memory.variance import SETTINGS
from larimar_jax.weights.key_table import Keys, Source, WeightsError, pattern
from larimar_jax.weights.load import DEEPEST, LARGEST

_ENCODER, _DECODER, _MEMORY = "model.encoder.", "model.decoder.", "model.memory."
_BLOCKS = _DECODER + "transformer."
_LATENT, _VARIANCE = _ENCODER + "linear.weight", _MEMORY + "w_logvar"
_START = _MEMORY + "ben_cohen_memory_init"
HEAD = _DECODER + "lm_head.weight"

# Where a tower's layers are, and sizes as axes of its tensors: field → (tensor, axis).
_LAYERS = {"bert": _ENCODER + "encoder.layer.", "gpt2": _BLOCKS + "h.", "gptj": _BLOCKS + "h."}
_WORDS = {"vocab_size": (_BLOCKS + "wte.weight", 0), "width": (_BLOCKS + "wte.weight", 1)}
_SIZES = {
    "bert": {
        "vocab_size": (_ENCODER + "embeddings.word_embeddings.weight", 0),
        "width": (_ENCODER + "embeddings.word_embeddings.weight", 1),
        "mlp": (_LAYERS["bert"] + "0.intermediate.dense.weight", 0),
        "max_length": (_ENCODER + "embeddings.position_embeddings.weight", 0),
        "type_vocab": (_ENCODER + "embeddings.token_type_embeddings.weight", 0),
    },
    "gpt2": {
        **_WORDS,
        "mlp": (_BLOCKS + "h.0.mlp.c_fc.weight", 1),
        "max_length": (_BLOCKS + "wpe.weight", 0),
    },
    "gptj": {**_WORDS, "mlp": (_BLOCKS + "h.0.mlp.fc_in.weight", 0)},
}
# Shapes do not tell how large a head is; these are the sizes of every released model.
HEAD_SIZES = {"bert": 64, "gpt2": 64, "gptj": 256}
ROTARY = 64
# Between pooled vectors of BERT even unrelated texts have a high cosine, and no checkpoint says where
# its scope ends: a start, to be set to one's own data.
SCOPE_THRESHOLD = 0.95


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Sizes that no checkpoint states: widths of one attention head (None: the released ones), how
    many numbers of a GPT-J head positions rotate, and the cosine where scope begins."""

    encoder_head: int | None = None
    decoder_head: int | None = None
    rotary: int = ROTARY
    scope_threshold: float = SCOPE_THRESHOLD


@dataclasses.dataclass(frozen=True)
class Description:
    """config: nested, as `config.parse` takes it. keys: the key table of that config's model.
    left: names of what the file holds and no model here uses, layers merged to `*`."""

    config: dict[str, Any]
    keys: Keys
    left: list[str]


def describe(
    source: Source, hyper: Mapping[str, Any] | None, assumptions: Assumptions
) -> Description:
    """Describe the model that the checkpoint is of.

    Args:
      source: its `state_dict`.
      hyper: its `hyper_parameters`, None where it has none; the released script's are then assumed.

    Raises:
      WeightsError: naming at once all that hinders: tensors that sizes are read from and that are
        missing or have another number of axes, with every other missing and unknown name; or
        everything in which the model was trained in a way that is not computed here.
    """
    shapes, problems = source.shapes(), []
    family = "gptj" if any(".mlp.fc_in." in name for name in shapes) else "gpt2"
    slots, latent = (_size(shapes, problems, _MEMORY + "memory_mean", axis) for axis in (0, 1))
    setting = _setting(shapes, slots, latent)
    keys = _keys(family, slots, latent, setting)
    encoder = _tower(shapes, problems, "bert", assumptions.encoder_head, "--encoder-head-size")
    encoder |= dict(norm_eps=1e-12, pooling="cls", normalize=False)
    decoder = _tower(shapes, problems, family, assumptions.decoder_head, "--decoder-head-size")
    decoder["norm_eps"] = 1e-5
    if family == "gptj":
        head, rotary = decoder["width"] // decoder["heads"], assumptions.rotary
        if head and (rotary % 2 or not 0 < rotary <= head):
            problems.append(f"{rotary} rotated numbers of a head of {head}; set --rotary, even")
        # Rotary positions leave no table: the causal mask, where it was saved, tells how many.
        length = shapes.get(_BLOCKS + "h.0.attn.bias", (2048,))[-1]
        decoder |= dict(rotary=rotary, max_length=length)
    if problems:
        problems += _unmatched(shapes, keys, family)
        raise WeightsError(
            f"{source.path} is no whole checkpoint of the released code (§9), or its head sizes are "
            "not the released ones:\n  " + "\n  ".join(dict.fromkeys(problems))
        )
    computed = {
        "encoder_model_type": "bert",
        "decoder_model_type": family,
        "memory_size": slots,
        "latent_size": latent,
        "w_logvar_setting": SETTINGS.index(setting),
        "direct_writing": True,  # else one Kalman update per item, a Kanerva machine
        "ordering": False,  # else a bidirectional LSTM over the episode
    }
    settings = _Hyperparameters(hyper or {})
    problems = settings.problems
    problems += [
        f"{key} is {_shorten(settings.values[key])}; {value!r} is what the tensors have or what is"
        " computed here"
        for key, value in computed.items()
        if key in settings.values and settings.values[key] != value
    ]
    if any(name.startswith(_MEMORY + "lstm_z.") for name in shapes):
        problems.append(
            f"{_MEMORY}lstm_z.*: the episode is ordered by an LSTM, which is not computed here"
        )
    number, longest = settings.number, settings.longest("episode_sizes", 16)
    # Training, which editing does not read: §5's, with the checkpoint's changes.
    config = dict(
        name="larimar-" + family,
        model=dict(encoder=encoder, decoder=decoder, latent=latent),
        memory=dict(
            variant="newton_schulz",
            slots=slots,
            initial="identity" if settings.values.get("identity", True) else "normal",
            noise=number("observation_noise_std", 1e-6),
            variance=setting,
            steps=number("pseudoinverse_approx_step", 15),
        ),
        objective=dict(
            reconstruction=number("rec_strength", 1.0),
            autoencoding=number("ae_strength", 1.0),
            kl=number("beta", 0.5),
            kl_cycles=10 if settings.values.get("use_beta_schedule", True) else 0,
            free_bits=number("dim_target_kl", 0.0),
            language=number("decode_rec_strength", 1.0),
            count_padding=True,
        ),
        data=dict(episode=(longest,), batch=1),
        train=dict(
            steps=1000,
            learning_rate=number("learning_rate", 5e-5),
            weight_decay=number("weight_decay", 0.0),
            decay="linear",
        ),
        editing=dict(scope_threshold=assumptions.scope_threshold),
    )
    if problems:
        raise WeightsError(
            f"{source.path} was trained as a model that cannot be converted:\n  "
            + "\n  ".join(problems)
        )
    config["memory"]["log_start"] = float(source.read(_START).item()) if _START in shapes else -5.0
    return Description(config, keys, _left(shapes, keys, latent))


class _Hyperparameters:
    """The checkpoint's hyperparameters; `problems` are those of another type than belongs there."""

    def __init__(self, values: Mapping[str, Any]):
        self.values, self.problems = values, []

    def number(self, name: str, default: int | float) -> int | float:
        """Return a number of at least 0, or of at least 1 and whole where the default is whole."""
        value, whole = self.values.get(name, default), isinstance(default, int)
        valid = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if valid and int(whole) <= value < LARGEST:
            return type(default)(value)
        self.problems.append(
            f"{name} is {_shorten(value)}; a number of at least {int(whole)} belongs there"
        )
        return default

    def longest(self, name: str, default: int) -> int:
        """Return the largest of several sizes, `default` for a single value, as some runs have it."""
        sizes = self.values.get(name, ())
        if not isinstance(sizes, list | tuple) or not sizes:
            return default
        if all(type(size) is int and 0 < size < LARGEST for size in sizes):
            return max(sizes)
        self.problems.append(f"{name} is {_shorten(sizes)}; sizes above 0 belong there")
        return default


def _shorten(value: Any) -> str:
    """Return a short text of what may be nested without end."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__}"


def _tower(
    shapes: Mapping[str, tuple[int, ...]],
    problems: list[str],
    family: str,
    head: int | None,
    option: str,
) -> dict[str, Any]:
    """Return a tower's sizes out of shapes; what cannot be read joins `problems` and counts as 0."""
    layers, prefix = _layers(shapes, family), _LAYERS[family]
    if layers[-1] >= len(layers) or len(layers) >= DEEPEST:
        problems.append(
            f"layers: {prefix}{layers[-1]} is the last of {len(layers)} that are there; from 0"
            f" on all belong there, and fewer than {DEEPEST}"
        )
    sizes = {field: _size(shapes, problems, *place) for field, place in _SIZES[family].items()}
    width, head = sizes["width"], HEAD_SIZES[family] if head is None else head
    if head < 1 or width % head:
        problems.append(f"a width of {width} is not a multiple of heads of {head}; set {option}")
        head = max(1, width)
    return {"family": family, **sizes, "depth": len(layers), "heads": max(1, width // head)}


def _size(shapes: Mapping[str, tuple[int, ...]], problems: list[str], name: str, axis: int) -> int:
    """Return the length of one axis of a matrix."""
    shape = shapes.get(name)
    if shape is not None and len(shape) == 2:
        return shape[axis]
    misshapen = f"misshapen: {name} {shape}, not 2 axes"
    problems.append(f"missing: {name}" if shape is None else misshapen)
    return 0


def _layers(shapes: Mapping[str, tuple[int, ...]], family: str) -> list[int]:
    """Return the numbers of the layers that are there, or the first."""
    layer = re.compile(re.escape(_LAYERS[family]) + r"([0-9]{1,9})\.")
    return sorted({int(m[1]) for name in shapes if (m := layer.match(name))}) or [0]


def _unmatched(shapes: Mapping[str, tuple[int, ...]], keys: Keys, family: str) -> list[str]:
    """Return names that no row knows, and rows that no name fills."""
    # σ_W has a name for each setting.
    known = (_VARIANCE, _VARIANCE + ".weight")
    table = [(pattern(template), template) for template, _, _ in keys]
    numbers = {tower: _layers(shapes, tower) for tower in ("bert", family)}
    lines, filled = [], set()
    for name in shapes:
        hits = [(m, template) for p, template in table if (m := p.fullmatch(name))]
        filled |= {(template, int(m.groupdict().get("layer") or 0)) for m, template in hits}
        if name not in known and not hits:
            lines.append(f"unused: {name}")
    if not any(name in known for name in shapes):
        lines.append(f"missing: {_VARIANCE}")
    for template, target, _ in keys:
        if target is None or _VARIANCE in template:
            continue
        name = re.sub(r"\(([^|)]*).*?\)", r"\1", template)
        layers = numbers["bert" if template.startswith(_ENCODER) else family]
        for layer in layers if "{layer}" in template else (0,):
            if (template, layer) not in filled:
                lines.append("missing: " + name.replace("{layer}", str(layer)))
    return lines


def _keys(family: str, slots: int, latent: int, setting: str) -> Keys:
    """Return the towers' own tables, and the rows for what is neither tower.

    What a family's file may have before a name, these files have before all of a decoder's names
    and none of an encoder's.
    """

    def prefixed(source: str, target: str, keys: Keys, before: str, after: str):
        for name, to, how in keys:
            # With the paper's pooling and a head as the family has it, none is there only at times.
            to = None if to is None else target + to.removesuffix("?")
            yield source + name.replace(before, after), to, how

    # The latent's mean and log-variance stand below each other; the mean is its encoding.
    mean = lambda a: (a[:latent] if len(a) == 2 * latent else a).swapaxes(-1, -2)  # noqa: E731
    scalar = lambda a: a.reshape(()) if a.shape == (1,) and setting == "scalar" else a  # noqa: E731
    own = decoders.family(family).hf_keys
    rows = [
        *prefixed(_ENCODER, "encoder.", encoders.family("bert").hf_keys, "[bert.]", ""),
        *prefixed(_DECODER, "decoder.", own, "[transformer.]", "transformer."),
        (_LATENT, "to_latent.kernel", mean),
        (_BLOCKS + "linear.weight", "to_slots.kernel", "transpose"),
        (_BLOCKS + "linear_emb.weight", "to_embedding.kernel", "transpose"),
        (_MEMORY + "memory_mean", "memory.prior_memory", "copy"),
        (_VARIANCE + "[.bias]", "memory.log_variance", scalar),
        # The log of the variance of the Kanerva machine's prior, and a number that is in the config.
        (_MEMORY + "(memory_logvar|ben_cohen_memory_init)", None, "copy"),
    ]
    # Inputs of log σ_W² are z, then vec(M) by rows.
    if setting in ("query", "both"):
        rows.append((_VARIANCE + ".weight", "memory.variance_by_query", lambda a: a[:, :latent].T))
    if setting in ("memory", "both"):
        shape = (slots, latent, slots)
        by_memory = lambda a: a[:, -slots * latent :].T.reshape(shape)  # noqa: E731
        rows.append((_VARIANCE + ".weight", "memory.variance_by_memory", by_memory))
    return rows


def _setting(shapes: Mapping[str, tuple[int, ...]], slots: int, latent: int) -> str:
    """Return σ_W's parametrisation; one that fits none is left to `fill`, which names what misfits."""
    vector = shapes.get(_VARIANCE)
    if vector is not None:
        return "slot" if tuple(vector) == (slots,) and slots > 1 else "scalar"
    inputs = {latent: "query", slots * latent: "memory", latent + slots * latent: "both"}
    return inputs.get(shapes.get(_VARIANCE + ".weight", (0, 0))[-1], "scalar")


def _left(shapes: Mapping[str, tuple[int, ...]], keys: Keys, latent: int) -> list[str]:
    unused = [pattern(template) for template, target, _ in keys if target is None]
    names = {re.sub(r"\.\d+\.", ".*.", n) for n in shapes if any(p.fullmatch(n) for p in unused)}
    half = f"{_LATENT}, rows {latent} to {2 * latent - 1} (the latent's log-variance)"
    # The head and the start of Newton–Schulz are read in another way.
    halves = [half] if shapes.get(_LATENT, (0,))[0] == 2 * latent else []
    return sorted(names - {HEAD, _START}) + halves
