"""What else could be trained of `smol`: pooling, latents, memory, episodes, loss, order and text.

command   python tests/long/recipe_parts.py … --out runs/parts       (its head says what it needs)
          larimar study --config=configs/recipes_smol_parts.py --out runs/parts/recipes
hardware  2 CPU cores, 3 minutes a recipe
expected  docs/recipes.md: the second table
"""

from ml_collections import ConfigDict

_PARTS = "runs/parts"
_ALL = 'model.lora={"rank": 16, "scale": 1.0, "modules": "^decoder/layers/"}'
_FROZEN = ("^encoder/", "^decoder/", "^to_latent/", "^memory/log_variance$")


def _frozen(*regexes: str) -> str:
    return "train.frozen=[" + ", ".join(f'"{regex}"' for regex in regexes) + "]"


def _begin(path: str, *parameters: str) -> str:
    said = ", ".join(f'"{regex}"' for regex in parameters)
    return f'train.start_from={{"path": "{path}", "parameters": [{said}]}}'


def _text(name: str) -> str:
    return f"data.corpus={_PARTS}/{name}.txt"


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            name="recipes_smol_parts",
            base="configs/smol.py",
            shared=(
                _ALL,
                "train.steps=40",
                "train.warmup_steps=4",
                "train.evaluate_every=20",
                "train.checkpoint_every=40",
                "train.keep=1",
                "train.products=bfloat16",
                "train.edits=32",
                "data.batch=2",
                # Whatever a recipe reads, all are judged by the same text.
                "data.held_out=wikipedia-summaries",
            ),
            recipes={
                "base": (),
                # What encodes
                "cls": (f'model.encoder={{"source": "{_PARTS}/minilm-cls"}}',),
                "both-towers": (
                    'model.lora={"rank": 16, "scale": 1.0, "modules": "^(encoder|decoder)/layers/"}',
                ),
                "whitened": (_begin(f"{_PARTS}/whitened.safetensors", "^to_latent/"),),
                "longer": (_begin(f"{_PARTS}/longer.safetensors", "^to_latent/"),),
                # What conditions
                "no-embedding": (
                    _begin(f"{_PARTS}/no-embedding.safetensors", "^to_embedding/"),
                    _frozen(*_FROZEN, "^to_embedding/"),
                ),
                # What remembers
                "prior-fixed": (_frozen(*_FROZEN, "^memory/prior$"),),
                "variance-learned": (_frozen(*_FROZEN[:-1]),),
                "episode-1": ("data.episode=[1]", "data.batch=16"),
                "episode-16": ("data.episode=[16]", "data.batch=1"),
                # What is asked of it
                "no-kl": ("objective.kl=0.0",),
                "autoencoding": ("objective.autoencoding=1.0",),
                "first-autoencoding": (
                    "train.steps=20",
                    "objective.reconstruction=0.0",
                    "objective.autoencoding=1.0",
                ),
                "then-memory": (
                    "train.steps=20",
                    _begin(
                        f"{_PARTS}/recipes/first-autoencoding",
                        "^to_(slots|embedding)/",
                        "^memory/prior$",
                        "/lora_(in|out)$",
                    ),
                ),
                # What is read
                "chunks-64": (
                    "data.encoder_tokens=64",
                    "data.decoder_tokens=64",
                    "data.episode=[6]",
                    "data.batch=1",
                ),
                "glosses": (_text("glosses"),),
                "brown": (_text("brown"),),
                "cities": (_text("cities"),),
            },
        )
    )
