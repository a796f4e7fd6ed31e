"""A trained model by name or path, with all that editing needs: `load("smol")`."""

import copy
import dataclasses
import functools
import hashlib
import importlib.resources
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from larimar_jax import answer_code, generate, latent_layout, packing, scope, scoring
from larimar_jax import config as configs
from larimar_jax.config import Config, KeyFeaturesConfig
from larimar_jax.data import vocabulary
from larimar_jax.memory.base import Prepared
from larimar_jax.memory.dual import Dual
from larimar_jax.memory.streaming import Streaming
from larimar_jax.model import AbstractModel, Condition, Larimar, abstract, load_towers, parameters
from larimar_jax.weights import PACKAGED, model_file
from larimar_jax.weights import locate as locate_tower
from larimar_jax.weights.tokenizers import TextTooLong, Tokenizer, bucket

CHECKPOINTS = "checkpoints"
# Texts of one encoder call; a long list goes through it in slices.
_TEXTS = 32


class EncodingNotFinite(FloatingPointError):
    """The encoder made NaN or infinity of a text."""


@dataclasses.dataclass(frozen=True)
class Encodings:
    """n texts: `embedding` for the scope detector (§6), `latent` for the memory (§2); float32. `pooled`
    is the encoder's output, of which `embedding` is the projection where the model has one.

    C is the size of all `latent_layout.layout`: behind a text's encoding stand its features and the spelling of
    its answer, zeros where it has none.
    """

    embedding: Float[np.ndarray, "n H"]
    latent: Float[np.ndarray, "n C"]
    pooled: Float[np.ndarray, "n H"]

    def __getitem__(self, rows: Sequence[int]) -> "Encodings":
        """Those of the given rows."""
        return Encodings(self.embedding[rows], self.latent[rows], self.pooled[rows])


