"""The default model: a frozen MiniLM and a frozen SmolLM2-135M, and what lies between them.

command   larimar train --config=configs/smol.py --run runs/smol
          larimar calibrate runs/smol --data counterfact-train.json --out smol.safetensors --relations
hardware  2 CPU cores
time      35 minutes beside other work
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
            ),
            # σ_W = 0.1: with σ_W = 1 the noise on what is read is three times the signal for eight unit
            # encodings, and the towers would learn nothing from it.
            memory=dict(variant="direct", slots=512, initial_log_variance=-4.6),
            objective=dict(
                # Read∘write of a fact by its own encoding is the identity up to σ_W (§3), so that both
                # terms see the same latent and the second buys nothing but the cost of new text.
                autoencoding=0.0,
                kl=1e-4,
                # With a frozen decoder the text at z = 0 depends on nothing that is trained.
                language=0.0,
            ),
            data=dict(batch=4, encoder_tokens=24, decoder_tokens=24),
            train=dict(
                steps=150,
                learning_rate=2e-3,
                warmup_steps=15,
                # The encodings are the space of the scope detector; σ_W is noise against paraphrases
                # here, and β would only push it back to 1.
                frozen=("^encoder/", "^decoder/", "^to_latent/", "^memory/log_variance$"),
                evaluate_every=50,
                checkpoint_every=25,
            ),
            editing=dict(ridge=3e-2, key_features=dict(count=640), answer_code=dict()),
        )
    )
