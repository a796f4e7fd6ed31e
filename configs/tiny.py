"""A Larimar from scratch, small enough to watch it learn to use its memory.

command   larimar train --config=configs/tiny.py --run runs/tiny
hardware  2 CPU cores
time      97 seconds (half of it to tokenise and to compile)
expected  held-out nats per token: 6.96 at the start; at the end 2.94 through memory and 4.57 with
          z = 0, so that it is the memory, and not the language model alone, that knows the text
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    tower = dict(vocab_size=1024, width=128, heads=4, mlp=256, max_length=64)
    return ConfigDict(
        dict(
            name="tiny",
            model=dict(
                encoder=dict(family="bert", depth=1, type_vocab=1, pooling="mean", **tower),
                decoder=dict(family="gpt2", depth=2, **tower),
                latent=128,
                slots_per_layer=4,
                tied_slots=False,
            ),
            # σ_W = 0.05: see configs/smol.py.
            memory=dict(variant="direct", slots=64, initial_log_variance=-6.0),
            objective=dict(autoencoding=0.0, kl=0.0, kl_cycles=0),
            data=dict(encoder_tokens=12, decoder_tokens=12, vocabulary=1024),
            train=dict(
                steps=320,
                learning_rate=4e-3,
                warmup_steps=20,
                weight_decay=0.01,
                evaluate_every=80,
                checkpoint_every=80,
            ),
        )
    )
