"""Meshes, the table of rules, and where arrays end up."""

import jax
import numpy as np
import pytest
import world
from jax.sharding import PartitionSpec as P

from larimar_jax import decoders, model
from larimar_jax.train import sharding

UP = "decoder/layers/up/kernel"  # [1, 16, 32]


def _shardings(monkeypatch, mesh, *rules):
    """Return the shardings of tests/world.py's model whose decoder has these rules."""
    monkeypatch.setattr(decoders.family("gpt2"), "sharding_rules", rules)
    config = world.config("never read")
    abstract = model.AbstractModel(model.abstract(config))
    return sharding.parameter_shardings(config, abstract, sharding.make_mesh(mesh))


def test_a_mesh_takes_the_devices_that_its_shape_names(cpu_devices):
    assert dict(sharding.make_mesh((2, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh((-1, 2, 1)).shape["data"] == 4
    assert sharding.make_mesh((1, 1, 1)).size == 1
    with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
        sharding.make_mesh((16, 1, 1))
    with pytest.raises(ValueError, match="at most one of them -1"):
        sharding.make_mesh((-1, -1, 1))


def test_the_first_matching_rule_counts_and_an_optional_one_may_match_nothing(monkeypatch):
    up = (r"up/kernel$", (None, "fsdp", "tensor"))
    where = _shardings(monkeypatch, (2, 2, 2), ("nowhere", (), True), up, (".", ()))
    assert where[UP].spec == P(None, "fsdp", "tensor")
    assert where["decoder/layers/up/bias"].spec == where["decoder/word/embedding"].spec == P()


def test_every_rule_and_parameter_that_does_not_fit_is_named_at_once(monkeypatch):
    rules = ("kernel$", ()), ("nowhere", ()), ("never", ()), ("^norm/scale", (None, "fsdp"))
    with pytest.raises(sharding.ShardingRuleError) as error:
        _shardings(monkeypatch, (8, 1, 1), *rules)
    idle = "'^decoder/.*nowhere' matches no", "'^decoder/.*never' matches no"
    orphans = "decoder/word/embedding is matched by no", "decoder/norm/bias is matched by no"
    long = "decoder/norm/scale (16,) has fewer axes than the rule"
    assert all(text in str(error.value) for text in (*idle, *orphans, long))


def test_an_axis_that_does_not_divide_is_dropped_with_a_line_in_the_log(monkeypatch, caplog):
    caplog.set_level("INFO")
    where = _shardings(monkeypatch, (2, 2, 2), ("up/kernel$", ("tensor", "fsdp")), (".", ()))
    assert where[UP].spec == P(None, "fsdp")
    assert f"{UP}: 1 does not divide over tensor" in caplog.text


def test_batches_and_parameters_lie_where_their_specs_say():
    mesh = sharding.make_mesh((2, 2, 2))
    where = jax.NamedSharding(mesh, P("fsdp", "tensor"))
    placed = jax.device_put(np.arange(24.0, dtype=np.float32).reshape(4, 6), where)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    batch = sharding.place_batch({"tokens": np.arange(24, dtype=np.int32).reshape(8, 3)}, mesh)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["tokens"], np.arange(24).reshape(8, 3))
