"""A memory on disk: exact, on any mesh, of its encoder alone; merged and subtracted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larimar_jax import memory
from larimar_jax.memory import sharded
from larimar_jax.memory.streaming import Streaming
from larimar_jax.train import memories
from larimar_jax.train.memories import MemoryFileError

K, C = 16, 12


def facts(seed, n):
    rng = np.random.default_rng(seed)
    return tuple(jnp.float32(rng.standard_normal((n, C))) for _ in range(2))


@functools.cache
def built():
    variant = Streaming(K, C)
    prepared = variant.prepare(variant.init(jax.random.key(0)))
    return variant, prepared, variant.write


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_it_comes_back_bit_for_bit_onto_any_mesh(tmp_path):
    variant, prepared, write = built()
    state = write(prepared, variant.empty(prepared), *facts(0, 9))
    memories.save(tmp_path / "one", state, encoder="abc", about={"facts": 9})
    like = jax.eval_shape(variant.empty, prepared)
    loaded, about = memories.load(tmp_path / "one", like, encoder="abc")
    equal(loaded, state)
    assert about == {"facts": 9}
    mesh = jax.make_mesh((8,), ("slots",), axis_types=(jax.sharding.AxisType.Auto,))
    place = sharded.Place(mesh, "slots")
    split = sharded.empty(variant, prepared, place)
    rows, _ = memories.load(tmp_path / "one", split, encoder="abc")
    equal(rows, state)
    assert rows.solution.sharding.shard_shape((K, C)) == (K // 8, C)
    memories.save(tmp_path / "rows", rows, encoder="abc")
    equal(memories.load(tmp_path / "rows", like, encoder="abc")[0], state)


def test_what_does_not_fit_is_named(tmp_path):
    variant, prepared, _ = built()
    path, encoder = tmp_path / "one", "0123456789abcdefXYZ"
    memories.save(path, variant.empty(prepared), encoder=encoder)
    like = jax.eval_shape(variant.empty, prepared)
    direct = jax.eval_shape(memory.build("direct", slots=K, latent=C).empty, prepared)
    small = Streaming(K, C - 2)
    small = jax.eval_shape(small.empty, small.prepare(small.init(jax.random.key(0))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError, match="never written over"):
        memories.save(path, variant.empty(prepared), encoder="abc")
    with pytest.raises(FileNotFoundError, match="no memory in"):
        memories.load(tmp_path / "two", like, encoder=encoder)

    def refuse(message, path=path, like=like, encoder=encoder):
        with pytest.raises(MemoryFileError, match=message):
            memories.load(path, like, encoder=encoder)

    refuse("of the encoder 0123456789abcdef; .* is xyz", encoder="xyz")
    refuse("a StreamingState .*another variant", like=direct)
    refuse(r"solution: \(16, 12\) there, \(16, 10\) asked for", like=small)
    refuse("no memory, or a damaged one", path=tmp_path / "empty")
    meta = path / "meta" / "metadata"
    meta.write_text(meta.read_text().replace("StreamingState", "StreamingStale"))
    refuse("checksum of meta differs")


def test_merging_is_writing_both_and_subtracting_forgets():
    variant, prepared, write = built()
    first, second = facts(1, 7), facts(2, 5)
    one, two = (write(prepared, variant.empty(prepared), *rows) for rows in (first, second))
    both = write(prepared, one, *second)
    merged = variant.combine(prepared, one, two)
    np.testing.assert_allclose(merged.solution, both.solution, rtol=1e-5, atol=1e-6)
    assert int(merged.count) == 12
    back = variant.combine(prepared, merged, two, -1)
    np.testing.assert_allclose(back.solution, one.solution, rtol=1e-4, atol=1e-5)
    assert int(back.count) == 7 and int(back.refused) == 0
    # What is not in cannot be taken out.
    other = write(prepared, variant.empty(prepared), *(3.0 * x for x in facts(3, 5)))
    refused = variant.combine(prepared, one, other, sign=-1)
    np.testing.assert_array_equal(refused.solution, one.solution)
    assert int(refused.refused) == 5 and int(refused.count) == 7
