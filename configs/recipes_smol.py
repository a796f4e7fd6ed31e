"""What to train of `smol`, and how: recipes that differ from configs/smol.py in one or two settings.

command   larimar study --config=configs/recipes_smol.py --out runs/recipes
hardware  2 CPU cores, 66 minutes beside other work
expected  docs/recipes.md: the table that this command writes
"""

from ml_collections import ConfigDict

# On every linear map of the decoder, and on those of attention's queries and values alone.
_ALL = 'model.lora={"rank": 16, "scale": 1.0, "modules": "^decoder/layers/"}'
_QUERY_VALUE = (
    'model.lora={"rank": 16, "scale": 1.0, "modules": "^decoder/layers/attention/(query|value)$"}'
)


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="recipes_smol",
            base="configs/smol.py",
            shared=(
                "train.steps=120",
                "train.warmup_steps=12",
                "train.evaluate_every=40",
                "train.checkpoint_every=40",
                "train.keep=1",
                "train.products=bfloat16",
                "train.edits=32",
                "data.batch=2",
            ),
            recipes={
                # Both towers frozen: what shipped first.
                "base": (),
                # The paper's interface: one slot, key and value the same vector.
                "paper": ("model.slots_per_layer=1", "model.tied_slots=true"),
                "slots-8": ("model.slots_per_layer=8",),
                "lora-qv": (_QUERY_VALUE,),
                "lora-all": (_ALL,),
                "lora-all-paper": (_ALL, "model.slots_per_layer=1", "model.tied_slots=true"),
                "lora-all-slots-8": (_ALL, "model.slots_per_layer=8"),
                "lora-all-slow": (_ALL, "train.learning_rate=5e-4"),
                # The map from MiniLM's encodings to latents, which starts as the identity.
                "lora-all-latent": (
                    _ALL,
                    'train.frozen=["^encoder/", "^decoder/", "^memory/log_variance$"]',
                ),
                "lora-all-sentences": (_ALL, 'data.unit="sentence"'),
            },
        )
    )
