"""A Larimar from scratch, small enough to watch it learn to use its memory.

command   larimar train --config=configs/tiny.py --run runs/tiny
hardware  2 CPU cores, 97 seconds (half of it to tokenise and to compile)
expected  held-out nats per token: 6.96 at the start; at the end 2.94 through memory and 4.57 with
          z = 0, so that it is the memory, and not the language model alone, that knows the text
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="tiny",
            model=dict(
                encoder=dict(
                    family="bert",
                    vocab_size=1024,
                    width=128,
                    depth=1,
                    heads=4,
                    mlp=256,
                    max_length=64,
                    type_vocab=1,
                    norm_eps=1e-12,
                    pooling="mean",
                    normalize=False,
                ),
                decoder=dict(
                    family="gpt2",
                    vocab_size=1024,
                    width=128,
                    depth=2,
                    heads=4,
                    mlp=256,
                    max_length=64,
                    norm_eps=1e-5,
                ),
                latent=128,
                slots_per_layer=4,
                tied_slots=False,
                lora=None,
                dtype="float32",
                remat="none",
            ),
            memory=dict(
                variant="direct",
                slots=64,
                initial="identity",
                noise=1e-6,
                # σ_W = 0.05: see configs/smol.py.
                initial_log_variance=-6.0,
                variance="scalar",
                query="posterior",
                addressing="pinv",
                width=1e-3,
            ),
            objective=dict(
                reconstruction=1.0,
                autoencoding=0.0,
                kl=0.0,
                kl_cycles=0,
                free_bits=0.0,
                language=1.0,
                count_padding=False,
            ),
            data=dict(
                corpus="wikipedia-summaries",
                held_out=None,
                unit="chunk",
                episode=(8,),
                batch=8,
                encoder_tokens=12,
                decoder_tokens=12,
                vocabulary=1024,
                workers=0,
                seed=0,
            ),
            train=dict(
                steps=320,
                optimizer="adamw",
                learning_rate=4e-3,
                warmup_steps=20,
                decay="cosine",
                weight_decay=0.01,
                clip_norm=1.0,
                accumulate=1,
                ema=0.0,
                frozen=(),
                start_from=None,
                products=None,
                mesh=(1, 1, 1),
                layout="zero3",
                memory_layout="replicated",
                on_bad_step="stop",
                spike=0.0,
                log_every=10,
                evaluate_every=80,
                edits=0,
                checkpoint_every=80,
                keep=3,
                best=None,
                stall=0.0,
                seed=0,
            ),
            editing=dict(
                ridge=1e-2,
                query_noise=0.0,
                scope_threshold=0.68,
                key_features=None,
                answer_code=None,
            ),
        )
    )
