"""Two real processes: the losses of one, and an end in bounded time when one of them is lost."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import processes
import pytest
import world

from larimar_jax import config as configs
from larimar_jax.train import distributed, train_commands
from larimar_jax.train.logging import read_metrics
from larimar_jax.weights import model_file

STEPS = 20


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    corpus = world.write(tmp_path_factory.mktemp("corpus") / "world.jsonl")
    made = world.config(
        corpus, mesh=[2, 4, 1], steps=STEPS, checkpoint_every=4, evaluate_every=20, edits=4
    )
    return configs.to_dict(made)


@pytest.fixture
def brief(values):
    """The same without evaluations, where a run is not to be compared with others."""
    return values | {"train": values["train"] | {"evaluate_every": 100, "edits": 0}}


def _losses(run):
    lines = read_metrics(run / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module")
def two(values, tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("two") / "run"
    ends = processes.finish(processes.start(values, run, count=2))
    assert [code for code, _ in ends] == [0, 0], ends
    return run


def test_two_processes_have_the_losses_of_one(values, two, tmp_path):
    run = tmp_path / "run"
    [(code, said)] = processes.finish(processes.start(values, run))
    assert code == 0, said
    one, other = _losses(run), _losses(two)
    assert list(one) == list(other) == list(range(1, STEPS + 1))
    assert one[STEPS] < 0.8 * one[1]
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=1e-5)
    mine, theirs = (model_file.load_exported(f / "model.safetensors")[0] for f in (run, two))
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_allclose(theirs[name], array, atol=3e-3, err_msg=name)


def test_a_killed_process_ends_the_others_and_the_run_goes_on_bit_for_bit(values, two, tmp_path):
    run = tmp_path / "run"
    begun = time.monotonic()
    deaths = {1: {"step": 11, "signal": "SIGKILL"}}
    ends = processes.finish(processes.start(values, run, count=2, deaths=deaths))
    # 134 in a shell: JAX's coordination service ends a process whose peer is gone.
    assert ends[1][0] == -signal.SIGKILL and ends[0][0] in (-signal.SIGABRT, distributed.RETRY), ends
    assert time.monotonic() - begun < 120
    before = _losses(run)
    assert 8 <= max(before) < STEPS
    ends = processes.finish(processes.start(values, run, count=2))
    assert [code for code, _ in ends] == [0, 0], ends
    assert _losses(run) == _losses(two)
    assert all(_losses(run)[step] == loss for step, loss in before.items())


def test_a_hung_process_ends_the_others(brief, tmp_path):
    brief["train"]["stall"] = 8.0
    deaths = {1: {"step": 3, "signal": "SIGSTOP"}}
    started = processes.start(brief, tmp_path / "run", count=2, deaths=deaths)
    (code, said), _ = processes.finish(started[:1], 120)[0], started[1].kill()
    started[1].communicate()
    # Whichever is first: the watchdog, or the heartbeat that a stopped process does not send.
    assert code in (distributed.RETRY, -signal.SIGABRT), said


def test_sigterm_stops_all_after_the_same_step(brief, tmp_path):
    deaths = {0: {"step": 4, "signal": "SIGTERM"}}
    ends = processes.finish(processes.start(brief, tmp_path / "run", count=2, deaths=deaths))
    assert [code for code, _ in ends] == [distributed.RETRY] * 2, ends
    steps = _losses(tmp_path / "run")
    assert 4 <= max(steps) < STEPS
    assert (tmp_path / "run" / "checkpoints" / str(max(steps))).is_dir()


def test_the_watchdog_ends_a_process_that_does_not_move():
    script = (
        "import time; from larimar_jax.train.distributed import Watchdog\n"
        "with Watchdog(0.5) as dog:\n"
        "    for _ in range(4): time.sleep(0.25); dog.ping()\n"
        "    print('moved', flush=True); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == distributed.RETRY and done.stdout == "moved\n"
    assert "no step for" in done.stderr and "time.sleep" not in done.stdout


def test_a_process_knows_its_place():
    ours = dict(LARIMAR_COORDINATOR="a:1", LARIMAR_PROCESSES="3", LARIMAR_PROCESS="2")
    slurm = dict(LARIMAR_COORDINATOR="a:1", SLURM_NTASKS="3", SLURM_PROCID="2")
    want = distributed.Place("a:1", 3, 2)
    assert distributed.place("a:1", 3, 2, {}) == want
    assert distributed.place(None, None, None, ours) == want
    assert distributed.place(None, None, None, slurm) == want
    assert distributed.place(None, None, None, dict(SLURM_PROCID="0", SLURM_NTASKS="1")) is None
    assert distributed.place(None, None, None, {}) is None
    assert distributed.place("a:1", 1, 0, {}) is None


@pytest.mark.parametrize(
    "said, environment, message",
    [
        (("a:1", None, 0), {}, "--processes: missing"),
        ((None,) * 3, dict(LARIMAR_PROCESS="0"), "LARIMAR_COORDINATOR, LARIMAR_PROCESSES: missing"),
        (("a:1", 2, 2), {}, "counted from 0"),
        ((None,) * 3, dict(SLURM_PROCID="1", SLURM_NTASKS="4"), "one of SLURM's 4 tasks"),
        (("a", 2, 0), {}, "host:port"),
        (
            (None,) * 3,
            dict(LARIMAR_COORDINATOR="a:1", LARIMAR_PROCESSES="x", LARIMAR_PROCESS="0"),
            "numbers",
        ),
    ],
)
def test_a_place_that_does_not_add_up(said, environment, message):
    with pytest.raises(distributed.PlaceError, match=message):
        distributed.place(*said, environment)


def test_a_process_that_fails_ends_all(brief, tmp_path):
    deaths = {1: {"step": 3, "signal": "fail"}}
    begun = time.monotonic()
    ends = processes.finish(processes.start(brief, tmp_path / "run", count=2, deaths=deaths))
    # The one that failed would fail again, and says what with; the other has lost a peer.
    assert ends[1][0] == 1 and "no space left on device" in ends[1][1], ends
    assert ends[0][0] in (-signal.SIGABRT, distributed.RETRY), ends
    assert time.monotonic() - begun < 120


def test_a_peer_that_is_lost_in_any_program_asks_to_be_run_again():
    """With a device each, programs are called the quick way, which raises no JaxRuntimeError."""
    script = (
        "import sys; from larimar_jax.train import train_commands; from larimar_jax.train import distributed as d\n"
        "from jax.experimental import multihost_utils as hosts\n"
        "def train():\n"
        "    for step in range(1000):\n"
        "        if step == {failing}: raise OSError('no space left on device')\n"
        "        hosts.sync_global_devices(str(step))\n"
        "d.LEAVE = 4; d.initialise(d.Place('127.0.0.1:{port}', 2, {index}), heartbeat=10, start=60)\n"
        "sys.exit(train_commands.exit_code(train))"
    )
    port = processes.free_port()
    scripts = [script.format(port=port, index=i, failing=(-1, 3)[i]) for i in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        other, failed = pool.map(_python, scripts)
    assert failed.returncode == 1 and "no space left on device" in failed.stderr, failed
    assert other.returncode in (-signal.SIGABRT, distributed.RETRY), other


class _Left(BaseException):
    pass


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), distributed.RETRY),
        (ValueError("UNAVAILABLE: the coordination service is gone"), distributed.RETRY),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed"), distributed.RETRY),
        (ValueError("CORPUS: Connection is no column"), 1),
        (ValueError("UNKNOWN: no such setting"), 1),
        (OSError("Connection to the disk is lost"), 1),
    ],
)
def test_what_counts_as_a_peer_that_is_lost(monkeypatch, error, code):
    def left(found):
        raise _Left(found)

    def run():
        raise error

    begun = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", left)
    monkeypatch.setattr(distributed, "leave", begun.append)
    with pytest.raises(_Left if code == distributed.RETRY else type(error)) as raised:
        train_commands.exit_code(run)
    told = [raised.value.args[0]] if code == distributed.RETRY else begun
    assert told == [code]


def test_late_peers_end_a_process_in_time_and_ask_to_be_run_again():
    script = (
        "from larimar_jax.train import distributed as d;"
        f"d.initialise(d.Place('127.0.0.1:{processes.free_port()}', 2, 1), start=2)"
    )
    done = _python(script)
    assert done.returncode == distributed.RETRY and "process 1 of 2 has not met all" in done.stderr


def test_what_one_process_cannot_read_is_damaged_for_all():
    script = (
        "import sys; from larimar_jax.train import checkpoint, distributed as d; i = {index}\n"
        "d.initialise(d.Place('127.0.0.1:{port}', 2, i), start=60)\n"
        "read = lambda: 1 // (1 - i) if {damaged} else 7\n"
        "found, damage = checkpoint.agreed(read); print(found, type(damage).__name__, damage)\n"
        "sys.stdout.flush(); d.end(0)"
    )
    for damaged, said in (
        (True, ["None ValueError process 1 could not read it", "None ZeroDivisionError"]),
        (False, ["7 NoneType None"] * 2),
    ):
        port = processes.free_port()
        scripts = [script.format(index=i, port=port, damaged=damaged) for i in range(2)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ends = list(pool.map(_python, scripts))
        for done, words in zip(ends, said, strict=True):
            assert done.returncode == 0 and words in done.stdout, done


def _python(script):
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=150,
        # A device each, as processes have on hosts: gloo's collectives of many take a thread each, and
        # with eight on few cores two processes have been seen to wait for each other's.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
