"""Every layout computes what one device does, and learns."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world

from larimar_jax import config as configs
from larimar_jax.data import corpus, episodes, pieces
from larimar_jax.train import guard, hlo, sharding
from larimar_jax.train.step import TrainStep, initialise
from larimar_jax.weights import Tokenizer

STEPS = 20
# Each axis alone or with others, each layout, and a batch in parts: a program each.
LAYOUTS = {
    "zero3": dict(mesh=(1, 8, 1)),
    "tensor": dict(mesh=(1, 1, 8)),
    "all-in-parts": dict(mesh=(2, 2, 2), accumulate=2, memory_layout="slots"),
    "zero2-in-parts": dict(mesh=(2, 2, 1), layout="zero2", accumulate=2),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, batches) of the smallest run that learns."""
    folder = tmp_path_factory.mktemp("world")
    config = world.config(world.write(folder / "world.jsonl"), steps=STEPS)
    source = corpus.open_corpus(config.data.corpus)
    tokenizer = Tokenizer.train((d.text for d in source.documents()), 300)
    data, towers = config.data, (tokenizer.framed(), tokenizer)
    tokenized = pieces.tokenize(source, False, data, *towers, folder=folder)
    stream = iter(episodes.episodes(tokenized, data.episode, data.batch, data.seed))
    return config, [next(stream) for _ in range(STEPS)]


@functools.cache
def drawn(text):
    """(skeleton, parameters as NumPy) of a config as JSON: its initialisers are compiled once."""
    config = configs.parse(json.loads(text))
    skeleton, parameters = initialise(config, sharding.make_mesh((1, 1, 1)))
    return skeleton, jax.device_get(parameters)


