"""A training run of several real processes, each with virtual CPU devices of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What each process runs: `larimar train` in all but argv, with a death in the middle where told.
_SCRIPT = """
import json, os, signal, sys
values, run, place, death, dying = map(json.loads, sys.argv[1:])
from larimar_jax import config
from larimar_jax.train import distributed, loop, step
place = distributed.Place(*place) if place else None
distributed.LEAVE = 4
distributed.initialise(place, heartbeat=10 if dying else 100, start=200)
if death:
    original = step.TrainStep.__init__
    def mortal(self, *arguments):
        original(self, *arguments)
        inner, count = self.step, 0
        def stepped(*arguments):
            nonlocal count
            count += 1
            if count == death["step"]:
                if death["signal"] == "fail":
                    raise OSError("no space left on device")
                os.kill(os.getpid(), getattr(signal, death["signal"]))
            return inner(*arguments)
        self.step = stepped
    step.TrainStep.__init__ = mortal
sys.exit(train_commands.exit_code(lambda: loop.train(config.parse(values), run, progress=False)))
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(values, run, *, count=1, devices=8, deaths=None):
    """Starts `count` processes with `devices` in all; `deaths` is {index: {step, signal}}.

    For a signal, "fail" raises.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    environment = os.environ | {
        # The last of two settings counts.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={devices // count}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    started = []
    for index in range(count):
        place = [coordinator, count, index] if count > 1 else None
        death = (deaths or {}).get(index)
        said = [json.dumps(x) for x in (values, str(run), place, death, bool(deaths))]
        line = [sys.executable, "-c", _SCRIPT, *said]
        started.append(
            subprocess.Popen(
                line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
        )
    return started


def finish(started, seconds=240):
    """[(exit code, stderr)] of all; those that do not end are killed, and have None for a code."""
    found = []
    for process in started:
        try:
            _, said = process.communicate(timeout=seconds)
            found.append((process.returncode, said.decode(errors="replace")))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            found.append((None, process.communicate()[1].decode(errors="replace")))
    return found
