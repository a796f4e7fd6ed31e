"""The authors' checkpoint (§9): a Lightning file with both towers, what lies between them, and M₀.

`describe` tells from names, shapes and hyperparameters which model a file holds. It returns that
model's config here, one key table for the whole of it (see weights/fill.py), and the file as a source
in which every tensor is one parameter.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from larimar_jax import decoders, encoders
from larimar_jax.memory.variance import SETTINGS
from larimar_jax.weights import folder, ibm_settings
from larimar_jax.weights.fill import Keys, Source, WeightsError, pattern

_ENCODER, _DECODER, _MEMORY = "model.encoder.", "model.decoder.", "model.memory."
_BLOCKS = _DECODER + "transformer."
_LATENT, _VARIANCE = _ENCODER + "linear.weight", _MEMORY + "w_logvar"
HEAD = _DECODER + "lm_head.weight"

# Shapes do not tell how large a head is; these are the sizes of every released model.
HEAD_SIZES = {"bert": 64, "gpt2": 64, "gptj": 256}
ROTARY = 64
# Between pooled vectors of BERT even unrelated texts have a high cosine, and no checkpoint says where
# its scope ends: a start, to be set to one's own data.
SCOPE_THRESHOLD = 0.95


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a checkpoint does not say. Head sizes are widths of one attention head, None the released
    sizes' own; rotary, for a GPT-J, is how many numbers of a head positions rotate."""

    encoder_head: int | None = None
    decoder_head: int | None = None
    rotary: int = ROTARY
    scope_threshold: float = SCOPE_THRESHOLD


@dataclasses.dataclass(frozen=True)
class Description:
    """config: nested, as `config.parse` takes it. keys, source: for `fill.fill` of that config's
    model. left: names of what the file holds and no model here uses, layers merged to `*`."""

    config: dict[str, Any]
    keys: Keys
    source: Source
    left: list[str]


def describe(source: Source, hyper: Mapping[str, Any] | None, assumptions: Assumptions) -> Description:
    """Which model the checkpoint is of.

    Args:
      source: its `state_dict`.
      hyper: its `hyper_parameters`, None where it has none; the released script's are then assumed.

    Raises:
      WeightsError: naming at once all that hinders: tensors that sizes are read from and that are
        missing or have another number of axes, with every other missing and unknown name; or
        everything in which the model was trained in a way that is not computed here.
    """
    hyper, sizes = hyper or {}, _Sizes(source)
    family = "gptj" if any(".mlp.fc_in." in name for name in sizes.shapes) else "gpt2"
    keys = _keys(family)
    slots, latent = sizes.of(_MEMORY + "memory_mean", 2)
    encoder = _encoder(sizes, assumptions)
    decoder = _decoder(sizes, family, assumptions)
    if sizes.problems:
        raise WeightsError(
            f"{source.path} is no whole checkpoint of the authors' (§9), or its head sizes are not "
            "the released ones:\n  " + "\n  ".join(sizes.problems + sizes.unmatched(keys))
        )
    setting = _setting(sizes.shapes, slots, latent)
    said = {
        "encoder_model_type": "bert",
        "decoder_model_type": family,
        "memory_size": slots,
        "latent_size": latent,
        "w_logvar_setting": SETTINGS.index(setting),
        "direct_writing": True,  # else one Kalman update per item, a Kanerva machine
        "ordering": False,  # else a bidirectional LSTM over the episode
    }
    odd = [
        f"{key} is {ibm_settings.shown(hyper[key])}; {value!r} is what the tensors say or what is"
        " computed here"
        for key, value in said.items()
        if key in hyper and hyper[key] != value
    ]
    if any(name.startswith(_MEMORY + "lstm_z.") for name in sizes.shapes):
        odd.append(f"{_MEMORY}lstm_z.*: the episode is ordered by an LSTM, which is not computed here")
    asked = ibm_settings.Asked(hyper, odd)
    training = ibm_settings.training(asked)
    steps = asked.count("pseudoinverse_approx_step", 15)
    noise = asked.number("observation_noise_std", 1e-6)
    if odd:
        raise WeightsError(
            f"{source.path} was trained as a model that cannot be converted:\n  " + "\n  ".join(odd)
        )
    start = _MEMORY + "ben_cohen_memory_init"
    config = dict(
        name="larimar-" + family,
        model=dict(
            encoder=encoder,
            decoder=decoder,
            latent=latent,
            slots_per_layer=1,
            tied_slots=True,
            lora=None,
            dtype="float32",
            remat="none",
        ),
        memory=dict(
            variant="newton_schulz",
            slots=slots,
            initial="identity" if hyper.get("identity", True) else "normal",
            noise=noise,
            initial_log_variance=0.0,
            variance=setting,
            query="posterior",
            steps=steps,
            log_start=float(source.read(start).item()) if start in sizes.shapes else -5.0,
        ),
        **training,
        editing=dict(
            ridge=1e-2,
            query_noise=0.0,
            scope_threshold=assumptions.scope_threshold,
            key_features=None,
            answer_code=None,
        ),
    )
    view = View(source, _parts(sizes.shapes, slots, latent, setting))
    return Description(config, keys, view, _left(sizes.shapes, keys, latent))