def trained(run, batches=None, watch=lambda state: None, **train):
    """(losses, last state, stepper); `watch` sees every state, the first included."""
    config, all_batches = run
    skeleton, parameters = drawn(json.dumps(configs.to_dict(config)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    mesh = sharding.make_mesh(config.train.mesh)
    parameters = sharding.place(parameters, skeleton.shardings(config, mesh))
    stepper = TrainStep(config, skeleton, mesh)
    frozen = stepper.freeze(parameters)
    state = stepper.begin({name: parameters[name] for name in stepper.trained})
    losses = []
    watch(state)
    for batch in all_batches[:batches]:
        state, found = stepper.step(state, frozen, sharding.place_batch(batch, mesh))
        watch(state)
        losses.append(float(found["loss"]))
    return losses, state, stepper


@pytest.fixture(scope="module")
def alone(run):
    return trained(run)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_has_the_losses_of_one_device(run, alone, layout):
    losses, state, stepper = trained(run, **layout)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    where = stepper.state_shardings
    kernel = "decoder/layers/up/kernel"
    _, fsdp, _ = layout.get("mesh", (1, 1, 1))
    whole = layout.get("layout") == "zero2"
    assert ("fsdp" in str(where.params[kernel].spec)) == (not whole)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (1, 16, 32)]
    held = {leaf.addressable_shards[0].data.size for leaf in moments}
    assert held == {16 * 32 // (fsdp * layout.get("mesh", (1, 1, 1))[2])}


@pytest.mark.parametrize("layout", ["zero3", "all-in-parts"])
def test_the_memory_algebra_needs_no_other_device(run, layout):
    _, _, stepper = trained(run, 0, **LAYOUTS[layout])
    sent = hlo.collectives(stepper.step.lower(*stepper.arguments(2)).compile().as_text())
    assert sent
    inside = [one for one in sent if one.kind != "all-reduce" and one.within("memory")]
    # M₀ by slots is gathered once, before any episode is written.
    slots = LAYOUTS[layout].get("memory_layout") == "slots"
    assert len(inside) <= slots and all(one.bytes <= 8 * 16 * 4 for one in inside), inside


def test_an_average_follows_the_parameters(run):
    names = ("decoder/layers/up/kernel", "memory/prior_memory")
    seen = []
    _, state, _ = trained(
        run, 3, ema=0.5, watch=lambda state: seen.append([np.asarray(state.params[n]) for n in names])
    )
    assert len(seen) == 1 + 3
    for index, name in enumerate(names):
        average = seen[0][index]
        for count, at in enumerate(seen[1:], 1):
            kept = min(0.5, (1 + count) / (10 + count))
            average = kept * average + (1 - kept) * at[index]
        np.testing.assert_allclose(state.average[name], average, rtol=1e-4, atol=1e-6)
    assert trained(run, 0)[1].average == {}


@pytest.mark.parametrize("name, mesh", [("adam", (1, 1, 1)), ("adafactor", (1, 4, 2))])
def test_other_optimizers_learn(run, name, mesh):
    losses, state, _ = trained(run, optimizer=name, learning_rate=2e-2, mesh=mesh)
    assert losses[-1] < 0.85 * losses[0]
    trained_size = sum(leaf.size for leaf in state.params.values())
    size = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    # Adafactor's second moments of these small matrices are not factored; it has no first ones.
    assert size <= (2.01 if name == "adam" else 1.2) * trained_size + 200


def test_a_batch_that_does_not_divide_says_what_would(run):
    with pytest.raises(ValueError, match="multiple of 16"):
        trained(run, 0, mesh=(8, 1, 1), accumulate=2)


def test_lora_trains_its_factors_alone(run):
    config, batches = run
    values = configs.to_dict(config)
    values["model"]["lora"] = dict(rank=2, scale=2.0, modules="^(encoder|decoder)/layers/attention/")
    values["train"]["frozen"] = ["^encoder/", "^decoder/"]
    losses, state, stepper = trained((configs.parse(values), batches), mesh=(2, 2, 2))
    assert losses[-1] < losses[0]
    factors = [name for name in stepper.trained if "/lora_" in name]
    assert len(factors) == 2 * 4 * 2
    others = {name for name in stepper.trained if "/lora_" not in name}
    assert others and all(name.startswith(("to_", "memory/")) for name in others)
    assert all(bool(jnp.any(state.params[n] != 0)) for n in factors)


def test_bfloat16_computes_and_masters_stay_float32(run):
    config, batches = run
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    losses, state, _ = trained((config, batches))
    assert losses[-1] < 0.85 * losses[0]
    assert {str(leaf.dtype) for leaf in state.params.values()} == {"float32"}


def test_a_spike_is_skipped_and_the_run_goes_on(run):
    config, batches = run
    settings = dict(on_bad_step="skip", spike=0.5)
    _, state, stepper = trained(run, 12, **settings)
    mesh = sharding.make_mesh((1, 1, 1))
    parameters = drawn(json.dumps(configs.to_dict(config)))[1]
    frozen = stepper.freeze(sharding.place(parameters, sharding.replicated(mesh)))
    wrong = {**batches[0], "decoder_tokens": batches[0]["decoder_tokens"][:, :, ::-1].copy()}
    before = jax.device_get((state.params, state.optimizer, state.loss))
    state, found = stepper.step(state, frozen, sharding.place_batch(wrong, mesh))
    assert not found["sound"] and found["loss"] > found["usual_loss"] + 0.5
    assert int(state.step) == 13
    after = jax.device_get((state.params, state.optimizer, state.loss))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, found = stepper.step(state, frozen, sharding.place_batch(batches[13], mesh))
    assert found["sound"] and int(state.step) == 14


def _found(**changes):
    usual = dict(
        sound=np.bool_(True), loss=1.0, gradient_norm=1.0, usual_loss=1.0, terms={"kl": 0.5},
        gradient_squares=np.array([1.0, 4.0]),
    )
    return usual | changes


def test_the_guard_skips_a_few_and_names_the_cause(run):
    train = dataclasses.replace(run[0].train, on_bad_step="skip", spike=0.5)
    watch = guard.Guard(train, ["a", "b"])
    good = {"a": jnp.ones(2)}
    assert watch.look(1, _found(), good) is None
    spike = _found(sound=np.bool_(False), loss=3.0)
    said = watch.look(2, spike, good)
    assert "step 2: the loss is 3" in said and "usual 1;" in said and "that of b; skipped" in said
    broken = dict(sound=np.bool_(False), loss=np.nan)
    for count in range(2, guard.MOST):
        assert f"{count} in a row" in watch.look(3, _found(**broken, terms={"kl": np.nan}), good)
    with pytest.raises(guard.BadStep, match="10th in a row"):
        watch.look(4, _found(**broken, gradient_squares=np.array([1.0, np.nan])), good)
    watch = guard.Guard(dataclasses.replace(train, on_bad_step="stop"), ["a", "b"])
    with pytest.raises(guard.BadStep, match="gradient of b"):
        watch.look(4, _found(**broken, gradient_squares=np.array([1.0, np.nan])), good)
