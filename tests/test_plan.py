"""Plans of real sizes, compiled here for devices that are not here; what a program costs."""

import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from larimar_jax import cli, model
from larimar_jax import config as configs
from larimar_jax.model import AbstractModel
from larimar_jax.train import plan, sharding
from larimar_jax.train.collectives import Collective, read_collectives
from larimar_jax.train.flops import count_flops
from larimar_jax.train.step import TrainStep

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
# Of Hugging Face's models: transformers' num_parameters() of bert-large-cased, gpt2-large (with three
# rows of 1,280 for the added tokens), gpt-j-6b.
TOWERS = {
    "larimar_1b3": {"encoder": 333_579_264, "decoder": 774_030_080 + 3 * 1280},
    "larimar_6b": {"encoder": 333_579_264, "decoder": 6_050_882_784},
}

# M₀, and log σ_W²: a number for each slot with a map from vec M, or a single number.
MEMORY = {"larimar_1b3": 512 * 768 + 512 + 512 * 768 * 512, "larimar_6b": 512 * 768 + 1}


@pytest.mark.parametrize("name", TOWERS)
def test_the_papers_models_fit_a_node(name, monkeypatch, capsys):
    for variable in ("XLA_FLAGS", "JAX_PLATFORMS"):  # The command sets them.
        monkeypatch.setenv(variable, os.environ[variable])
    line = ["plan", "--config", f"configs/{name}.py", "--devices", "8", "--memory", "80GB"]
    assert cli.main([*line, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert {part: numbers["parameters"][part] for part in TOWERS[name]} == TOWERS[name]
    assert numbers["parameters"]["memory"] == MEMORY[name]
    size = numbers["bytes_per_device"]
    assert numbers["fits"] and size["together"] < 0.7 * 80e9
    # Every parameter is a float32 with two moments, and 1/8 of them here; zero2 holds all parameters.
    total = sum(numbers["parameters"].values())
    assert name != "larimar_1b3" or total == 1_346_492_416  # the released model's
    assert size["optimizer"] == pytest.approx(8 * total / 8, rel=0.02)
    whole = 8 if name == "larimar_1b3" else 1
    assert size["parameters"] == pytest.approx(4 * total * whole / 8, rel=0.02)
    assert numbers["memory_collectives"] == numbers["conditional_collectives"] == []
    assert numbers["flops"] == numbers["model_flops"] > 0


@pytest.mark.parametrize("name", TOWERS)
def test_a_full_size_step_lowers_for_gpus(name):
    config = plan.load(f"configs/{name}.py", [], 8)
    step = TrainStep(config, AbstractModel(model.abstract(config)), sharding.make_mesh((1, 8, 1)))
    traced = step.step.trace(*step.arguments(max(config.data.episode)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = collections.Counter(re.findall(r"custom_call @(cusolver_\w+)_ffi", text))
    # The memory's factorisations, those of the branch for ill-conditioned episodes among them.
    most = dict(cusolver_potrf=9, cusolver_geqrf=5, cusolver_orgqr=5, cusolver_gesvdj=3)
    assert calls["cusolver_potrf"] and calls.keys() <= most.keys()
    assert all(calls[name] <= count for name, count in most.items())
    assert text.count("stablehlo.case") <= 63


def test_a_low_rank_run_holds_its_frozen_kernels_in_half_the_bytes():
    lora = 'model.lora={"rank": 8, "modules": "^decoder/layers/attention/(query|value)$"}'
    config = configs.load("configs/larimar_6b.py", [lora, 'train.frozen=["^(encoder|decoder)/"]'])
    abstract = AbstractModel(model.abstract(config))
    step = TrainStep(config, abstract, sharding.make_mesh((1, 8, 1)))
    frozen = step.arguments(5)[1].values()
    count = sum(math.prod(leaf.shape) for leaf in frozen)
    assert count == sum(TOWERS["larimar_6b"].values())
    assert sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in frozen) < 0.51 * 4 * count


def test_a_step_that_does_not_fit_is_shown_with_settings_with_which_it_does():
    # Whole parameters and moments on both devices do not fit; split over them they do.
    small = ["train.mesh=[2,1,1]", "data.batch=2", "data.episode=[2]", "model.encoder.mlp=4096"]
    line = [sys.executable, "-m", "larimar_jax.cli", "plan", "--config", str(TINY)]
    line += ["--devices", "2", "--memory", "40MB", "--set", *small]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    assert "does NOT fit" in done.stdout and "--set train.mesh=[1,2,1]\n" in done.stdout


def test_changes_are_cumulative_and_in_the_order_of_their_cost():
    config = configs.load(TINY)
    train = dataclasses.replace(config.train, mesh=(2, 2, 1), layout="zero2")
    settings = [s for s, _ in plan.changes(dataclasses.replace(config, train=train))]
    assert list(settings[-1].items()) == [
        ("train.mesh", "[1,4,1]"),
        ("train.layout", "zero3"),
        ("model.dtype", "bfloat16"),
        ("model.remat", "layers"),
        ("train.accumulate", "2"),
        ("train.optimizer", "adafactor"),
    ]
    assert [s["model.remat"] for s in settings[3:5]] == ["dots", "layers"]


def test_a_mesh_of_another_number_of_devices_is_an_error():
    with pytest.raises(configs.ConfigError, match=r"--set train.mesh=\[1,8,1\]"):
        plan.load(TINY, [], 8)
    assert plan.load(TINY, ["train.mesh=[2,-1,1]"], 8).train.mesh == (2, 4, 1)


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("40 GiB", 40 * 2**30), ("24e9", 24e9)])
def test_sizes_are_read(text, size):
    assert plan.parse(text) == size
    with pytest.raises(ValueError, match="80GB"):
        plan.parse("much")


def test_flops_count_loops_branches_and_devices():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    product = 2 * 3 * 4 * 5
    assert count_flops(jnp.matmul, a, b) == product
    batched = jax.vmap(jnp.matmul)
    assert count_flops(batched, jnp.zeros((7, 3, 4)), jnp.zeros((7, 4, 5))) == 7 * product

    def looped(a, b):
        step = lambda c, _: (c, jax.jit(jnp.matmul)(a, b).sum())  # noqa: E731
        return jax.lax.scan(step, 0.0, None, length=6)[1]

    assert count_flops(looped, a, b) == 6 * product
    # Backwards there are two products for each; with rematerialisation one more.
    square = jnp.zeros((4, 4))

    def loss(x):
        return jnp.sum((x @ x) @ x)

    plain = count_flops(jax.grad(loss), square)
    assert plain == 6 * 2 * 4**3
    assert count_flops(jax.grad(jax.checkpoint(loss)), square) > plain

    def branched(a, b):
        return jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: a @ b + 1)

    assert count_flops(branched, a, b) == product
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = dict(in_specs=(jax.P("x"), jax.P()), out_specs=jax.P("x"))
    split = jax.shard_map(jnp.matmul, mesh=mesh, **specs)
    assert count_flops(split, jnp.zeros((24, 4)), b) == 8 * product


