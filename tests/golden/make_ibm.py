"""Makes ibm/: tiny checkpoints laid out as the authors' Lightning ones, and what torch computes.

One file per `w_logvar_setting` 0 to 4 (the towers are the same in all; setting 4 has a GPT-J), and
`golden.npz`, with for every file N: `N/tokens` and `N/mask` of the encoder [F, S], `N/latents` = the
first half of linear(pooler), `N/inputs` of the decoder [F, T], `N/logits` with those latents as past
slot and embedding, `N/zero` the same with z = 0, and `N/memory`, `N/read`, `N/log_variance`: the
latents written and read back by 15 steps of Newton–Schulz, in float64.

The model is written down here from the paper and from what the checkpoint's keys say; it runs on
transformers' BERT, GPT-2 and GPT-J. Run anywhere, with an interpreter that has torch and transformers
(2.13.0 and 5.23.0 made these files):

    python -m pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/golden/make_ibm.py
"""

import argparse
import math
import pathlib
import shutil
import sys
import types

import numpy as np
import torch
import transformers
from make_tiny import draw

HERE = pathlib.Path(__file__).parent / "ibm"
SLOTS, LATENT = 5, 8
BERT = dict(
    vocab_size=40,
    hidden_size=18,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=20,
)
# With random weights an end of text would come at any time.
ENDLESS = dict(bos_token_id=None, eos_token_id=None)
# The tokenizer's 50 and <PAD>, <BOS>, <EOS>.
GPT2 = dict(vocab_size=53, n_embd=12, n_layer=2, n_head=2, n_positions=24, **ENDLESS)
GPTJ = GPT2 | dict(n_embd=16, rotary_dim=4)
LENGTHS, GENERATED = (9, 6, 4), 7


class Memory(torch.nn.Module):
    """The parameters of the memory, by the names that the checkpoints have."""

    def __init__(self, setting):
        super().__init__()
        inputs = {2: LATENT, 3: SLOTS * LATENT, 4: LATENT + SLOTS * LATENT}
        self.memory_mean = torch.nn.Parameter(torch.zeros(SLOTS, LATENT))
        self.memory_logvar = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("ben_cohen_memory_init", torch.tensor([-5.0]))
        if setting in inputs:
            self.w_logvar = torch.nn.Linear(inputs[setting], SLOTS)
        else:
            self.w_logvar = torch.nn.Parameter(torch.zeros(SLOTS if setting else 1))


class Model(torch.nn.Module):
    """Encoder, decoder and memory, by the names that the checkpoints have."""

    def __init__(self, setting):
        super().__init__()
        self.encoder = transformers.BertModel(transformers.BertConfig(**BERT)).eval()
        self.encoder.linear = torch.nn.Linear(BERT["hidden_size"], 2 * LATENT, bias=False)
        sizes = transformers.GPTJConfig(**GPTJ) if setting == 4 else transformers.GPT2Config(**GPT2)
        self.decoder = transformers.AutoModelForCausalLM.from_config(sizes).eval()
        self.decoder.set_attn_implementation("eager")
        inner = self.decoder.transformer
        inner.linear = torch.nn.Linear(LATENT, sizes.n_layer * sizes.n_embd, bias=False)
        inner.linear_emb = torch.nn.Linear(LATENT, sizes.n_embd, bias=False)
        self.memory = Memory(setting)


def encode(model, tokens, mask):
    pooled = model.encoder(tokens, attention_mask=mask.long()).pooler_output
    return model.encoder.linear(pooled)[:, :LATENT]


def decode(model, tokens, latents):
    """Logits with one past slot per layer, and with a vector on every token (§2)."""
    inner, config = model.decoder.transformer, model.decoder.config
    slots = inner.linear(latents).reshape(len(latents), config.n_layer, config.n_head, 1, -1)
    cache = transformers.DynamicCache()
    for layer in range(config.n_layer):
        cache.update(slots[:, layer], slots[:, layer], layer)
    positions = torch.arange(1, tokens.shape[1] + 1)[None].expand(len(tokens), -1)
    embedded = inner.wte(tokens) + inner.linear_emb(latents)[:, None]
    return model.decoder(
        inputs_embeds=embedded, past_key_values=cache, position_ids=positions
    ).logits


