"""The authors' checkpoint into a model of ours (§9), and our towers into folders of Hugging Face."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from larimar_jax import config as configs
from larimar_jax import decoders, lora, model, pipeline
from larimar_jax.data import vocabulary
from larimar_jax.weights import export, huggingface, ibm, key_table, model_file
from larimar_jax.weights.key_table import Source, WeightsError
from larimar_jax.weights.tokenizer import Tokenizer
from larimar_jax.weights.torch_checkpoint import TorchCheckpoint


def from_ibm(
    file: str | Path,
    out: str | Path,
    *,
    encoder_tokenizer: str | Path,
    decoder_tokenizer: str | Path,
    assumptions: ibm.Assumptions | None = None,
    progress: bool = False,
) -> list[str]:
    """Convert a checkpoint of the released code into a folder that `Session` loads.

    Conversion runs on the host and holds the parameters once while it reads. Decoder tokenizers get
    `<PAD>`, `<BOS>` and `<EOS>` appended, as the released code does (§2).

    Args:
      file: the Lightning checkpoint.
      out: the folder to write.
      encoder_tokenizer, decoder_tokenizer: folders with the base models' tokenizer.json; the
        checkpoint has none.
      assumptions: what the checkpoint does not hold, where it differs from the released sizes.
      progress: a bar on stderr.
    Returns:
      Names of what the checkpoint holds and the model does not use, layers merged to `*`.
    Raises:
      FileExistsError: `out` is there already.
      FileNotFoundError: no such checkpoint or tokenizer.
      WeightsError: naming at once everything that is missing, unknown or misshapen anywhere in the
        checkpoint, or all that was trained in another way than is computed here, or tokenizers of
        other vocabularies. Nothing is written then.
    """
    with _new_folder(Path(out)) as folder:
        folders = (encoder_tokenizer, decoder_tokenizer)
        tokenizers = [huggingface.Folder(path).tokenizer() for path in folders]
        source = TorchCheckpoint(file)
        assumptions = assumptions or ibm.Assumptions()
        description = ibm.describe(source, source.hyper_parameters, assumptions)
        config = configs.parse(description.config)
        added = decoders.family(config.model.decoder.family).added_tokens
        tokenizers[1] = tokenizers[1].with_specials(added)
        _check_vocabularies(config, tokenizers)
        abstract = nnx.eval_shape(lambda: model.build(config, jax.random.key(0)))
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        console = Console(stderr=True)
        columns = TextColumn("tensors"), MofNCompleteColumn(), BarColumn()
        with Progress(*columns, console=console, disable=not progress) as bar:
            watched = _Watched(source, bar)
            filled = key_table.fill(abstract, description.keys, watched, where=lambda *_: host)
        _check_head(source, filled)
        by_tower = dict(zip(("encoder", "decoder"), tokenizers, strict=True))
        meta = {
            "config": configs.to_dict(config),
            "tokenizers": {name: tokenizer.hash for name, tokenizer in by_tower.items()},
            "converted": {"from": Path(file).name, "left": description.left},
        }
        model_file.save_exported(folder / "model.safetensors", model.parameters(filled), meta)
        for name, tokenizer in by_tower.items():
            path = folder / vocabulary.OWN.format(tower=name)
            path.write_text(tokenizer.to_json(), encoding="utf-8")
    return description.left


def to_huggingface(source: str | Path, out: str | Path) -> None:
    """Write a model's towers as `out`/encoder and `out`/decoder, folders that transformers loads.

    What lies between the towers, and the memory, have no place there: they stay in our own file.
    Low-rank changes are merged: the decoder is the one that a memory conditions, not the base LM.

    Args:
      source: a shipped name, an export, or a run's folder, as in `pipeline.load`.
      out: the folder to write.
    Raises:
      FileExistsError: `out` is there already.
      FileNotFoundError, ExportError: as `pipeline.load`.
      WeightsError: a tower that such a folder cannot describe. Nothing is written then.
    """
    with _new_folder(Path(out)) as folder:
        loaded = pipeline.load(source)
        lora.merge(loaded.model)  # Such a folder knows whole kernels.
        tokenizers = loaded.encoder_tokenizer, loaded.decoder_tokenizer
        for name, tokenizer in zip(("encoder", "decoder"), tokenizers, strict=True):
            (folder / name).mkdir()
            export.write_tower(folder / name, getattr(loaded.model, name), tokenizer)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` when all is in it, and is gone otherwise."""
    if out.exists():
        raise FileExistsError(f"{out} is there already; name another folder, or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent, since a rename is atomic only within one file system.
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        folder.chmod(0o755)
        yield folder
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class _Watched:
    """A `key_table.Source` with a bar of how much of it has been read."""

    def __init__(self, source: Source, bar: Progress):
        self.path, self.shapes, self._source, self._bar = source.path, source.shapes, source, bar
        self._task, self._read = bar.add_task("read", total=len(source.shapes())), set()

    def read(self, name: str) -> np.ndarray:
        self._read.add(name)
        self._bar.update(self._task, completed=len(self._read))
        return self._source.read(name)


def _check_vocabularies(config: configs.Config, tokenizers: list[Tokenizer]) -> None:
    rows = (config.model.encoder.sizes.vocab_size, config.model.decoder.sizes.vocab_size)
    problems = [
        f"the {name}'s tokenizer has {tokenizer.vocab_size} tokens, its table {size} rows"
        for name, tokenizer, size in zip(("encoder", "decoder"), tokenizers, rows, strict=True)
        if tokenizer.vocab_size != size
    ]
    if problems:
        raise WeightsError(
            "; ".join(problems)
            + ". Give the tokenizers of the base models that the checkpoint was "
            "made from, such as bert-large-cased and gpt2-large (its special tokens are added here)."
        )


def _check_head(source: Source, filled: model.Larimar) -> None:
    """Check that a GPT-2's head is its embeddings: it has no other head here, which would be lost."""
    if hasattr(filled.decoder, "head") or ibm.HEAD not in source.shapes():
        return
    head = source.read(ibm.HEAD)
    if not np.array_equal(head.astype(np.float32), np.asarray(filled.decoder.embeddings)):
        raise WeightsError(
            f"{source.path}: {ibm.HEAD} is not the embedding table, and this decoder's head is tied "
            "to it (§2). The file is damaged, or was written while the two had come apart."
        )
