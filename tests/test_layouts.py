"""Every layout computes what one device does, and learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world

from larimar_jax import config as configs
from larimar_jax.data import corpus, episodes, pieces, store
from larimar_jax.train import hlo, sharding
from larimar_jax.train.step import Stepper, initialise
from larimar_jax.weights import Tokenizer

STEPS = 20
LAYOUTS = {
    "data": dict(mesh=(8, 1, 1)),
    "zero3": dict(mesh=(1, 8, 1)),
    "zero2": dict(mesh=(1, 8, 1), layout="zero2"),
    "tensor": dict(mesh=(1, 1, 8)),
    "all, in parts, slots": dict(mesh=(2, 2, 2), accumulate=2, memory_layout="slots"),
    "zero2 in parts": dict(mesh=(2, 2, 1), layout="zero2", accumulate=2),
    "parts": dict(accumulate=4),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, batches) of the smallest run that learns."""
    folder = tmp_path_factory.mktemp("world")
    config = world.config(world.write(folder / "world.jsonl"), steps=STEPS)
    source = corpus.open_corpus(config.data.corpus)
    tokenizer = Tokenizer.train((d.text for d in source.documents()), 300)
    texts = pieces.pieces(source.side(False), "sentence", 22, len)
    data = config.data
    lengths = (data.encoder_tokens, data.decoder_tokens)
    recipe = store.Recipe("w", "training", "sentence", "e", "d", *lengths)
    made = store.open_or_make(recipe, texts, tokenizer.framed(), tokenizer, folder=folder)
    stream = iter(episodes.episodes(made, data.episode, data.batch, data.seed))
    return config, [next(stream) for _ in range(STEPS)]


def trained(run, batches=None, **train):
    """(losses, last state, stepper)"""
    config, all_batches = run
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    mesh = sharding.make_mesh(config.train.mesh)
    skeleton, parameters = initialise(config, mesh)
    stepper = Stepper(config, skeleton, mesh)
    frozen = stepper.freeze(parameters)
    state = stepper.begin({name: parameters[name] for name in stepper.trained})
    losses = []
    for batch in all_batches[:batches]:
        state, found = stepper.step(state, frozen, sharding.place_batch(batch, mesh))
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


@pytest.mark.parametrize("layout", ["zero3", "all, in parts, slots"])
def test_the_memory_algebra_needs_no_other_device(run, layout):
    config, _ = run
    train = dataclasses.replace(config.train, **LAYOUTS[layout])
    config = dataclasses.replace(config, train=train)
    mesh = sharding.make_mesh(config.train.mesh)
    stepper = Stepper(config, initialise(config, mesh)[0], mesh)
    sent = hlo.collectives(stepper.step.lower(*stepper.arguments(2)).compile().as_text())
    assert sent
    inside = [one for one in sent if "/memory/" in one.name and one.kind != "all-reduce"]
    # M₀ by slots is gathered once, before any episode is written.
    slots = train.memory_layout == "slots"
    assert len(inside) <= slots and all(one.bytes <= 8 * 16 * 4 for one in inside), inside


def test_an_average_follows_the_parameters(run):
    _, state, _ = trained(run, 3, ema=0.5)
    names = ("decoder/layers/up/kernel", "memory/prior")
    _, first, _ = trained(run, 1, ema=0.5)
    _, second, _ = trained(run, 2, ema=0.5)
    _, begin, _ = trained(run, 0, ema=0.5)
    for name in names:
        average = np.asarray(begin.params[name])
        for count, at in enumerate((first, second, state), 1):
            kept = min(0.5, (1 + count) / (10 + count))
            average = kept * average + (1 - kept) * np.asarray(at.params[name])
        np.testing.assert_allclose(state.average[name], average, rtol=1e-4, atol=1e-6)
    assert trained(run, 1)[1].average == {}


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_other_optimizers_learn_in_a_layout(run, name):
    losses, state, _ = trained(run, optimizer=name, learning_rate=2e-2, mesh=(1, 4, 2))
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