class Pipeline:
    """A model with its tokenizers, the streaming memory it is edited through, and its fingerprint.

    Every method takes texts or arrays and goes through one compiled function per bucket of shapes.
    Nothing here changes after construction: what is written lives in memory states.
    """

    def __init__(
        self,
        config: Config,
        model: Larimar,
        encoder_tokenizer: Tokenizer,
        decoder_tokenizer: Tokenizer,
        *,
        source: str,
        fingerprint: str,
        projection: Float[np.ndarray, "H H"] | None = None,
    ):
        self.config, self.model = config, model
        self.encoder_tokenizer, self.decoder_tokenizer = encoder_tokenizer, decoder_tokenizer
        self.source, self.fingerprint = source, fingerprint
        self.projection = None if projection is None else jax.device_put(projection)
        editing, self.layout = config.editing, latent_layout.layout(config)
        params = latent_layout.extend_prior(model.memory.params(), self.layout)
        self.memory = Streaming(
            slots=len(params.prior_memory),
            latent=self.layout.size,
            ridge=editing.ridge,
            query_noise=editing.query_noise,
        )
        self.prepared: Prepared = jax.jit(self.memory.prepare)(params)
        self.graph, self.state = nnx.split(model)

    @property
    def dual(self) -> Dual:
        """The same memory, which costs what its facts are and not what its slots are: for few facts."""
        whole = self.memory
        return Dual(
            slots=whole.slots,
            latent=whole.latent,
            ridge=whole.ridge,
            query_noise=whole.query_noise,
        )

    @property
    def scope_threshold(self) -> float:
        return self.config.editing.scope_threshold

    def with_memory(self, memory: Streaming, prepared: Prepared) -> "Pipeline":
        """The same towers with another memory, which holds as many numbers a text.

        Raises:
          ValueError: its latents are of another size.
        """
        if memory.latent != self.memory.latent:
            raise ValueError(
                f"the memory holds {memory.latent} numbers a text and the model makes "
                f"{self.memory.latent} (encoding, features and spelling): give it that `latent`"
            )
        made = copy.copy(self)
        made.memory, made.prepared = memory, prepared
        return made

    def encode(
        self, texts: Sequence[str], answers: Sequence[str | None] | None = None
    ) -> Encodings:
        """Embeds and encodes n texts.

        Args:
          answers: of each text the answer in it, which is spelled beside its encoding where the memory
            keeps spellings; None has none, as a query.

        Raises:
          ValueError: not as many answers as texts.
          TextTooLong: a text exceeds what the encoder takes; names it.
          EncodingNotFinite: names the first text whose encoding is not finite.
        """
        limit = self.model.encoder.config.max_length
        batch = self.encoder_tokenizer.encode(texts)
        lengths = batch.mask.sum(axis=1)
        if len(texts) and lengths.max() > limit:
            row = int(lengths.argmax())
            raise TextTooLong(
                f"The text {_shorten(texts[row])!r} has {lengths[row]} tokens and the encoder takes "
                f"{limit}. Shorten it, or split it into several."
            )
        order = np.argsort(lengths, kind="stable")
        outputs = None
        for first in range(0, len(texts), _TEXTS):
            rows = order[first : first + _TEXTS]
            # The last bucket may end beyond the positions that the encoder has.
            width = min(bucket(int(lengths[rows].max())), limit)
            height = min(_TEXTS, 1 << max(0, len(rows) - 1).bit_length())
            ids = np.full((height, width), self.encoder_tokenizer.pad, np.int32)
            mask = np.zeros((height, width), bool)
            ids[: len(rows)], mask[: len(rows)] = batch.ids[rows, :width], batch.mask[rows, :width]
            made = [
                np.asarray(part)[: len(rows)]
                for part in _encode(
                    self.graph,
                    self.state,
                    self.projection,
                    ids,
                    mask,
                    self.config.editing.key_features,
                )
            ]
            if outputs is None:
                outputs = [np.zeros((len(texts), part.shape[1]), np.float32) for part in made]
            for output, part in zip(outputs, made, strict=True):
                output[rows] = part
        if outputs is None:
            width = self.model.encoder.config.width
            sizes = (width, self.layout.encoding + self.layout.key_features, width)
            outputs = [np.zeros((0, size), np.float32) for size in sizes]
        embedding, latent, pooled = outputs
        finite = np.isfinite(embedding).all(axis=1) & np.isfinite(latent).all(axis=1)
        if not finite.all():
            raise EncodingNotFinite(
                f"The encoding of {_shorten(texts[int(np.argmin(finite))])!r} is not finite, so nothing "
                "was written or read. The encoder's weights are damaged, or its compute dtype "
                "overflows: load the model anew, or set model.dtype to float32."
            )
        if self.config.editing.answer_code is not None:
            answers = [None] * len(texts) if answers is None else answers
            if len(answers) != len(texts):
                raise ValueError(f"{len(texts)} texts need as many answers; got {len(answers)}")
            latent = np.concatenate([latent, self._spell(answers)], axis=1)
        return Encodings(embedding, latent, pooled)

    def _spell(self, answers: Sequence[str | None]) -> Float[np.ndarray, "n S"]:
        config, following = self.config.editing.answer_code, self.decoder_tokenizer.following
        tokens = [None if answer is None else following(answer.strip()) for answer in answers]
        packed = answer_code.pack(config, tokens, self.decoder_tokenizer.eos)
        written = np.zeros((len(packed), answer_code.size(config)), np.float32)
        rows = np.flatnonzero((packed != answer_code.NOTHING).any(axis=1))
        if len(rows):
            # Padded, so that few numbers of answers are compiled for.
            padded = np.resize(packed[rows], (bucket(len(rows), 8), config.positions))
            written[rows] = np.asarray(answer_code.spell(config, padded))[: len(rows)]
        return written

    def condition(
        self,
        readout: Float[np.ndarray, "n C"] | Array,
        active: Bool[np.ndarray, " n"] | None = None,
    ) -> Condition:
        """`Larimar.condition` of n readouts, compiled, with what is spelled in them.

        Rows of padding, not active, come after the n, so that few numbers of rows are compiled for;
        decoding and scoring ignore them.
        """
        rows, more = len(readout), packing.steps_bucket(len(readout), 1) - len(readout)
        readout = np.pad(np.asarray(readout, np.float32), ((0, more), (0, 0)))
        active = np.pad(np.ones(rows, bool) if active is None else np.asarray(active), (0, more))
        how = dict(sizes=self.layout, code=self.config.editing.answer_code)
        return _condition(self.graph, self.state, readout, active, **how)

    def zero(self, rows: int) -> Condition:
        """z = 0: the memory slot is there and holds zeros (§2)."""
        one = self.condition(np.zeros((1, self.memory.latent), np.float32))
        return one.rows(jnp.zeros((packing.steps_bucket(rows, 1),), jnp.int32))

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        condition: Condition | None = None,
    ) -> np.ndarray:
        """ℓ of c candidates for each of n prompts, in nats per token [n, c]; see `scoring.score`."""
        return scoring.score(self.model, self.decoder_tokenizer, prompts, candidates, condition)

    def judge(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        condition: Condition | None = None,
    ) -> scoring.Scores:
        """`score` with the teacher-forced accuracy of every candidate; see `scoring.judge`."""
        return scoring.judge(self.model, self.decoder_tokenizer, prompts, candidates, condition)

    def generate(
        self, prompts: Sequence[str], condition: Condition | None = None, **options
    ) -> list[str]:
        """Continuations; options as in `generate.generate`."""
        return generate.generate(self.model, self.decoder_tokenizer, prompts, condition, **options)

    def stream(
        self, prompts: Sequence[str], condition: Condition | None = None, **options
    ) -> Iterator[list[str]]:
        """Continuations piece by piece; options as in `generate.stream`."""
        return generate.stream(self.model, self.decoder_tokenizer, prompts, condition, **options)


