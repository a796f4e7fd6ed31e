"""Towers of BERT-base's and GPT-2 small's size, random: what one training step costs.

command   python -m tests.comparisons training
hardware  2 CPU cores, 16 GB of memory, 4 minutes
expected  about 10 s a step, at least as fast as torch; the memory takes 1 % of it
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="training_step",
            model=dict(
                encoder=dict(
                    family="bert",
                    vocab_size=28_996,
                    width=768,
                    depth=12,
                    heads=12,
                    mlp=3072,
                    max_length=512,
                    type_vocab=2,
                    norm_eps=1e-12,
                    pooling="cls",
                    normalize=False,
                ),
                decoder=dict(
                    family="gpt2",
                    vocab_size=50_260,
                    width=768,
                    depth=12,
                    heads=12,
                    mlp=3072,
                    max_length=1024,
                    norm_eps=1e-5,
                ),
                latent=768,
                slots_per_layer=1,
                tied_slots=True,
                lora=None,
                dtype="float32",
                remat="none",
            ),
            memory=dict(
                variant="direct",
                slots=512,
                initial="identity",
                noise=1e-6,
                initial_log_variance=0.0,
                variance="scalar",
                query="posterior",
                addressing="pinv",
                width=1e-3,
            ),
            objective=dict(
                reconstruction=1.0,
                autoencoding=1.0,
                kl=0.5,
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
                batch=1,
                encoder_tokens=64,
                decoder_tokens=64,
                vocabulary=0,
                workers=0,
                seed=0,
            ),
            train=dict(
                steps=1000,
                optimizer="adamw",
                learning_rate=5e-5,
                warmup_steps=100,
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
                evaluate_every=500,
                edits=0,
                checkpoint_every=500,
                keep=1,
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
