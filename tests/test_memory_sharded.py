"""A memory in rows over eight devices is the memory on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import memory
from larimar_jax.memory import sharded
from larimar_jax.memory.streaming import Streaming


def mesh():
    return jax.make_mesh((8,), ("slots",), axis_types=(jax.sharding.AxisType.Auto,))


def close(got, want, tolerance):
    got, want = np.float64(got), np.float64(want)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("slots, latent, facts", [(64, 24, 40), (4096, 32, 100)])
def test_it_equals_the_memory_on_one_device(slots, latent, facts):
    rng = np.random.default_rng(0)
    # κ(A) is about 100: float32 then holds M to 1e-5.
    variant = Streaming(slots, latent, ridge=0.1, addressing="features", width=2.0)
    m0 = jnp.float32(rng.standard_normal((slots, latent)))
    prepared = variant.prepare(memory.MemoryParams(m0, jnp.zeros(())))
    keys, values = (jnp.float32(rng.standard_normal((facts, latent))) for _ in range(2))
    place = sharded.Place(mesh(), "slots")
    write = jax.jit(functools.partial(sharded.write, variant, place=place))
    state = write(prepared, sharded.empty(variant, prepared, place), keys, values)
    one = variant.write(prepared, variant.empty(prepared), keys, values)
    for part in ("gram.high", "factor", "solution"):
        found = functools.reduce(getattr, part.split("."), state)
        assert found.sharding.shard_shape(found.shape)[0] == slots // 8
    close(state.solution, one.solution, 1e-5)
    close(sharded.read(variant, prepared, state, keys, place=place), variant.read(prepared, one, keys).latent,
          1e-5)
    assert int(state.count) == facts
    if slots > 64:
        return
    close(state.factor, one.factor, 1e-5)
    # Forgetting, in any order; and what was never written is refused.
    gone = write(prepared, state, keys[3:5], values[3:5], -1)
    rest = np.delete(np.arange(facts), [3, 4])
    never = variant.write(prepared, variant.empty(prepared), keys[rest], values[rest])
    close(gone.solution, never.solution, 1e-4)
    before = write(prepared, sharded.empty(variant, prepared, place), keys[:2], values[:2])
    refused = write(prepared, before, 5.0 * keys[9:10], values[9:10], -1)
    assert int(refused.refused) == 1 and int(refused.count) == 2
    np.testing.assert_array_equal(refused.solution, before.solution)


def test_no_device_gathers_a_matrix_of_all_slots():
    variant = Streaming(256, 16, addressing="linear")
    prepared = variant.prepare(memory.MemoryParams(jnp.ones((256, 16)), jnp.zeros(())))
    place = sharded.Place(mesh(), "slots")
    write = jax.jit(functools.partial(sharded.write, variant, place=place))
    arguments = (prepared, sharded.empty(variant, prepared, place), jnp.ones((4, 16)), jnp.ones((4, 16)))
    text = write.lower(*arguments).compile().as_text()
    assert "f32[256,32]" in text and "f32[256,256]" not in text


def test_devices_that_do_not_divide_the_slots_are_an_error():
    variant = Streaming(12, 8)
    prepared = variant.prepare(variant.init(jax.random.key(0)))
    with pytest.raises(ValueError, match="12 slots do not divide over the 8 devices"):
        sharded.empty(variant, prepared, sharded.Place(mesh(), "slots"))
