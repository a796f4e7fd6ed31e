"""Launch scripts, by what a dry run of them shows; and a server's container, by what it runs."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from larimar_jax import cli

LAUNCH = Path(__file__).parents[1] / "launch"
SERVER = {"serve.Containerfile", "serve.yaml"}
SCRIPTS = sorted({path.name for path in LAUNCH.iterdir()} - SERVER)
ARGUMENTS = {
    "local.sh": ["configs/tiny.py", "runs/a b"],
    "slurm.sbatch": ["configs/tiny.py", "runs/a b"],
    "jobset.sh": ["larimar", "registry/image:1", "4", "configs/tiny.py", "runs/a b"],
}


def _run(script, *arguments, **environment):
    # The shell's own tools alone: a dry run must not look for srun or kubectl.
    environment = {"PATH": "/usr/bin:/bin", **environment}
    line = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


def test_a_servers_container_runs_a_command_that_larimar_takes():
    """Probes ask what needs no token, and what is kept lies in the volume."""
    lines = (LAUNCH / "serve.Containerfile").read_text().splitlines()
    entry = json.loads(lines[-1].removeprefix("ENTRYPOINT "))
    objects = [*yaml.safe_load_all((LAUNCH / "serve.yaml").read_text())]
    (container,) = objects[-1]["spec"]["template"]["spec"]["containers"]
    taken = cli.parser().parse_args([*entry[1:], *container["args"]])
    assert entry[0] == "larimar" and taken.command == "serve"
    places = (taken.host, taken.data, taken.token_file)
    assert places == ("0.0.0.0", "/data/memories", "/tokens/tokens")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/data", "/tokens"} and "VOLUME /data" in lines
    paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")]
    assert paths == ["/healthz/ready", "/healthz"]
    assert container["ports"][0]["containerPort"] == taken.port


def _words(script, output: str) -> list[str]:
    """Return the words of the command that a dry run shows."""
    if script != "jobset.sh":
        return shlex.split(output.splitlines()[-1])
    lines = (line.strip() for line in output.splitlines())
    return ["larimar", *(line[3:-1].replace("''", "'") for line in lines if line.startswith("- '"))]


def _tools(folder, **scripts):
    """Write programs that stand in for others; return a PATH with them."""
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


BENCH = ["3", "counterfact", "runs/a b"]


def test_a_benchmark_has_a_process_and_a_share_for_each_gpu_of_the_allocation():
    assert SCRIPTS == sorted([*ARGUMENTS, "bench.sh"]), "every script is tested"
    done = _run("bench.sh", "--dry-run", *BENCH, "--data", "it's", "--limit", "2")
    assert done.returncode == 0, done.stderr
    for index, line in enumerate(done.stdout.splitlines()):
        device, *words = shlex.split(line)
        assert device == f"CUDA_VISIBLE_DEVICES={index}" and words[0] == "larimar"
        taken = cli.parser().parse_args(words[1:])
        assert (taken.out, taken.data, taken.limit) == ("runs/a b", "it's", 2)
        assert (taken.share.index, taken.share.count) == (index, 3)
    assert index == 2
    done = _run("bench.sh", "--dry-run", "2", *BENCH[1:], CUDA_VISIBLE_DEVICES="4,7")
    devices = [shlex.split(line)[0] for line in done.stdout.splitlines()]
    assert devices == ["CUDA_VISIBLE_DEVICES=4", "CUDA_VISIBLE_DEVICES=7"]


def test_a_share_that_fails_is_reported_and_the_others_go_on(tmp_path):
    body = 'echo "$CUDA_VISIBLE_DEVICES $*"; [ "$CUDA_VISIBLE_DEVICES" != 1 ] || exit 7'
    out = tmp_path / "a b"
    done = _run("bench.sh", "3", "speed", str(out), PATH=_tools(tmp_path, larimar=body))
    assert done.returncode == 7 and "share-*.log" in done.stderr
    logs = [(out / f"share-{i}.log").read_text() for i in range(3)]
    assert logs == [f"{i} bench speed --out {out} --share {i}/3\n" for i in range(3)]


@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_dry_run_shows_a_command_that_larimar_takes(script):
    more = ["train.steps=3", 'train.frozen=["it\'s"]']
    nodes = {"local.sh": "1"}.get(script, "4")
    environment = dict(SLURM_JOB_NUM_NODES=nodes, BATCH_PER_NODE="8")
    done = _run(script, "--dry-run", *ARGUMENTS[script], *more, **environment)
    assert done.returncode == 0, done.stderr
    words = _words(script, done.stdout)
    taken = cli.parser().parse_args(words[words.index("larimar") + 1 :])
    assert (taken.config, taken.run) == ("configs/tiny.py", "runs/a b")
    assert taken.overrides[-2:] == more and f"train.mesh=[{nodes},-1,1]" in taken.overrides
    assert ("data.batch=32" in taken.overrides) == (nodes == "4")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_argument_is_named(script):
    arguments = ARGUMENTS.get(script, BENCH)
    done = _run(script, "--dry-run", *arguments[:-1])
    assert done.returncode == 2 and "needed" in done.stderr and script in done.stderr
    shown = _run(script, "--help")
    assert shown.returncode == 0 and script in shown.stdout
    if script == "bench.sh":
        done = _run(script, "--dry-run", "none", *BENCH[1:])
        assert done.returncode == 2 and "not 'none'" in done.stderr


@pytest.mark.parametrize("code, again", [(0, False), (1, False), (75, True), (134, True)])
def test_slurm_requeues_a_job_that_asks_for_it(tmp_path, code, again):
    """And names the first node as coordinator."""
    log = tmp_path / "log"
    scontrol = f'[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" > {log}'
    srun = f"echo $LARIMAR_COORDINATOR; exit {code}"
    path = _tools(tmp_path, srun=srun, scontrol=scontrol)
    done = _run("slurm.sbatch", *ARGUMENTS["slurm.sbatch"], PATH=path, SLURM_JOB_ID="42")
    assert done.returncode == code and done.stdout == "node7:20042\n"
    assert log.exists() == again and (not again or log.read_text() == "requeue 42\n")


def test_the_jobset_is_a_manifest():
    shown = _run("jobset.sh", "--dry-run", *ARGUMENTS["jobset.sh"], GPUS_PER_NODE="4").stdout
    manifest = yaml.safe_load(shown)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert manifest["kind"] == "JobSet" and job["parallelism"] == job["completions"] == 4
    assert 75 in job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    container = job["template"]["spec"]["containers"][0]
    names = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert names["LARIMAR_PROCESSES"] == "4" and "LARIMAR_PROCESS" in names
    assert names["LARIMAR_COORDINATOR"] == "larimar-node-0-0.larimar:12345"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