def names() -> list[str]:
    """Checkpoints that ship with the package."""
    folder = importlib.resources.files("larimar_jax") / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(
        f.name.removesuffix(".safetensors")
        for f in folder.iterdir()
        if f.name.endswith(".safetensors")
    )


def locate(source: str | pathlib.Path) -> pathlib.Path:
    """The exported file of a shipped name, of a path, or of a training run's folder.

    Raises:
      FileNotFoundError: none of these; lists the names.
    """
    if str(source) in names():
        return pathlib.Path(
            str(importlib.resources.files("larimar_jax") / CHECKPOINTS / f"{source}.safetensors")
        )
    path = pathlib.Path(source)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no model {str(source)!r}: it is neither a shipped name "
            f"({', '.join(names()) or 'none'}) nor an exported file or the folder of a finished run."
        )
    return path


def load(source: str | pathlib.Path = "smol", overrides: Sequence[str] = ()) -> Pipeline:
    """Loads a shipped checkpoint by name, or an export or a finished run by path.

    Args:
      overrides: settings of how it is edited that differ from the file's, as "editing.ridge=0.1".

    Raises:
      ConfigError: an override that names no setting of `editing`, or a value that makes no sense.
      FileNotFoundError: no such model, or the package of a tower is not installed (names the command).
      ExportError: the file is damaged, half written, or does not fit its own config.
    """
    path = locate(source)
    arrays, meta = model_file.load_exported(path)
    if "config" not in meta:
        raise model_file.ExportError(
            f"{path} holds a session and not a model; give it to --session."
        )
    config = configs.parse(meta["config"])
    if others := [told for told in overrides if not told.startswith("editing.")]:
        raise configs.ConfigError(
            f"{others[0]!r} is no setting of `editing`: what else is in a checkpoint was trained so."
        )
    if overrides:
        config = configs.load(configs.to_dict(config), overrides)
    projection = arrays.pop(scope.PROJECTION, None)
    towers = load_towers(config)
    model = _filled(path, config, {name: tower for name, (tower, _) in towers.items()}, arrays)
    _check_projection(path, projection, model.encoder.config.width)
    encoder_tokenizer, decoder_tokenizer = vocabulary.tokenizers(
        config,
        functools.partial(_no_corpus, path),
        path.parent / "tokenizer.json",
        {name: tokenizer for name, (_, tokenizer) in towers.items()},
    )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for part in (encoder_tokenizer.hash, decoder_tokenizer.hash, *sorted(overrides)):
        digest.update(part.encode())
    for tower in (config.model.encoder, config.model.decoder):
        # Packaged files are pinned by sha256; a folder's content is not known by its name.
        if tower.source is not None and tower.source not in PACKAGED:
            found = locate_tower(tower.source)
            for path_of in sorted(found.rglob("*")) or [found]:
                if path_of.is_file():
                    with path_of.open("rb") as file:  # as large as the tower: not read whole
                        digest.update(hashlib.file_digest(file, "sha256").digest())
    return Pipeline(
        config,
        model,
        encoder_tokenizer,
        decoder_tokenizer,
        # A path is kept whole, so that a session finds its model from any folder.
        source=str(source) if str(source) in names() else str(path.resolve()),
        fingerprint=digest.hexdigest(),
        projection=projection,
    )


