"""Larimar as the paper describes it, from scratch on a synthetic world (larimar_jax/data/world.py).

One slot a layer whose key is its value, the embedding on every token, M₀ learned, direct
pseudo-inverses, Eq. 1 with its four terms and the cyclic β; no answer code and no key features.

command   larimar train --config=configs/world.py --run runs/world
          larimar calibrate runs/world --data world-train:8000:1 --steps 1000 --rate 5e-4 \\
              --out world/model.safetensors                    # the scope detector, half a minute
hardware  2 CPU cores
time      24 minutes beside other work; alone 0.37 s a step, where matrices multiply at 440 GFLOP/s
expected  held-out nats per token: 0.011 through memory, 1.71 with z = 0; names never seen: edit S 100.0,
          paraphrase S 99.9 (base LM 51), docs/world.md
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="world",
            model=dict(
                encoder=dict(
                    family="bert",
                    vocab_size=1024,
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
                    vocab_size=1024,
                    width=128,
                    depth=2,
                    heads=4,
                    mlp=512,
                    max_length=64,
                ),
                latent=256,
            ),
            # ξ = 0.1, a sixth of an encoding's squared length in all: with 1e-6, as training goes on,
            # other wordings read less and less of a fact.
            memory=dict(variant="direct", slots=256, noise=0.1, initial_log_variance=-2.0),
            # Without free bits the KL, a nat or two for each of 256 slots, drowns the cross-entropies.
            objective=dict(free_bits=1.0),
            data=dict(
                corpus="world:60000:0",
                unit="sentence",
                episode=(8,),
                batch=16,
                encoder_tokens=22,
                decoder_tokens=22,
                vocabulary=1024,
            ),
            train=dict(
                steps=3000,
                learning_rate=4e-3,
                warmup_steps=50,
                weight_decay=0.01,
                evaluate_every=500,
                checkpoint_every=500,
                edits=128,
            ),
            editing=dict(ridge=1e-4),
        )
    )