class View:
    """A `fill.Source` over another one, where some tensors are taken apart.

    parts: {the part's name: (the tensor's name, the part's shape, how it is taken)}. A tensor that
    has parts does not appear by itself.
    """

    def __init__(
        self,
        source: Source,
        parts: Mapping[str, tuple[str, tuple[int, ...], Callable[[np.ndarray], np.ndarray]]],
    ):
        self.path, self._source, self._parts = source.path, source, parts

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, from the header alone."""
        apart = {name for name, _, _ in self._parts.values()}
        whole = {n: shape for n, shape in self._source.shapes().items() if n not in apart}
        return whole | {name: shape for name, (_, shape, _) in self._parts.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        if name not in self._parts:
            return self._source.read(name)
        origin, _, take = self._parts[name]
        return take(self._source.read(origin))


class _Sizes:
    """Sizes out of shapes; what cannot be read is collected and counts as 0."""

    def __init__(self, source: Source):
        self.shapes, self.problems = source.shapes(), []
        self._layers: dict[str, list[int]] = {}

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is not None and len(shape) == axes:
            return tuple(shape)
        self.problems.append(
            f"missing: {name}" if shape is None else f"misshapen: {name} {shape}, not {axes} axes"
        )
        return (0,) * axes

    def depth(self, prefix: str) -> int:
        """The number of layers, by the names `prefix` + number + '.'; all have to be there."""
        return len(self.layers(prefix))

    def layers(self, prefix: str) -> list[int]:
        """The layers' numbers; a problem where one is missing in between, or no model has so many."""
        if prefix not in self._layers:
            layer = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.")
            found = sorted({int(m[1]) for name in self.shapes if (m := layer.match(name))})
            if found and (found[-1] >= len(found) or len(found) >= folder.DEEPEST):
                self.problems.append(
                    f"layers: {prefix}{found[-1]} is the last of {len(found)} that are there; from 0"
                    f" on all belong there, and fewer than {folder.DEEPEST}"
                )
            self._layers[prefix] = found or [0]
        return self._layers[prefix]

    def heads(self, width: int, given: int | None, family: str, option: str) -> int:
        size = HEAD_SIZES[family] if given is None else given
        if size < 1 or width % size:
            self.problems.append(
                f"a width of {width} is not a multiple of heads of {size}; set {option}"
            )
            return 1
        return max(1, width // size)

    def unmatched(self, keys: Keys) -> list[str]:
        """Names that no row knows, and rows that no name fills, beyond those in `problems`."""
        layers = {
            _ENCODER: self.layers(_ENCODER + "encoder.layer."),
            _BLOCKS: self.layers(_BLOCKS + "h."),
        }
        table = [(pattern(template), template) for template, _, _ in keys]
        # σ_W has a name for each setting; View's stand in the table.
        known = (_VARIANCE, _VARIANCE + ".weight")
        found, filled = [], set()
        for name in self.shapes:
            hits = [(m, template) for p, template in table if (m := p.fullmatch(name))]
            filled |= {(template, int(m.groupdict().get("layer") or 0)) for m, template in hits}
            if name not in known and not hits:
                found.append(f"unused: {name}")
        found += [] if any(n in known for n in self.shapes) else [f"missing: {_VARIANCE}"]
        said = {*self.problems, *found}
        for template, target, _ in keys:
            if target is None or _VARIANCE in template:
                continue
            name = re.sub(r"\(([^|)]*).*?\)", r"\1", template)
            numbers = layers[_ENCODER if template.startswith(_ENCODER) else _BLOCKS]
            for layer in numbers if "{layer}" in template else (0,):
                line = "missing: " + name.replace("{layer}", str(layer))
                if (template, layer) not in filled and line not in said:
                    said.add(line)
                    found.append(line)
        return found


def _keys(family: str) -> Keys:
    """The towers' own tables, and the rows for what is neither tower.

    What a family's file may have before a name, these files have before all of a decoder's names
    and none of an encoder's.
    """

    def beside(source: str, target: str, keys: Keys, before: str, after: str):
        rows = [(source + name.replace(before, after), to, how) for name, to, how in keys]
        # With the paper's pooling and a head as the family has it, nothing is there only at times.
        return [
            (name, None if to is None else target + to.removesuffix("?"), how)
            for name, to, how in rows
        ]

    encoder, decoder = encoders.family("bert").hf_keys, decoders.family(family).hf_keys
    return (
        *beside(_ENCODER, "encoder.", encoder, "[bert.]", ""),
        *beside(_DECODER, "decoder.", decoder, "[transformer.]", "transformer."),
        (_LATENT, "to_latent.kernel", "transpose"),
        (_BLOCKS + "linear.weight", "to_slots.kernel", "transpose"),
        (_BLOCKS + "linear_emb.weight", "to_embedding.kernel", "transpose"),
        (_MEMORY + "memory_mean", "memory.prior_memory", "copy"),
        (_VARIANCE + "[.bias]", "memory.log_variance", "copy"),
        (_VARIANCE + ".weight/query", "memory.variance_by_query", "transpose"),
        (_VARIANCE + ".weight/memory", "memory.variance_by_memory", "copy"),
        # The variance of the Kanerva machine's update, and a number that is in the config.
        (_MEMORY + "(memory_logvar|ben_cohen_memory_init)", None, "copy"),
    )


def _encoder(sizes: _Sizes, assumptions: Assumptions) -> dict[str, Any]:
    words, width = sizes.of(_ENCODER + "embeddings.word_embeddings.weight", 2)
    return dict(
        family="bert",
        vocab_size=words,
        width=width,
        depth=sizes.depth(_ENCODER + "encoder.layer."),
        heads=sizes.heads(width, assumptions.encoder_head, "bert", "--encoder-head-size"),
        mlp=sizes.of(_ENCODER + "encoder.layer.0.intermediate.dense.weight", 2)[0],
        max_length=sizes.of(_ENCODER + "embeddings.position_embeddings.weight", 2)[0],
        type_vocab=sizes.of(_ENCODER + "embeddings.token_type_embeddings.weight", 2)[0],
        norm_eps=1e-12,
        pooling="cls",
        normalize=False,
    )


def _decoder(sizes: _Sizes, family: str, assumptions: Assumptions) -> dict[str, Any]:
    words, width = sizes.of(_BLOCKS + "wte.weight", 2)
    found = dict(
        family=family,
        vocab_size=words,
        width=width,
        depth=sizes.depth(_BLOCKS + "h."),
        heads=sizes.heads(width, assumptions.decoder_head, family, "--decoder-head-size"),
        norm_eps=1e-5,
    )
    if family == "gpt2":
        found["mlp"] = sizes.of(_BLOCKS + "h.0.mlp.c_fc.weight", 2)[1]
        found["max_length"] = sizes.of(_BLOCKS + "wpe.weight", 2)[0]
    else:
        found["mlp"] = sizes.of(_BLOCKS + "h.0.mlp.fc_in.weight", 2)[0]
        found["rotary"] = assumptions.rotary
        head = width // found["heads"]
        if width and (assumptions.rotary % 2 or not 0 < assumptions.rotary <= head):
            sizes.problems.append(
                f"{assumptions.rotary} rotated numbers of a head of {head}; set --rotary, even"
            )
        # Rotary positions leave no table: the causal mask, where it was saved, says how many.
        found["max_length"] = sizes.shapes.get(_BLOCKS + "h.0.attn.bias", (2048,))[-1]
    return found


def _setting(shapes: Mapping[str, tuple[int, ...]], slots: int, latent: int) -> str:
    """The parametrisation of σ_W; one that fits none is left to `fill`, which says what misfits."""
    vector = shapes.get(_VARIANCE)
    if vector is not None:
        return "slot" if tuple(vector) == (slots,) and slots > 1 else "scalar"
    inputs = {latent: "query", slots * latent: "memory", latent + slots * latent: "both"}
    return inputs.get(shapes.get(_VARIANCE + ".weight", (0, 0))[-1], "scalar")


def _parts(shapes: Mapping[str, tuple[int, ...]], slots: int, latent: int, setting: str) -> dict:
    """What `View` takes apart; a tensor of an unexpected shape stays whole, for `fill` to name."""
    parts: dict[str, Any] = {}
    if (shape := shapes.get(_LATENT)) is not None and shape[0] == 2 * latent:
        parts[_LATENT] = (_LATENT, (latent, *shape[1:]), lambda a: a[:latent])
    if setting == "scalar" and shapes.get(_VARIANCE) == (1,):
        parts[_VARIANCE] = (_VARIANCE, (), lambda a: a.reshape(()))
    weight = _VARIANCE + ".weight"
    if len(shapes.get(weight, ())) == 2 and setting != "scalar":
        rows = shapes[weight][0]
        if setting in ("query", "both"):
            parts[weight + "/query"] = (weight, (rows, latent), lambda a: a[:, :latent])
        if setting in ("memory", "both"):
            # Inputs are vec(M) by rows, behind z where that is an input too.
            parts[weight + "/memory"] = (
                weight,
                (slots, latent, rows),
                lambda a: a[:, -slots * latent :].T.reshape(slots, latent, rows),
            )
    return parts


def _left(shapes: Mapping[str, tuple[int, ...]], keys: Keys, latent: int) -> list[str]:
    unused = [pattern(template) for template, target, _ in keys if target is None]
    names = {re.sub(r"\.\d+\.", ".*.", n) for n in shapes if any(p.fullmatch(n) for p in unused)}
    # What is read in another way is not left.
    names -= {HEAD, _MEMORY + "ben_cohen_memory_init"}
    half = f"{_LATENT}, rows {latent} to {2 * latent - 1} (the latent's log-variance)"
    return sorted(names) + ([half] if shapes.get(_LATENT, (0,))[0] == 2 * latent else [])
