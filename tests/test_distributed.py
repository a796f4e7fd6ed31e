"""Two real processes: the losses of one, and an end in bounded time when one of them is lost."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
import world

from larimar_jax import config as configs
from larimar_jax.train import distributed, loop, train_commands
from larimar_jax.train.distributed import RETRY, ProcessPlace
from larimar_jax.train.logging import read_metrics
from larimar_jax.weights import model_file

STEPS = 20
# How a process ends whose peer is gone: JAX's coordination service aborts it, or it asks for a rerun.
LOST = (-signal.SIGABRT, RETRY)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    corpus = world.write(tmp_path_factory.mktemp("corpus") / "world.jsonl")
    every = dict(checkpoint_every=4, evaluate_every=20, edits=4)
    return configs.to_dict(world.config(corpus, mesh=[2, 4, 1], steps=STEPS, **every))


@pytest.fixture(scope="module")
def pretrained(values, tmp_path_factory):
    """The same with towers that are loaded; of the encoder a part is frozen, and of the decoder none."""
    folder = tmp_path_factory.mktemp("towers")
    towers = world.towers(folder, Path(values["data"]["corpus"]))
    data = values["data"] | {"vocabulary": 0}
    return values | {"data": data, "model": values["model"] | towers}


def _brief(values):
    """The same without evaluations, which change no step."""
    return values | {"train": values["train"] | {"evaluate_every": 100, "edits": 0}}


def _losses(run):
    lines = read_metrics(run / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _two(values, run, death=None, index=1):
    """The ends of two processes, of which one dies."""
    deaths = {index: death} if death else None
    return processes.finish(processes.start(values, run, count=2, deaths=deaths))


@pytest.fixture(scope="module")
def undisturbed(pretrained, tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("two") / "run"
    ends = _two(pretrained, run)
    assert [code for code, _ in ends] == [0, 0], ends
    return run


def test_two_processes_have_the_losses_of_a_single_one(pretrained, undisturbed, tmp_path):
    run = tmp_path / "run"
    [(code, stderr)] = processes.finish(processes.start(pretrained, run))
    assert code == 0, stderr
    alone, together = _losses(run), _losses(undisturbed)
    assert list(alone) == list(together) == list(range(1, STEPS + 1))
    assert alone[STEPS] < 0.8 * alone[1]
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=1e-5)
    files = (folder / "model.safetensors" for folder in (run, undisturbed))
    arrays, theirs = (model_file.load_exported(file)[0] for file in files)
    assert arrays.keys() == theirs.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(theirs[name], array, atol=3e-3, err_msg=name)


def test_a_kill_ends_the_others_and_the_run_resumes_bit_for_bit(pretrained, undisturbed, tmp_path):
    began, brief = time.monotonic(), _brief(pretrained)
    ends = _two(brief, tmp_path, {"step": 11, "signal": "SIGKILL"})
    assert ends[1][0] == -signal.SIGKILL and ends[0][0] in LOST, ends
    assert time.monotonic() - began < 120
    before = _losses(tmp_path)
    assert 8 <= max(before) < STEPS
    ends = _two(brief, tmp_path)
    assert [code for code, _ in ends] == [0, 0], ends
    assert _losses(tmp_path) == _losses(undisturbed)
    assert all(_losses(tmp_path)[step] == loss for step, loss in before.items())


def test_a_hung_process_ends_the_others(values, tmp_path):
    brief = _brief(values)
    brief["train"]["stall"] = 8.0
    deaths = {1: {"step": 3, "signal": "SIGSTOP"}}
    started = processes.start(brief, tmp_path, count=2, deaths=deaths)
    [(code, stderr)] = processes.finish(started[:1], 120)
    started[1].kill()
    started[1].communicate()
    # Whichever is first: the watchdog, or the heartbeat that a stopped process does not send.
    assert code in LOST, stderr


def test_sigterm_stops_all_after_the_same_step(values, tmp_path):
    brief = _brief(values)
    ends = _two(brief, tmp_path / "two", {"step": 4, "signal": "SIGTERM"}, index=0)
    assert [code for code, _ in ends] == [RETRY] * 2, ends
    losses = _losses(tmp_path / "two")
    last = max(losses)
    assert 4 <= last < STEPS and (tmp_path / "two" / "checkpoints" / str(last)).is_dir(), ends
    # Towers that are made from scratch have the losses of a single process, too.
    loop.train(configs.parse(brief), tmp_path / "alone", progress=False)
    alone = _losses(tmp_path / "alone")
    np.testing.assert_allclose([*losses.values()], [alone[step] for step in losses], rtol=1e-5)


# Which process this is ----------------------------------------------------------------------------

NOTHING = (None, None, None)
LARIMAR = dict(LARIMAR_COORDINATOR="a:1", LARIMAR_PROCESSES="3", LARIMAR_PROCESS="2")
SLURM = dict(LARIMAR_COORDINATOR="a:1", SLURM_NTASKS="3", SLURM_PROCID="2")


@pytest.mark.parametrize(
    "arguments, environment, place",
    [
        (("a:1", 3, 2), {}, ProcessPlace("a:1", 3, 2)),
        (NOTHING, LARIMAR, ProcessPlace("a:1", 3, 2)),
        (NOTHING, SLURM, ProcessPlace("a:1", 3, 2)),
        (NOTHING, dict(SLURM_PROCID="0", SLURM_NTASKS="1"), None),
        (NOTHING, {}, None),
        (("a:1", 1, 0), {}, None),
    ],
)
def test_a_process_knows_its_place(arguments, environment, place):
    assert distributed.place(*arguments, environment) == place


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (("a:1", None, 0), {}, "--processes: missing"),
        (NOTHING, dict(LARIMAR_PROCESS="0"), "LARIMAR_COORDINATOR, LARIMAR_PROCESSES: missing"),
        (("a:1", 2, 2), {}, "counted from 0"),
        (NOTHING, dict(SLURM_PROCID="1", SLURM_NTASKS="4"), "one of SLURM's 4 tasks"),
        (("a", 2, 0), {}, "host:port"),
        (NOTHING, LARIMAR | {"LARIMAR_PROCESSES": "x"}, "numbers"),
    ],
)
def test_a_place_that_does_not_add_up(arguments, environment, message):
    with pytest.raises(distributed.PlaceError, match=message):
        distributed.place(*arguments, environment)


def _python(script):
    # A device each, as processes have on hosts: gloo's collectives of many take a thread each, and
    # with eight on few cores two processes have been seen to wait for each other's.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    line = [sys.executable, "-c", script]
    return subprocess.run(line, capture_output=True, text=True, timeout=150, env=environment)


def _both(script):
    """Run a script as process 0 and process 1 of two."""
    port = processes.free_port()
    scripts = [script.format(index=i, port=port) for i in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(_python, scripts))


def test_a_flag_for_gpus_that_is_set_already_stays():
    environment = {"XLA_FLAGS": "--xla_gpu_enable_pipelined_all_gather=false --xla_dump_to=here"}
    distributed.set_gpu_flags(environment)
    flags = environment["XLA_FLAGS"].split()
    assert flags[0].endswith("=false") and flags[1] == "--xla_dump_to=here"
    assert [flag[2:].split("=")[0] for flag in (flags[0], *flags[2:])] == sorted(
        distributed.GPU_FLAGS, key=lambda name: name != "xla_gpu_enable_pipelined_all_gather"
    )


def test_a_task_of_slurm_takes_every_gpu_of_its_node(monkeypatch):
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    done = _python(
        "import jax; from larimar_jax.train import distributed as d\n"
        f"d.initialise(d.ProcessPlace('127.0.0.1:{processes.free_port()}', 1, 0))\n"
        "print(jax.config.values['jax_cuda_visible_devices'])"
    )
    assert done.stdout == "all\n", done


def test_the_watchdog_ends_a_process_that_does_not_move():
    done = _python(
        "import time; from larimar_jax.train.distributed import Watchdog\n"
        "with Watchdog(0.5) as watchdog:\n"
        "    for _ in range(4): time.sleep(0.25); watchdog.ping()\n"
        "    print('moved', flush=True); time.sleep(60)"
    )
    assert done.returncode == RETRY and done.stdout == "moved\n"
    assert "no step for" in done.stderr


def test_late_peers_end_a_process_in_time_and_ask_to_be_run_again():
    done = _python(
        "from larimar_jax.train import distributed as d;"
        f"d.initialise(d.ProcessPlace('127.0.0.1:{processes.free_port()}', 2, 1), start=2)"
    )
    assert done.returncode == RETRY and "process 1 of 2 has not met all" in done.stderr


def test_a_peer_that_is_lost_in_any_program_asks_to_be_run_again():
    """With a device each, programs are called the quick way, which raises no JaxRuntimeError."""
    survivor, failed = _both(
        "import sys; from larimar_jax.train import distributed as d, train_commands\n"
        "from jax.experimental import multihost_utils as hosts\n"
        "def train():\n"
        "    for step in range(1000):\n"
        "        if step == 3 and {index}: raise OSError('no space left on device')\n"
        "        hosts.sync_global_devices(str(step))\n"
        "place = d.ProcessPlace('127.0.0.1:{port}', 2, {index})\n"
        "d.LEAVE = 4; d.initialise(place, heartbeat=10, start=60)\n"
        "sys.exit(train_commands.exit_code(train))"
    )
    assert failed.returncode == 1 and "no space left on device" in failed.stderr, failed
    assert survivor.returncode in LOST, survivor


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), RETRY),
        (ValueError("UNAVAILABLE: the coordination service is gone"), RETRY),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed"), RETRY),
        (ValueError("CORPUS: Connection is no column"), 1),
        (ValueError("UNKNOWN: no such setting"), 1),
        (OSError("Connection to the disk is lost"), 1),
    ],
)
def test_what_counts_as_a_peer_that_is_lost(monkeypatch, error, code):
    class Left(BaseException):
        pass

    def leave(status):
        raise Left(status)

    def run():
        raise error

    failing = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(distributed, "leave", failing.append)
    with pytest.raises(Left if code == RETRY else type(error)) as raised:
        train_commands.exit_code(run)
    assert (raised.value.args if code == RETRY else tuple(failing)) == (code,)


def test_what_one_process_cannot_read_is_damaged_for_all():
    ends = _both(
        "import sys; from larimar_jax.train import checkpoint, distributed as d; i = {index}\n"
        "d.initialise(d.ProcessPlace('127.0.0.1:{port}', 2, i), start=60)\n"
        "for read in (lambda: 7, lambda: 1 // (1 - i)):\n"
        "    result, damage = checkpoint.agreed(read)\n"
        "    print(result, type(damage).__name__, damage)\n"
        "sys.stdout.flush(); d.end(0)"
    )
    outputs = ["None ValueError process 1 could not read it", "None ZeroDivisionError"]
    for done, output in zip(ends, outputs, strict=True):
        assert done.returncode == 0 and f"7 NoneType None\n{output}" in done.stdout, done