def inverse(matrix):
    """15 steps of Newton–Schulz from the released start."""
    result = min(math.exp(-5.0), 5e-4) * matrix.T
    for _ in range(15):
        result = 2 * result - result @ matrix @ result
    return result


def remember(memory, latents, setting):
    """(M, Z_read, log σ_W²) of Algorithm 1, float64."""
    z = latents.double()
    m = inverse(z @ inverse(memory.memory_mean.double())) @ z
    vector = m.reshape(1, -1).expand(len(z), -1)
    learned = memory.w_logvar
    if setting < 2:
        spread = learned.double().expand(len(z), SLOTS)
    else:
        inputs = {2: z, 3: vector, 4: torch.cat([z, vector], dim=-1)}[setting]
        spread = inputs @ learned.weight.double().T + learned.bias.double()
    return m, z @ inverse(m) @ m, spread


def hyper_parameters(setting):
    """As files have been seen to hold them: a dict, a Namespace, an AttributeDict of Lightning's."""
    settings = dict(
        encoder_model_type="bert",
        decoder_model_type="gptj" if setting == 4 else "gpt2",
        latent_size=LATENT,
        memory_size=SLOTS,
        direct_writing=True,
        ordering=False,
        pseudoinverse_approx_step=15,
        observation_noise_std=1e-5,
        episode_sizes=[4, 7],
        identity=True,
        w_logvar_setting=setting,
        beta=0.25,
    )
    if setting == 1:
        return argparse.Namespace(**settings)
    if setting == 2:
        name = "lightning.fabric.utilities.data"
        for end in [*(i for i, c in enumerate(name) if c == "."), len(name)]:
            sys.modules[name[:end]] = types.ModuleType(name[:end])
        kind = type("AttributeDict", (dict,), {"__module__": name})
        sys.modules[name].AttributeDict = kind
        return kind(settings)
    return settings


def main():
    torch.set_num_threads(1)
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    golden = {}
    for setting in range(5):
        model = Model(setting)
        draw(model, seed=setting)
        with torch.no_grad():
            # Newton–Schulz loses small singular values: keep them above 1.
            model.memory.memory_mean.add_(2 * torch.eye(SLOTS, LATENT))
            model.encoder.linear.weight.mul_(3)
        state = {f"model.{n}": v for n, v in model.state_dict().items()}
        if setting == 0:  # What older versions of transformers put into a state_dict as well.
            state["model.encoder.embeddings.position_ids"] = torch.arange(20)[None]
            for layer in range(GPT2["n_layer"]):
                attention = f"model.decoder.transformer.h.{layer}.attn."
                state[attention + "bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
                state[attention + "masked_bias"] = torch.tensor(-1e4)
        torch.save(
            {
                "epoch": 2,
                "state_dict": state,
                "hyper_parameters": hyper_parameters(setting),
                "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
            },
            HERE / f"setting_{setting}.ckpt",
        )
        generator = torch.Generator().manual_seed(9)
        size = (len(LENGTHS), max(LENGTHS))
        tokens = torch.randint(5, BERT["vocab_size"], size, generator=generator)
        mask = torch.arange(size[1])[None] < torch.tensor(LENGTHS)[:, None]
        inputs = torch.randint(0, 53, (len(LENGTHS), GENERATED), generator=generator)
        arrays = dict(tokens=tokens.int() * mask, mask=mask, inputs=inputs.int())
        with torch.no_grad():
            arrays["latents"] = latents = encode(model, tokens, mask)
            arrays["logits"] = decode(model, inputs, latents)
            arrays["zero"] = decode(model, inputs, torch.zeros_like(latents))
            remembered = remember(model.memory, latents, setting)
        arrays |= zip(("memory", "read", "log_variance"), remembered, strict=True)
        apart = (arrays["logits"] - arrays["zero"]).abs().max()
        print(f"setting {setting}: logits differ by {apart:.2f} from z = 0")
        golden |= {f"{setting}/{name}": array.numpy() for name, array in arrays.items()}
    np.savez_compressed(HERE / "golden.npz", **golden)


if __name__ == "__main__":
    main()
