"""Meshes, the table of rules, and where arrays end up."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from larimar_jax.train import sharding


def _shapes(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def test_a_mesh_takes_the_devices_that_its_shape_names(cpu_devices):
    assert dict(sharding.make_mesh((2, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh((-1, 2, 1)).shape["data"] == 4
    assert sharding.make_mesh((1, 1, 1)).size == 1
    with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
        sharding.make_mesh((16, 1, 1))
    with pytest.raises(ValueError, match="at most one of them -1"):
        sharding.make_mesh((-1, -1, 1))


def test_the_first_matching_rule_counts():
    rules = [("special", P(), False), ("kernel$", P("fsdp", "tensor"), False), ("no", P(), True)]
    specs = {"a/kernel": P("fsdp", "tensor"), "special/kernel": P()}
    assert sharding.match(rules, list(specs)) == specs


def test_every_rule_and_parameter_that_does_not_fit_is_named_at_once():
    rules = [("kernel$", P(), False), ("nowhere", P(), False), ("never", P(), False)]
    with pytest.raises(sharding.ShardingRuleError) as error:
        sharding.match(rules, ["a/kernel", "b/scale", "c/bias"])
    assert all(text in str(error.value) for text in ("'nowhere'", "'never'", "b/scale", "c/bias"))
    rules = [("a", P(None, "fsdp"), False)]
    with pytest.raises(sharding.ShardingRuleError, match="fewer axes than the rule"):
        sharding.shardings(sharding.make_mesh((8, 1, 1)), _shapes(a=(3,)), rules)


def test_an_axis_that_does_not_divide_is_dropped_with_a_line_in_the_log(caplog):
    caplog.set_level("INFO")
    mesh, rules = sharding.make_mesh((2, 2, 2)), [(".", P("tensor", "fsdp"), False)]
    where = sharding.shardings(mesh, _shapes(odd=(7, 4), even=(8, 4)), rules)
    assert where["odd"].spec == P(None, "fsdp") and where["even"].spec == P("tensor", "fsdp")
    assert "odd: 7 does not divide over tensor" in caplog.text


def test_batches_and_parameters_lie_where_their_specs_say():
    mesh = sharding.make_mesh((2, 2, 2))
    where = sharding.shardings(mesh, _shapes(a=(4, 6)), [("a", P("fsdp", "tensor"), False)])
    placed = jax.device_put({"a": np.arange(24.0, dtype=np.float32).reshape(4, 6)}, where)
    assert {shard.data.shape for shard in placed["a"].addressable_shards} == {(2, 3)}
    batch = sharding.place_batch({"tokens": np.arange(24, dtype=np.int32).reshape(8, 3)}, mesh)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(batch["tokens"], np.arange(24).reshape(8, 3))
