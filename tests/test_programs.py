"""Programs of a shell's commands are compiled once, and never at the price of a command."""

import os
import subprocess
import sys

from larimar_jax import programs

_SCRIPT = """
import jax, jax.numpy as jnp
from larimar_jax import programs
programs.WORTH = 0.0
kept = programs.keep()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(float(jax.jit(lambda x: jnp.sum(jnp.sin(x) * 3))(jnp.arange(4.0))))
print(sum(name.endswith("cache_hits") for name in hits), kept)
"""


def ran(cache, **environment):
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    } | {"LARIMAR_CACHE": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    value, last = done.stdout.splitlines()
    hits, kept = last.split(" ", 1)
    return value, int(hits), kept


def test_the_next_command_finds_what_the_last_compiled(tmp_path):
    value, hits, kept = ran(tmp_path)
    assert hits == 0 and kept.startswith(str(tmp_path / "programs"))
    again, hits, _ = ran(tmp_path)
    assert again == value and hits >= 1


def test_a_damaged_program_is_compiled_anew(tmp_path):
    value, _, kept = ran(tmp_path)
    files = [path for path in (tmp_path / "programs").rglob("*-cache")]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:100])
    assert ran(tmp_path)[0] == value


def test_without_a_place_for_them_programs_are_compiled_as_ever(tmp_path):
    (tmp_path / "file").write_text("")
    _, hits, kept = ran(tmp_path / "file")
    assert hits == 0 and kept == "None"


def test_a_folder_that_was_given_to_jax_stays(tmp_path):
    assert ran(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[2] == "None"
    assert not (tmp_path / "programs").exists()


def test_another_cpu_has_another_folder(tmp_path, monkeypatch):
    here = programs._processor()
    assert here == programs._processor()
    monkeypatch.setattr(programs.platform, "machine", lambda: "other")
    assert programs._processor() != here
