"""The reader of configs/smol_latent.py, fitted further to as many phrases again that it has not met.

command   larimar train --config=configs/smol_latent_further.py --run runs/smol_latent_further
          larimar calibrate runs/smol_latent_further --data counterfact-train.json \
              --out smol_latent.safetensors --relations
needs     runs/smol_latent, of configs/smol_latent.py
hardware  2 CPU cores
time      20 minutes for features of 786,302 phrases and 14 for the steps, beside other work
expected  held-out phrases: 2.91 nats a token; ZsRE, 1,000 records: rewrite 61.2, paraphrase 57.6
"""

from ml_collections import ConfigDict

from configs import smol_latent


def get_config() -> ConfigDict:
    config = smol_latent.get_config()
    config.name = "smol_latent_further"
    config.data.phrases = 192 * 4096
    config.data.seed = 1
    config.train.steps = 6144
    config.train.learning_rate = 5e-4
    path = "runs/smol_latent/model.safetensors"
    config.train.start_from = dict(path=path, parameters=("^reader/",))
    return config