def _check_projection(path: pathlib.Path, projection: np.ndarray | None, width: int) -> None:
    """Raises ExportError where the scope detector's map is there and not of the encoder's width."""
    if projection is not None and projection.shape != (width, width):
        raise model_file.ExportError(
            f"{path} does not fit its own config:\n  {scope.PROJECTION}: {projection.shape} in the "
            f"file, {(width, width)} of the encoder. Run `larimar calibrate` on it again."
        )


def _filled(
    path: pathlib.Path, config: Config, towers: Mapping[str, nnx.Module], arrays: dict
) -> Larimar:
    """The model with these towers' parameters, and the file's.

    Raises:
      ExportError: file and model do not have the same parameters.
    """
    # Every parameter is in a file, and drawing them first would be for nothing.
    skeleton = AbstractModel(abstract(config, towers))
    _check_whole(path, skeleton.parameters, arrays, tuple(f"{name}/" for name in towers))
    known = {
        f"{name}/{place}": array
        for name, tower in towers.items()
        for place, array in parameters(tower).items()
    }
    return skeleton.model(known | jax.device_put(arrays))


def _check_whole(
    path: pathlib.Path, wanted: Mapping[str, Any], arrays: dict, loaded: tuple[str, ...]
) -> None:
    """Raises ExportError unless the file has the parameters, but for those of `loaded` towers."""
    shapes = {name: leaf.shape for name, leaf in wanted.items()}
    problems = [f"{n}: missing" for n in shapes if n not in arrays and not n.startswith(loaded)]
    problems += [
        f"{name}: {array.shape} in the file, {shapes.get(name, 'no such parameter')} in the model"
        for name, array in arrays.items()
        if array.shape != shapes.get(name)
    ]
    if problems:
        raise model_file.ExportError(
            f"{path} does not fit its own config:\n  " + "\n  ".join(problems)
        )


@functools.partial(jax.jit, static_argnums=(0, 5))
def _encode(
    graph: nnx.GraphDef,
    state: nnx.State,
    projection: Float[Array, "H H"] | None,
    tokens: Int[Array, "n S"],
    mask: Bool[Array, "n S"],
    features: KeyFeaturesConfig | None,
) -> tuple[Float[Array, "n H"], Float[Array, "n C"], Float[Array, "n H"]]:
    model = nnx.merge(graph, state)
    pooled = model.embed(tokens, mask)
    embedding = pooled
    if projection is not None:
        embedding = jnp.matmul(pooled, projection, precision="highest")
    latent = model.to_latent(pooled)
    return (
        embedding,
        jnp.concatenate([latent, latent_layout.features(features, latent)], axis=1),
        pooled,
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("sizes", "code"))
def _condition(graph: nnx.GraphDef, state: nnx.State, readout, active, *, sizes, code) -> Condition:
    model, evidence = nnx.merge(graph, state), None
    if code is not None:
        written = readout[:, sizes.size - sizes.answer_code :]
        evidence = answer_code.read(code, written, model.decoder.config.vocab_size, active)
    return model.condition(readout[:, : sizes.encoding], active, evidence)


def _no_corpus(path: pathlib.Path) -> list[str]:
    raise FileNotFoundError(
        f"{path} was trained with a vocabulary of its own, which is not beside it. Copy tokenizer.json "
        "from the run's folder to there (a converted model has one for each tower)."
    )


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"
