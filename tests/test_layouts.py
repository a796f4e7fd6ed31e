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
from larimar_jax.train import sharding
from larimar_jax.train.collectives import read_collectives
from larimar_jax.train.logging import BadStep, BadSteps
from larimar_jax.train.step import TrainStep, initialise
from larimar_jax.weights import Tokenizer

STEPS = 20
SOURCED = ("encoder", "decoder")
KERNEL = "decoder/layers/up/kernel"
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
    batches = iter(episodes.episodes(tokenized, data.episode, data.batch, data.seed))
    return config, [next(batches) for _ in range(STEPS)]


@functools.cache
def drawn(text):
    """(abstract model, parameters as NumPy) of a config as JSON: its initialisers compile once."""
    config = configs.parse(json.loads(text))
    abstract, parameters = initialise(config, sharding.make_mesh((1, 1, 1)))
    return abstract, jax.device_get(parameters)


def trained(run, batches=None, watch=lambda state: None, **train):
    """(losses, last state, step, frozen); `watch` is called with every state, the first included."""
    config, all_batches = run
    abstract, parameters = drawn(json.dumps(configs.to_dict(config)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    mesh = sharding.make_mesh(config.train.mesh)
    parameters = jax.device_put(parameters, sharding.parameter_shardings(config, abstract, mesh))
    step = TrainStep(config, abstract, mesh)
    frozen = step.freeze(parameters)
    state = step.init({name: parameters[name] for name in step.trained})
    losses = []
    watch(state)
    for batch in all_batches[:batches]:
        state, metrics = step.step(state, frozen, sharding.place_batch(batch, mesh))
        watch(state)
        losses.append(float(metrics["loss"]))
    return losses, state, step, frozen


@pytest.fixture(scope="module")
def alone(run):
    return trained(run)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_has_the_losses_of_one_device(run, alone, layout):
    losses, state, step, _ = trained(run, **layout)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    assert step.frozen == ["encoder/position/embedding"] and step.frozen[0] not in state.params
    shapes = [jax.tree.map(jnp.shape, end.params) for end in (state, alone[1])]
    assert shapes[0] == shapes[1]
    whole = layout.get("layout") == "zero2"
    assert ("fsdp" in str(step.state_shardings.params[KERNEL].spec)) == (not whole)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == (1, 16, 32)]
    _, fsdp, tensor = layout["mesh"]
    held = {leaf.addressable_shards[0].data.size for leaf in moments}
    assert held == {16 * 32 // (fsdp * tensor)}


@pytest.mark.parametrize("layout", ["zero3", "all-in-parts"])
def test_the_memory_algebra_needs_no_other_device(run, layout):
    _, _, step, _ = trained(run, 0, **LAYOUTS[layout])
    collectives = read_collectives(step.step.lower(*step.arguments(2)).compile().as_text())
    assert collectives
    inside = [c for c in collectives if c.kind != "all-reduce" and c.within("memory")]
    # M₀ by slots is gathered once, before any episode is written.
    slots = LAYOUTS[layout].get("memory_layout") == "slots"
    assert len(inside) <= slots and all(c.bytes <= 8 * 16 * 4 for c in inside), inside


def test_a_batch_in_parts_is_reduced_over_devices_once(run):
    def moved(**train):
        _, _, step, _ = trained(run, 0, mesh=(1, 2, 1), layout="zero2", **train)
        text = step.step.lower(*step.arguments(2)).compile().as_text()
        return sum(c.moved for c in read_collectives(text))

    assert moved(accumulate=4) < 1.2 * moved()


def test_an_episode_of_padding_on_one_device_keeps_no_other_waiting(run):
    """The exact memory branches on its facts, so that devices may take different branches."""
    config, batches = run
    exact = configs.to_dict(config) | {"memory": {"variant": "direct", "slots": 8}}
    padded = {name: array.copy() for name, array in batches[0].items()}
    for name in ("encoder_mask", "decoder_mask"):
        padded[name][0] = False
    branching = (configs.parse(exact), [padded, batches[1]])
    losses, _, step, _ = trained(branching, mesh=(1, 2, 1))
    np.testing.assert_allclose(losses, trained(branching)[0], rtol=1e-5)
    text = step.step.lower(*step.arguments(2)).compile().as_text()
    assert " conditional(" in text
    assert [c for c in read_collectives(text) if c.conditional] == []


def test_an_average_follows_the_parameters(run):
    names = (KERNEL, "memory/prior_memory")
    history = []
    _, state, _, _ = trained(
        run, 3, ema=0.5, watch=lambda s: history.append([np.asarray(s.params[n]) for n in names])
    )
    assert len(history) == 1 + 3
    for index, name in enumerate(names):
        average = history[0][index]
        for count, at in enumerate(history[1:], 1):
            decay = min(0.5, (1 + count) / (10 + count))
            average = decay * average + (1 - decay) * at[index]
        np.testing.assert_allclose(state.average[name], average, rtol=1e-4, atol=1e-6)
    assert trained(run, 0)[1].average == {}


@pytest.mark.parametrize(
    "name, mesh", [("adam", (1, 1, 1)), ("adafactor", (1, 4, 2)), ("muon", (1, 4, 2))]
)
def test_other_optimizers_learn(run, name, mesh):
    losses, state, _, _ = trained(run, optimizer=name, learning_rate=2e-2, mesh=mesh)
    assert losses[-1] < 0.85 * losses[0]
    trained_size = sum(leaf.size for leaf in state.params.values())
    size = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    # Adafactor's second moments of these small matrices are not factored; it has no first ones. Muon
    # has no second ones of kernels.
    bound = {"adam": 2.01, "adafactor": 1.2, "muon": 1.8}[name]
    assert size <= bound * trained_size + 200


def test_a_batch_that_does_not_divide_is_an_error_with_sizes_that_do(run):
    with pytest.raises(ValueError, match="multiple of 16"):
        trained(run, 0, mesh=(8, 1, 1), accumulate=2)


def test_lora_trains_its_factors_alone(run):
    config, batches = run
    values = configs.to_dict(config)
    modules = "^(encoder|decoder)/layers/attention/"
    values["model"]["lora"] = dict(rank=2, scale=2.0, modules=modules)
    values["train"]["frozen"] = ["^encoder/", "^decoder/"]
    losses, state, step, _ = trained((configs.parse(values), batches), mesh=(2, 2, 2))
    assert losses[-1] < losses[0]
    factors = [name for name in step.trained if "/lora_" in name]
    assert len(factors) == 2 * 4 * 2
    rest = set(step.trained) - set(factors)
    assert rest and all(name.startswith(("to_", "memory/")) for name in rest)
    assert all(bool(jnp.any(state.params[n] != 0)) for n in factors)


def test_bfloat16_computes_and_masters_stay_float32(run):
    config, batches = run
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    losses, state, _, _ = trained((config, batches))
    assert losses[-1] < 0.85 * losses[0]
    assert {str(leaf.dtype) for leaf in state.params.values()} == {"float32"}


def test_frozen_kernels_of_a_source_are_held_as_they_are_multiplied(run):
    """Half of the bytes, and the same numbers but for what XLA adds up in another order."""
    config, batches = run
    frozen = dataclasses.replace(config.train, frozen=("^(encoder|decoder)/",))
    model = dataclasses.replace(config.model, dtype="bfloat16")
    config = dataclasses.replace(config, train=frozen, model=model)
    abstract, parameters = drawn(json.dumps(configs.to_dict(config)))
    mesh, losses, held = sharding.make_mesh((1, 1, 1)), [], []
    for source in (None, "elsewhere"):
        towers = {n: dataclasses.replace(getattr(model, n), source=source) for n in SOURCED}
        sourced = dataclasses.replace(config, model=dataclasses.replace(model, **towers))
        step = TrainStep(sourced, abstract, mesh)
        parts = step.freeze(jax.tree.map(jnp.asarray, parameters))
        dtypes = [jax.tree.map(lambda a: a.dtype, tree) for tree in (parts, step.arguments(2)[1])]
        assert dtypes[0] == dtypes[1]
        state = step.init({name: jnp.asarray(parameters[name]) for name in step.trained})
        batch = sharding.place_batch(batches[0], mesh)
        losses.append(float(step.step(state, parts, batch)[1]["loss"]))
        held.append(parts)
    np.testing.assert_allclose(*losses, rtol=1e-3)
    low = {name for name, leaf in held[1].items() if leaf.dtype == jnp.bfloat16}
    assert low and all(name.endswith(("kernel", "decoder/word/embedding")) for name in low)
    assert all(leaf.dtype == jnp.float32 for leaf in held[0].values())


def test_a_spike_is_skipped_and_the_run_goes_on_at_the_same_learning_rate(run):
    batches, mesh = run[1], sharding.make_mesh((1, 1, 1))
    _, state, step, frozen = trained(run, 12, on_bad_step="skip", spike=0.5)
    wrong = {**batches[0], "decoder_tokens": batches[0]["decoder_tokens"][:, :, ::-1].copy()}
    before = jax.device_get((state.params, state.optimizer, state.loss))
    state, metrics = step.step(state, frozen, sharding.place_batch(wrong, mesh))
    assert not metrics["sound"] and metrics["loss"] > metrics["usual_loss"] + 0.5
    assert int(state.step) == 13
    rate = float(metrics["learning_rate"])
    after = jax.device_get((state.params, state.optimizer, state.loss))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, metrics = step.step(state, frozen, sharding.place_batch(batches[13], mesh))
    assert metrics["sound"] and int(state.step) == 14 and float(metrics["learning_rate"]) == rate


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(run):
    _, state, step, frozen = trained(run, 0)
    name = "decoder/word/embedding"
    nan = state.params[name] * jnp.float32(np.nan)
    state = state._replace(params={**state.params, name: nan})
    before = jax.device_get(state)
    state, metrics = step.step(state, frozen, sharding.place_batch(run[1][0], step.mesh))
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def _metrics(**changes):
    usual = dict(sound=np.bool_(True), loss=1.0, gradient_norm=1.0, usual_loss=1.0)
    return {**usual, "terms": {"kl": 0.5}, "gradient_squares": np.array([1.0, 4.0]), **changes}


def test_the_policy_skips_a_few_bad_steps_and_names_the_cause(run):
    train = dataclasses.replace(run[0].train, on_bad_step="skip", spike=0.5)
    policy, params = BadSteps(train, ["a", "b"]), {"a": jnp.ones(2)}
    assert policy.check(1, _metrics(), params) is None
    report = policy.check(2, _metrics(sound=np.bool_(False), loss=3.0), params)
    assert "step 2: the loss is 3" in report and "usual 1;" in report
    assert "that of b; skipped" in report
    broken = dict(sound=np.bool_(False), loss=np.nan)
    for count in range(2, BadSteps.LIMIT):
        report = policy.check(3, _metrics(**broken, terms={"kl": np.nan}), params)
        assert f"{count} in a row" in report and "loss term kl" in report
    broken["gradient_squares"] = np.array([1.0, np.nan])
    with pytest.raises(BadStep, match="10th in a row"):
        policy.check(4, _metrics(**broken), params)
    policy = BadSteps(dataclasses.replace(train, on_bad_step="stop"), ["a", "b"])
    with pytest.raises(BadStep, match="gradient of b"):
        policy.check(4, _metrics(**broken), params)
