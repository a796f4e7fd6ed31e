"""Makes tiny_*/: random towers of each family from transformers, with what torch computes.

Each folder is laid out as on Hugging Face and holds `golden.npz`: tokens and full logits (decoders)
or tanh-pooled vectors (BERT). The sizes differ from each other on purpose, so that a swapped axis
fails. Run with an interpreter that has torch and transformers:

    python tests/golden/make_tiny.py
"""

import pathlib

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

HERE = pathlib.Path(__file__).parent


def randomise(model):
    """Draws every parameter, norms and biases too: at initialisation many are 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.15 * noise)
    return model.eval()


def tokens(vocabulary):
    return torch.randint(0, vocabulary, (3, 11), generator=torch.Generator().manual_seed(1))


def save(model, name, **golden):
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "golden.npz", **golden)


def main():
    llama = dict(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    for name, tied in (("tiny_llama", False), ("tiny_llama_tied", True)):
        model = randomise(LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=tied)))
        ids = tokens(97)
        with torch.no_grad():
            save(model, name, tokens=ids.int().numpy(), logits=model(ids).logits.numpy())

    sizes = dict(vocab_size=89, n_embd=24, n_layer=3, n_head=3, n_inner=56, n_positions=32)
    model = randomise(GPT2LMHeadModel(GPT2Config(**sizes)))
    ids = tokens(89)
    with torch.no_grad():
        save(model, "tiny_gpt2", tokens=ids.int().numpy(), logits=model(ids).logits.numpy())

    model = randomise(
        BertModel(
            BertConfig(
                vocab_size=83,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=3,
                num_attention_heads=3,
                max_position_embeddings=32,
            )
        )
    )
    ids = tokens(83)
    mask = torch.arange(11)[None] < torch.tensor([[11], [7], [3]])
    with torch.no_grad():
        pooled = model(ids, attention_mask=mask.long()).pooler_output
    save(model, "tiny_bert", tokens=ids.int().numpy(), mask=mask.numpy(), pooled=pooled.numpy())


if __name__ == "__main__":
    main()
