"""A memory in rows over eight devices is the memory on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algebra import close, prepare

from larimar_jax.memory import sharded
from larimar_jax.memory.addressing import Linear, RandomFeatures
from larimar_jax.memory.streaming import Streaming


def place():
    mesh = jax.make_mesh((8,), ("slots",), axis_types=(jax.sharding.AxisType.Auto,))
    return sharded.Place(mesh, "slots")


@pytest.mark.parametrize("slots, latent, facts", [(64, 24, 40), (4096, 32, 100)])
def test_it_equals_the_memory_on_one_device(slots, latent, facts):
    rng, where = np.random.default_rng(0), place()
    # κ(A) is about 100: float32 then holds M to 1e-5.
    variant = Streaming(slots, latent, ridge=0.1, addressing=RandomFeatures(2.0))
    prepared = prepare(variant, rng.standard_normal((slots, latent)))
    keys, values = jnp.float32(rng.standard_normal((2, facts, latent)))
    update = jax.jit(functools.partial(sharded.update, variant, place=where))
    start = sharded.empty(variant, prepared, where)
    state = update(prepared, start, keys, values, 1)
    whole = variant.write(prepared, variant.empty(prepared), keys, values)
    for part in (state.gram.high, state.factor, state.solution):
        assert part.sharding.shard_shape(part.shape)[0] == slots // 8
    close(state.solution, whole.solution, 1e-5)
    latents = sharded.read(variant, prepared, state, keys, place=where)
    close(latents, variant.read(prepared, whole, keys).latent, 1e-5)
    assert int(state.count) == facts
    if slots > 64:
        return
    close(state.factor, whole.factor, 1e-5)
    # Forgetting, in any order; and what was never written is refused.
    left = update(prepared, state, keys[3:5], values[3:5], -1)
    rest = np.delete(np.arange(facts), [3, 4])
    never = variant.write(prepared, variant.empty(prepared), keys[rest], values[rest])
    close(left.solution, never.solution, 1e-4)
    before = update(prepared, start, keys[:2], values[:2], 1)
    refused = update(prepared, before, 5.0 * keys[9:10], values[9:10], -1)
    assert int(refused.refused) == 1 and int(refused.count) == 2
    np.testing.assert_array_equal(refused.solution, before.solution)


def test_no_device_gathers_a_matrix_of_all_slots():
    variant, where = Streaming(256, 16, addressing=Linear()), place()
    prepared = prepare(variant, np.ones((256, 16)))
    update = jax.jit(functools.partial(sharded.update, variant, place=where))
    facts = jnp.ones((4, 16))
    arguments = (prepared, sharded.empty(variant, prepared, where), facts, facts, 1)
    text = update.lower(*arguments).compile().as_text()
    assert "f32[256,32]" in text and "f32[256,256]" not in text


def test_devices_that_do_not_divide_the_slots_are_an_error():
    variant = Streaming(12, 8)
    with pytest.raises(ValueError, match="12 slots do not divide over the 8 devices"):
        sharded.empty(variant, prepare(variant, np.eye(12, 8)), place())
