"""The comparisons: both sides compute the same, and only then are they timed, in turns."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from comparisons import Disagreement, __main__, generation, scoring, timing, torch_step, training
from known_editor import cases, saved

from larimar_jax import config as configs
from larimar_jax import pipeline, weights

TOWER = dict(width=24, depth=2, heads=4, mlp=40, max_length=64)
BERT = TOWER | dict(family="bert", vocab_size=90, type_vocab=2, norm_eps=1e-12)
GPT2 = TOWER | dict(family="gpt2", vocab_size=110, norm_eps=1e-5)
LLAMA = TOWER | dict(
    family="llama", vocab_size=110, kv_heads=2, head_size=6, rope_theta=1e4, rope_scaling=None,
    norm_eps=1e-5, tied_head=True, attention_bias="none", mlp_bias=False, window=0, unwindowed=0,
)  # fmt: skip
LORA = 'model.lora={"rank": 3, "scale": 0.5, "modules": "^decoder/layers/"}'
needs_torch = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="torch or transformers is not installed: pip install -e '.[compare]'",
)


def tiny_step(decoder, *changes):
    """The timed config or the default model's with tiny towers, and settings that differ."""
    name, slots = ("training_step.py", 12) if decoder is GPT2 else ("smol.py", 30)
    values = configs.load_dict(Path(training.CONFIG).with_name(name))
    pooling = dict(pooling="cls" if decoder is GPT2 else "mean", normalize=decoder is LLAMA)
    values["model"] |= dict(encoder=BERT | pooling, decoder=decoder, latent=20)
    values["memory"]["slots"] = slots
    values["data"] = dict(encoder_tokens=8, decoder_tokens=10, episode=(3,), batch=2)
    return configs.load(values, changes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "REST", 0.0)


STEPS = {
    "fused": (GPT2, 'train.frozen=["^decoder/layers/attention/(query|key|value)/"]'),
    "low-rank": (LLAMA, LORA),
    # β counts, all routes are decoded, the prior is wide.
    "trained": (LLAMA, "train.frozen=[]", "objective.kl=0.3", "objective.autoencoding=0.5",
                "objective.language=2.0", "memory.slots=12", "model.slots_per_layer=3",
                "model.decoder.tied_head=false"),
    "partly": (LLAMA, 'train.frozen=["^encoder/layers/", "^to_slots/", "^decoder/layers/.*/kernel$"]',
               'model.lora={"rank": 2, "scale": 2.0, "modules": "(query|up)$"}',
               "model.tied_slots=true", "model.decoder.attention_bias=qkv",
               "model.encoder.pooling=cls", "objective.kl=0.3"),
}  # fmt: skip


@needs_torch
@pytest.mark.parametrize("name", STEPS)
def test_the_torch_step_computes_the_same(name):
    config = tiny_step(*STEPS[name])
    ours = training.OurStep(config)
    theirs = torch_step.TorchStep(config, ours.model()).losses(ours.batch)
    routes = ("reconstruction", "autoencoding", "language")
    assert set(theirs) == {"loss", "kl", "gradient_norm"} | {
        route for route in routes if getattr(config.objective, route)
    }
    assert training.agreement(ours.losses(), theirs) < training.AGREEMENT


@needs_torch
def test_a_step_is_timed_beside_torch_where_all_of_it_can_be_computed():
    step, memory = training.compare(tiny_step(GPT2), 2)
    assert (len(step.plain.wall), len(step.ours.cpu), step.wanted) == (2, 2, 1.0)
    assert memory.plain is step.ours and "losses and gradients within" in step.agreement
    config = tiny_step(GPT2, 'train.frozen=["^decoder/layers/attention/key/kernel$"]')
    with pytest.raises(ValueError, match=r"attention/key/kernel.*Freeze all of them"):
        training.compare(config, 1)
    config = tiny_step(GPT2, "model.remat=layers", "train.accumulate=2", "data.episode=[3, 4]")
    with pytest.raises(ValueError, match=r"(?s)model.remat.*accumulate.*data.episode"):
        training.compare(config, 1)