def test_collectives_are_counted_as_often_as_they_run():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P("x"), jax.P()))

    def function(x):
        def step(c, _):
            return jax.lax.with_sharding_constraint(c * 2.0 + c.sum(), rows), None

        x = jax.lax.scan(step, x, None, length=5)[0]
        x = jax.lax.cond(x[0, 0] > 0, lambda: jnp.sort(x, axis=0), lambda: x)
        return jax.lax.with_sharding_constraint(x, whole)

    jitted = jax.jit(function, in_shardings=rows, out_shardings=whole)
    compiled = jitted.lower(jax.ShapeDtypeStruct((64, 4), jnp.float32)).compile()
    everything = read_collectives(compiled.as_text())
    assert {c.kind for c in everything if c.conditional} == {"all-gather"}, everything
    collectives = {c.kind: c for c in everything[::-1] if not c.conditional}
    ways = {kind: (c.times, len(c.group)) for kind, c in collectives.items()}
    assert ways == {"all-reduce": (5, 8), "all-gather": (1, 8)}
    gathered = collectives["all-gather"]
    assert gathered.bytes == 64 * 4 * 4 and gathered.moved == gathered.bytes * 7 // 8
    with pytest.raises(ValueError, match="ENTRY"):
        read_collectives("nothing")


@pytest.mark.parametrize(
    "groups, group, leaving",
    [
        ("replica_groups={{0,1},{2,3}}", (0, 1), 0),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7), 7),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3), 0),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4), 4 * 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", (0, 4), 4 * 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", (0, 1, 2, 3), 0),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1), 0),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6), 3 * 4),
    ],
)
def test_what_leaves_a_host_is_counted_by_the_devices_that_exchange(groups, group, leaving):
    head = "HloModule m, num_partitions=8\n\nENTRY %main (p: f32[1]) -> f32[2] {\n"
    line = f"  ROOT %g = f32[2]{{0}} all-gather(%p), {groups}, dimensions={{0}}\n}}\n"
    (collective,) = read_collectives(head + line)
    assert collective.group == group and collective.leaving(4) == leaving
    assert collective.moved == 8 * (len(group) - 1) // len(group)


@pytest.mark.parametrize(
    "name, within",
    [
        ("jit(_step)/memory/gather", True),
        ("jit(_step)/jvp(memory)/while/body/dot_general", True),
        ("jit(_step)/while/body/transpose(jvp(memory))/mul", True),
        ("jit(_step)/jvp()/to_memory/mul", False),
        ("jit(memory_step)/mul", False),
    ],
)
def test_a_scope_is_recognised_in_the_name_of_its_gradient(name, within):
    assert Collective("all-gather", 4, 1, (0, 1), name, False).within("memory") == within
