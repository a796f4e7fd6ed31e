"""A training run of several real processes, each with virtual CPU devices of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What each process runs: `larimar train` in all but argv, with a death in the middle where one is due.
_SCRIPT = """
import json, os, signal, sys
values, run, place, death, dying = map(json.loads, sys.argv[1:])
from larimar_jax import config
from larimar_jax.train import distributed, loop, step, train_commands
place = distributed.ProcessPlace(*place) if place else None
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
                os.kill(os.getpid(), getattr(signal, death["signal"]))
            return inner(*arguments)
        self.step = stepped
    step.TrainStep.__init__ = mortal
sys.exit(train_commands.exit_code(lambda: loop.train(config.parse(values), run, progress=False)))
"""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(values, run, *, count=1, devices=8, deaths=None):
    """Start `count` processes with `devices` in all; `deaths` is {index: {step, signal}}."""
    coordinator = f"127.0.0.1:{free_port()}"
    # The last of two settings counts.
    flag = f" --xla_force_host_platform_device_count={devices // count}"
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flag,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    started = []
    for index in range(count):
        place = [coordinator, count, index] if count > 1 else None
        settings = (values, str(run), place, (deaths or {}).get(index), bool(deaths))
        line = [sys.executable, "-c", _SCRIPT, *map(json.dumps, settings)]
        pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        started.append(subprocess.Popen(line, cwd=ROOT, env=environment, **pipes))
    return started


def finish(started, seconds=240):
    """Return [(exit code, stderr)] of all; those that do not end are killed, and have the code None."""
    ends = []
    for process in started:
        code = None
        try:
            _, stderr = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            _, stderr = process.communicate()
        ends.append((code, stderr.decode(errors="replace")))
    return ends
