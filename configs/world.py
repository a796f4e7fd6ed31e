"""Larimar as the paper describes it, from scratch on a synthetic world (larimar_jax/data/world.py).

command   larimar train --config=configs/world.py --run runs/world
hardware  2 CPU cores
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
            # ξ = 0.1, a tenth of an encoding's squared length in all: with 1e-6 the geometry of keys decays
            # as training goes on, and other wordings read less and less of a fact.
            memory=dict(variant="direct", slots=256, noise=0.1, initial_log_variance=-2.0),
            # Without free bits the KL of 256 slots, a nat each, is a hundred times the cross-entropies.
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
            editing=dict(ridge=1e-5),
        )
    )
