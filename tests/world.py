"""A corpus of 600 sentences whose subject determines the rest, and the smallest Larimar for it."""

import json
from pathlib import Path

import numpy as np
from flax import nnx

from larimar_jax import config as configs
from larimar_jax import decoders, encoders
from larimar_jax.weights import Tokenizer, export

STEPS = 24


def write(path: Path) -> Path:
    """Write the corpus, one sentence a document, and return its path."""
    rng = np.random.default_rng(0)
    syllables = ["ba", "do", "ki", "lu", "me", "no", "pa", "ri", "so", "tu"]
    words = ["".join(rng.choice(syllables, 2)) for _ in range(600)]
    verbs, places = ["likes", "sees", "finds"], ["rome", "oslo", "cairo", "lima"]
    texts = [f"{w.title()} {rng.choice(verbs)} the town of {rng.choice(places)}." for w in words]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts)))
    return path


def config(corpus: Path, **train) -> configs.Config:
    """Return a run over the corpus, with settings of `train` that differ."""
    tower = dict(vocab_size=300, width=16, depth=1, heads=2, mlp=32, max_length=48)
    encoder = dict(family="bert", type_vocab=1, norm_eps=1e-6, pooling="mean", **tower)
    decoder = dict(family="gpt2", **tower)
    tokens = dict(encoder_tokens=24, decoder_tokens=24, vocabulary=300)
    rate = dict(learning_rate=2e-2, warmup_steps=2, decay="linear", weight_decay=0.01)
    every = dict(log_every=5, evaluate_every=12, checkpoint_every=8, keep=2)
    return configs.load(
        dict(
            name="test",
            model=dict(encoder=encoder, decoder=decoder, latent=16),
            memory=dict(variant="newton_schulz", slots=8, initial_log_variance=-6.0),
            objective=dict(kl=1e-3, kl_cycles=2),
            data=dict(corpus=str(corpus), unit="sentence", episode=(2,), **tokens),
            train=dict(steps=STEPS, frozen=["^encoder/position/"], **rate, **every) | train,
            editing=dict(scope_threshold=0.65),
        )
    )


def towers(folder: Path, corpus: Path) -> dict[str, dict]:
    """Write both towers as folders of Hugging Face, with the corpus' tokens; return their settings."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    tokenizer, settings = Tokenizer.train(texts, 300), {}
    sizes = dict(vocab_size=300, width=16, depth=1, heads=2, mlp=32)
    for name, family, own in (
        ("encoder", encoders.families()["bert"], tokenizer.framed()),
        ("decoder", decoders.families()["gpt2"], tokenizer),
    ):
        (folder / name).mkdir(parents=True)
        module = family(family.CONFIG(**sizes), rngs=nnx.Rngs(0))
        export.write_tower(folder / name, module, own)
        kind = family.__module__.rpartition(".")[2]
        settings[name] = dict(family=kind, source=str(folder / name), **sizes)
    return settings
