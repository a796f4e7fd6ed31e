"""Compiled programs kept on disk: what one command of a shell compiled, the next need not.

A process keeps its programs in memory, and commands of a shell are a process each.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

from larimar_jax.data import store

# Bytes; what was used longest ago goes first. A limit also brings JAX's lock between processes.
LIMIT = 256 << 20
# Seconds to compile from which a program is kept.
WORTH = 0.1


def keep() -> Path | None:
    """Keeps what is compiled from here on under $LARIMAR_CACHE, or ~/.cache/larimar; returns the folder.

    None, and nothing changes, where JAX was given a folder already (JAX_COMPILATION_CACHE_DIR) or
    where none can be written.
    """
    if jax.config.jax_compilation_cache_dir:
        return None
    folder = store.cache() / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # A home that is read-only, or not there: programs are compiled as ever.
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
    return folder


def _processor() -> str:
    """Names this kind of CPU: the machine code of another may not run here, and JAX's keys do not tell
    them apart."""
    told = [platform.machine(), platform.processor()]
    described = Path("/proc/cpuinfo")
    if described.is_file():
        kinds = ("model name", "flags", "Features", "CPU part")
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        told += sorted({line for line in lines if line.startswith(kinds)})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
