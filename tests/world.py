"""A world of 600 sentences whose subject tells the rest, and the smallest Larimar that learns it."""

import json
from pathlib import Path

import numpy as np

from larimar_jax import config as configs
from larimar_jax.settings import Config

STEPS = 24

def write(path: Path) -> Path:
    """The corpus, one sentence a document."""
    rng = np.random.default_rng(0)
    syllables = ["ba", "do", "ki", "lu", "me", "no", "pa", "ri", "so", "tu"]
    words = ["".join(rng.choice(syllables, 2)) for _ in range(600)]
    verbs, places = ["likes", "sees", "finds"], ["rome", "oslo", "cairo", "lima"]
    texts = [f"{w.title()} {rng.choice(verbs)} the town of {rng.choice(places)}." for w in words]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in dict.fromkeys(texts)))
    return path


def config(corpus: Path, **train) -> Config:
    """A run over the corpus, with settings of `train` that differ."""
    tower = dict(vocab_size=300, width=16, depth=1, heads=2, mlp=32, max_length=48)
    values = dict(
        name="test",
        model=dict(
            encoder=dict(
                family="bert", **tower, type_vocab=1, norm_eps=1e-6, pooling="mean", normalize=False
            ),
            decoder=dict(family="gpt2", **tower, norm_eps=1e-5),
            latent=16,
            slots_per_layer=1,
            tied_slots=True,
            lora=None,
            dtype="float32",
            remat="none",
        ),
        memory=dict(
            variant="newton_schulz",
            slots=8,
            initial="identity",
            noise=1e-6,
            initial_log_variance=-6.0,
            variance="scalar",
            query="posterior",
            addressing="pinv",
            width=1e-3,
            steps=15,
            log_start=-5.0,
        ),
        objective=dict(
            reconstruction=1.0,
            autoencoding=1.0,
            kl=1e-3,
            kl_cycles=2,
            free_bits=0.0,
            language=1.0,
            count_padding=False,
        ),
        data=dict(
            corpus=str(corpus),
            held_out=None,
            unit="sentence",
            episode=(2,),
            batch=8,
            encoder_tokens=24,
            decoder_tokens=24,
            vocabulary=300,
            workers=0,
            seed=0,
        ),
        train=dict(
            steps=STEPS,
            optimizer="adamw",
            learning_rate=2e-2,
            warmup_steps=2,
            decay="linear",
            weight_decay=0.01,
            clip_norm=1.0,
            accumulate=1,
            ema=0.0,
            frozen=["^encoder/position/"],
            start_from=None,
            products=None,
            mesh=(1, 1, 1),
            layout="zero3",
            memory_layout="replicated",
            on_bad_step="stop",
            spike=0.0,
            log_every=5,
            evaluate_every=12,
            edits=0,
            checkpoint_every=8,
            keep=2,
            best=None,
            stall=0.0,
            seed=0,
        ),
        editing=dict(ridge=1e-2, query_noise=0.0, scope_threshold=0.65, key_features=None, answer_code=None),
    )
    values["train"] |= train
    return configs.load(values)
