"""A frozen SmolLM2-135M that speaks from encodings alone: a reader between it and a frozen MiniLM.

command   larimar train --config=configs/smol_latent.py --run runs/smol_latent
          larimar calibrate runs/smol_latent --data counterfact-train.json \
              --out smol_latent.safetensors --relations
          (what ships was then fitted further, by the command in docs/latent.md)
hardware  2 CPU cores
time      52 minutes for features of 1,048,372 phrases, beside other work, 22 for the steps
expected  held-out phrases: 3.02 nats a token, 9.63 without the memory; CounterFact, 1,000 records: edit
          S 97.9, paraphrase S 96.1 (base LM 31.7 and 32.8); ZsRE, 1,000 records: rewrite 58.8,
          paraphrase 55.2 (base LM 22.2 and 22.0)
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="smol_latent",
            model=dict(
                encoder=dict(source="minilm"),
                decoder=dict(source="smollm2"),
                latent=384,
                reader=dict(positions=12),
            ),
            memory=dict(variant="direct", slots=512, initial_log_variance=-4.6),
            data=dict(phrases=256 * 4096, batch=128),
            train=dict(
                steps=8192,
                learning_rate=1e-3,
                warmup_steps=100,
                weight_decay=0.01,
                # The encodings are the space of the scope detector as well.
                frozen=("^(?!reader/)",),
                evaluate_every=1024,
                checkpoint_every=512,
            ),
            editing=dict(ridge=3e-2),
        )
    )
