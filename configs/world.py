"""Larimar as the paper describes it, from scratch on a synthetic world (larimar_jax/data/world.py).

One slot a layer whose key is its value, the embedding on every token, M₀ learned, direct
pseudo-inverses, Eq. 1 with its four terms and the cyclic β; no answer code and no key features.

command   larimar train --config=configs/world.py --run runs/world
          larimar calibrate runs/world --data world-train:8000:1 --steps 1000 --rate 5e-4 \\
              --out world/model.safetensors                    # the scope detector, half a minute
hardware  2 CPU cores
time      19 minutes beside other work, where float32 matrices multiply at 203 GFLOP/s
expected  held-out nats per token: 0.0004 through memory, 1.89 with z = 0; names never seen: edit S 100
          (M 99.9), paraphrase S 100 (base LM 50), docs/world.md
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="world",
            model=dict(
                encoder=dict(
                    family="bert",
                    vocab_size=1280,
                    width=256,
                    depth=1,
                    heads=8,
                    mlp=1024,
                    max_length=64,
                    type_vocab=1,
                    pooling="mean",
                ),
                decoder=dict(
                    family="gpt2",
                    vocab_size=1280,
                    width=128,
                    depth=2,
                    heads=4,
                    mlp=512,
                    max_length=64,
                ),
                latent=256,
            ),
            # ξ = 0.1: with 1e-6, as training goes on, other wordings read less and less of a fact.
            memory=dict(variant="direct", slots=128, noise=0.1, initial_log_variance=-2.0),
            # Without free bits the KL, a nat or two for each of 128 slots, drowns the cross-entropies.
            objective=dict(free_bits=1.0),
            data=dict(
                corpus="world:120000:0",
                unit="sentence",
                episode=(8,),
                batch=16,
                encoder_tokens=20,
                decoder_tokens=20,
                vocabulary=1280,
            ),
            train=dict(
                steps=1800,
                learning_rate=4e-3,
                warmup_steps=50,
                weight_decay=0.01,
                optimizer="muon",
                products="bfloat16",
                evaluate_every=300,
                checkpoint_every=300,
                edits=128,
            ),
            editing=dict(ridge=1e-4),
        )
    )
