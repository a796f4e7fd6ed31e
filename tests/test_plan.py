"""Plans of real sizes, compiled here for devices that are not here."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from larimar_jax import config as configs
from larimar_jax.train import flops, hlo, plan

ROOT = Path(__file__).parents[1]
# Of Hugging Face's models: transformers' num_parameters() of bert-large-cased, gpt2-large (with three
# rows of 1,280 for the added tokens), gpt-j-6b.
TOWERS = {
    "larimar_1b3": {"encoder": 333_579_264, "decoder": 774_030_080 + 3 * 1280},
    "larimar_6b": {"encoder": 333_579_264, "decoder": 6_050_882_784},
}


def _plan(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    line = [sys.executable, "-m", "larimar_jax.cli", "plan", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("name", TOWERS)
def test_the_papers_models_fit_a_node(name):
    config = f"configs/{name}.py"
    done = _plan("--config", config, "--devices", "8", "--memory", "80GB", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {part: found["parameters"][part] for part in TOWERS[name]} == TOWERS[name]
    assert found["parameters"]["memory"] == 512 * 768 + 1
    assert found["fits"] and found["bytes_per_device"]["together"] < 0.5 * 80e9
    # Every parameter is a float32 with two moments, and 1/8 of them here; zero2 holds all parameters.
    total = sum(found["parameters"].values())
    assert found["bytes_per_device"]["optimizer"] == pytest.approx(8 * total / 8, rel=0.02)
    whole = 8 if name == "larimar_1b3" else 1
    assert found["bytes_per_device"]["parameters"] == pytest.approx(4 * total * whole / 8, rel=0.02)
    assert found["memory_collectives"] == []
    # 6 FLOPs a parameter and token of each route, and a little for attention and logits.
    assert found["model_flops"] > 0 and found["flops"] > 1.15 * found["model_flops"]


def test_what_does_not_fit_is_told_what_to_change():
    # Whole parameters and moments on both devices do not fit; split over them they do.
    small = ["train.mesh=[2,1,1]", "data.batch=2", "data.episode=[2]", "model.encoder.mlp=4096"]
    line = ["--config", "configs/tiny.py", "--devices", "2", "--memory", "40MB", "--set", *small]
    done = _plan(*line)
    assert done.returncode == 1, done.stderr
    assert "does NOT fit" in done.stdout and "--set train.mesh=[1,2,1]\n" in done.stdout


def test_changes_are_cumulative_and_in_the_order_of_their_cost():
    config = configs.load(ROOT / "configs" / "tiny.py")
    train = dataclasses.replace(config.train, mesh=(2, 2, 1), layout="zero2")
    said = [list(what.items()) for what, _ in plan.changes(dataclasses.replace(config, train=train))]
    assert said[-1] == [
        ("train.mesh", "[1,4,1]"),
        ("train.layout", "zero3"),
        ("model.dtype", "bfloat16"),
        ("model.remat", "layers"),
        ("train.accumulate", "2"),
        ("train.optimizer", "adafactor"),
    ]
    assert [dict(one)["model.remat"] for one in said[3:5]] == ["dots", "layers"]


def test_a_mesh_of_other_devices_is_an_error():
    with pytest.raises(configs.ConfigError, match=r"--set train.mesh=\[1,8,1\]"):
        plan.load(ROOT / "configs" / "tiny.py", [], 8)
    assert plan.load(ROOT / "configs" / "tiny.py", ["train.mesh=[2,-1,1]"], 8).train.mesh == (2, 4, 1)


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("40 GiB", 40 * 2**30), ("24e9", 24e9)])
def test_sizes_are_read(text, size):
    assert plan.parse(text) == size


def test_a_size_that_is_none_says_how_to_write_one():
    with pytest.raises(ValueError, match="80GB"):
        plan.parse("much")


def test_flops_count_loops_branches_and_devices():
    a, b = jnp.zeros((3, 4)), jnp.zeros((4, 5))
    one = 2 * 3 * 4 * 5
    assert flops.count(lambda a, b: a @ b, a, b) == one
    batched = jax.vmap(lambda a, b: a @ b)
    assert flops.count(batched, jnp.zeros((7, 3, 4)), jnp.zeros((7, 4, 5))) == 7 * one

    def looped(a, b):
        return jax.lax.scan(lambda c, _: (c, jax.jit(jnp.matmul)(a, b).sum()), 0.0, None, length=6)[1]

    assert flops.count(looped, a, b) == 6 * one
    # Backwards there are two products for each; with rematerialisation one more.
    square = jnp.zeros((4, 4))

    def loss(x):
        return jnp.sum((x @ x) @ x)

    plain = flops.count(jax.grad(loss), square)
    assert plain == 6 * 2 * 4**3
    assert flops.count(jax.grad(jax.checkpoint(loss)), square) > plain
    branch = flops.count(lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b, lambda: a @ b + 1), a, b)
    assert branch == one
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = dict(in_specs=(jax.P("x"), jax.P()), out_specs=jax.P("x"))
    split = jax.shard_map(lambda a, b: a @ b, mesh=mesh, **specs)
    assert flops.count(split, jnp.zeros((24, 4)), b) == 8 * one


def test_collectives_are_counted_as_often_as_they_run():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.P())

    def function(x):
        def step(c, _):
            return jax.lax.with_sharding_constraint(c * 2.0 + c.sum(), rows), None

        x = jax.lax.scan(step, x, None, length=5)[0]
        return jax.lax.with_sharding_constraint(x, whole)

    compiled = jax.jit(function, in_shardings=rows, out_shardings=whole).lower(
        jax.ShapeDtypeStruct((64, 4), jnp.float32)
    ).compile()
    found = hlo.collectives(compiled.as_text())
    kinds = {(one.kind, one.times, one.group) for one in found}
    assert kinds == {("all-reduce", 5, 8), ("all-gather", 1, 8)}
    gathered = next(one for one in found if one.kind == "all-gather")
    assert gathered.bytes == 64 * 4 * 4 and gathered.moved == gathered.bytes * 7 // 8
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.collectives("nothing")


def test_asynchronous_collectives_are_read_as_a_gpu_writes_them():
    text = """HloModule jit_step, is_scheduled=true, num_partitions=8

%wrapped (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %all-gather-start.1 = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], META
  %all-gather-done.1 = f32[64]{0} all-gather-done(%all-gather-start.1)
  %async-start = ((f32[64]{0}), f32[8]{0}, u32[]) async-start(%all-gather-done.1), calls=%wrapped
  %async-done = f32[8]{0} async-done(%async-start), calls=%wrapped
  ROOT %all-reduce.3 = f32[16]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}
""".replace("META", 'metadata={op_name="jit(step)/memory/gather"}')
    found = {one.kind: one for one in hlo.collectives(text)}
    assert {kind: (one.bytes, one.times, one.group) for kind, one in found.items()} == {
        "all-gather": (256, 1, 4),
        "reduce-scatter": (32, 1, 8),
        "all-reduce": (64, 1, 8),
    }
    assert found["all-gather"].name == "jit(step)/memory/gather"


@pytest.mark.parametrize(
    "name, found",
    [
        ("jit(_step)/memory/gather", True),
        ("jit(_step)/jvp(memory)/while/body/dot_general", True),
        ("jit(_step)/while/body/transpose(jvp(memory))/mul", True),
        ("jit(_step)/jvp()/to_memory/mul", False),
        ("jit(memory_step)/mul", False),
    ],
)
def test_a_scope_is_known_from_what_its_gradient_is_called(name, found):
    assert hlo.Collective("all-gather", 4, 1, 8, name).within("memory") == found
