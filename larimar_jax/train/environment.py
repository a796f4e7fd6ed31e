"""What a run ran with: revision, versions, devices; for whoever has to do it again."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    "larimar-jax jax jaxlib flax optax orbax-checkpoint grain array_record numpy tokenizers".split()
)


@functools.cache
def describe() -> dict[str, Any]:
    """Revision of the source (None outside a clone), versions (None
    of what is not installed), devices and XLA's flags."""
    device = jax.devices()[0]
    return {
        "revision": _revision(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": {"kind": device.device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # On the path without having been installed.


def _revision() -> str | None:
    """The commit that the package is installed from, with "+changes" where files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        try:
            line = ["git", "-C", str(root), *arguments]
            return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # Without git, or in somebody else's clone, there is no saying.

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else commit + ("+changes" if changed else "")
