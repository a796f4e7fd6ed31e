"""The default model: a frozen MiniLM and a frozen SmolLM2-135M, and what lies between them.

command   larimar train --config=configs/smol.py --run runs/smol
          larimar calibrate runs/smol --data counterfact-train.json --out smol.safetensors
hardware  2 CPU cores, 35 minutes beside other work
expected  held-out nats per token: 5.19 through memory at the start, 4.43 at the end, 5.10 with z = 0;
          edited: CounterFact edit S 100.0 (base LM 31.7), 1,000 records
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="smol",
            model=dict(
                encoder=dict(source="minilm"),
                decoder=dict(source="smollm2"),
                latent=384,
                slots_per_layer=2,
                tied_slots=False,
                lora=None,
                dtype="float32",
                remat="none",
            ),
            memory=dict(
                variant="direct",
                slots=512,
                initial="identity",
                noise=1e-6,
                # σ_W = 0.1: with σ_W = 1 the noise on what is read is three times the signal for
                # eight unit encodings, and the towers would learn nothing from it.
                initial_log_variance=-4.6,
                variance="scalar",
                query="posterior",
                addressing="pinv",
                width=1e-3,
            ),
            objective=dict(
                reconstruction=1.0,
                # Read∘write of a fact by its own encoding is the identity up to σ_W (§3), so that both
                # terms see the same latent and the second buys nothing but the cost of new text.
                autoencoding=0.0,
                kl=1e-4,
                kl_cycles=10,
                free_bits=0.0,
                # With a frozen decoder the text at z = 0 depends on nothing that is trained.
                language=0.0,
                count_padding=False,
            ),
            data=dict(
                corpus="wikipedia-summaries",
                held_out=None,
                unit="chunk",
                episode=(8,),
                batch=4,
                encoder_tokens=24,
                decoder_tokens=24,
                vocabulary=0,
                workers=0,
                seed=0,
            ),
            train=dict(
                steps=150,
                optimizer="adamw",
                learning_rate=2e-3,
                warmup_steps=15,
                decay="cosine",
                weight_decay=0.0,
                clip_norm=1.0,
                accumulate=1,
                ema=0.0,
                # The encodings are the space of the scope detector; σ_W is noise
                # against paraphrases here, and β would only push it back to 1.
                frozen=(
                    "^encoder/",
                    "^decoder/",
                    "^to_latent/",
                    "^memory/log_variance$",
                ),
                start_from=None,
                products=None,
                mesh=(1, 1, 1),
                layout="zero3",
                memory_layout="replicated",
                on_bad_step="stop",
                spike=0.0,
                log_every=10,
                evaluate_every=50,
                edits=0,
                checkpoint_every=25,
                keep=3,
                best=None,
                stall=0.0,
                seed=0,
            ),
            editing=dict(
                ridge=3e-2,
                query_noise=0.0,
                scope_threshold=0.68,
                key_features=dict(count=640, scale=0.5, length=1.0),
                answer_code=dict(positions=12, width=256, limit=40.0),
            ),
        )
    )