@needs_torch
@pytest.mark.parametrize("products", ["null", "bfloat16"])
def test_a_step_in_torch_moves_what_is_trained_and_nothing_else(products):
    import torch

    config = tiny_step(LLAMA, LORA, f"train.products={products}")
    ours = training.OurStep(config)
    step = torch_step.TorchStep(config, ours.model())
    table = step.larimar.decoder.get_input_embeddings().weight
    layer = step.larimar.decoder.model.layers[0].mlp.up_proj
    before = {name: [t.clone() for t in ts] for name, ts in step.larimar.trained.items()}
    table_before, kernel_before = table.clone(), layer.weight.clone()
    step.step(ours.batch)
    for name, tensors in step.larimar.trained.items():
        for tensor, old in zip(tensors, before[name], strict=True):
            # The first step of Adam moves nearly every number by the rate.
            moved = float((tensor - old).detach().abs().max())
            assert tensor.dtype == torch.float32
            assert 0 < moved <= config.train.learning_rate * 1.01, name
    torch.testing.assert_close(table, table_before, rtol=0, atol=0)
    rounded = kernel_before if products == "null" else kernel_before.bfloat16()
    torch.testing.assert_close(layer.weight, rounded, rtol=0, atol=0)


def test_sides_that_compute_differently_are_not_timed():
    ours, theirs = {"loss": 1.0, "gradient_norm": 1.0005}, {"loss": 1.0, "gradient_norm": 1.0}
    assert training.agreement(ours, theirs, 1e-3) == pytest.approx(5e-4)
    with pytest.raises(Disagreement, match="gradient_norm"):
        training.agreement(ours, theirs)
    for loss in (1.0005, float("nan")):
        with pytest.raises(Disagreement, match=f"loss: {loss:.7g} here, 1 in torch"):
            training.agreement(ours | {"loss": loss}, theirs, 1e-3)


def test_sides_run_in_turns_and_ratios_are_of_medians():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleave(sides, 3)
    assert calls == list("ababab") and [len(t.wall) for t in times.values()] == [3, 3]
    plain, ours = timing.Times([4.0, 9.0, 6.0], [8.0] * 3), timing.Times([3.0, 1.0, 2.0], [2.0] * 3)
    ratio = timing.Ratio("x", plain, ours, 3.5, "")
    cells = [list(column.cells) for column in timing.table([ratio]).columns]
    assert cells[3:7] == [["3.00"], ["4.00"], ["4.00"], ["≥ 3.5 !"]]


@needs_torch
def test_generation_decodes_the_same_tokens(tiny, monkeypatch):
    decoder = tiny.model.decoder, tiny.decoder_tokenizer
    monkeypatch.setattr(weights, "load_decoder", lambda source: decoder)
    (ratio,) = generation.compare("tiny", 1, batches=[3], prompt=4, tokens=6)
    assert "100.0% of tokens" in ratio.agreement and ratio.wanted is None
    monkeypatch.setattr(generation, "huggingface", lambda *_: np.zeros((3, 6)))
    with pytest.raises(Disagreement, match=r"of 3 rows are those of Hugging Face"):
        generation.compare("tiny", 1, batches=[3], prompt=4, tokens=6)


def test_the_naive_loop_scores_the_same_with_a_call_each(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda source: tiny)
    calls, loss, path = [], scoring.loss, saved(cases(2), tmp_path / "x.json")
    monkeypatch.setattr(scoring, "loss", lambda *row: calls.append(row) or loss(*row))
    every, four = scoring.compare("tiny", path, 2, 1)
    prompts = sum(1 + len(c.paraphrases) + len(c.neighbourhood) for c in cases(2))
    # Once to compare, once timed; then for four systems.
    assert len(calls) == (2 * len(scoring.LOOPED) + 4) * 2 * prompts
    assert every.wanted and four.ours is every.ours
    monkeypatch.setattr(scoring, "AGREEMENT", -1.0)
    with pytest.raises(Disagreement, match="differ by up to"):
        scoring.compare("tiny", path, 2, 1)


def test_without_torch_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert __main__.main([]) == 2
    assert "pip install -e '.[compare]'" in capsys.readouterr().err
