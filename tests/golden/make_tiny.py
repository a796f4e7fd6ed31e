"""Makes tiny_*/: random towers of every family from transformers, with what torch computes.

Each folder is laid out as on Hugging Face and holds `golden.npz`. A decoder's has right-padded
`tokens` [3, T] and their `lengths`, `logits` of the real tokens in order, `loss` (the mean
cross-entropy of the real next tokens), and what `generate` appends greedily to `prompt_0` and
`prompt_1`: `greedy_0`, `greedy_1`. An encoder's has `tokens`, `lengths`, `hidden` of the real tokens,
`pooled`, `weight`, and `loss` = sum(pooled · weight). Both have `gradient/NAME`, the loss's gradient
with respect to every parameter.

Sizes differ from each other on purpose, so that a swapped axis fails. A case's features are switched
off one by one, to prove that its logits depend on them; seeds are searched until no greedy step is
near a tie. Run anywhere, with an interpreter that has torch and transformers (2.13.0 and 5.23.0 made
these files); it takes ten seconds:

    python -m pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/golden/make_tiny.py [case …]
"""

import itertools
import json
import pathlib
import shutil
import sys

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HERE = pathlib.Path(__file__).parent

LENGTHS = (24, 17, 9)
PROMPTS = (5, 9)
GENERATED = 64
# Greedy decoding is comparable only if no rounding can swap the best two tokens.
LEAST_GAP = 1e-3
# And worth comparing only if it does not repeat itself from the start.
LEAST_DISTINCT = 12
# What switching a feature off must change some logit by, where logits are of order 1.
LEAST_EFFECT = 0.1

PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
# With random weights an end of text would come at any time.
ENDLESS = dict(bos_token_id=None, eos_token_id=None)
# 2.5, 0.7, 0.2 … turns of each pair within the first training: one kept, one blended, the rest slowed.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 0.3,
    "high_freq_factor": 2.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_slow": 0.25,
    "beta_fast": 2.0,
}
LLAMA = dict(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
    rope_parameters=PLAIN,
    tie_word_embeddings=False,
    **ENDLESS,
)
QWEN2 = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rope_parameters=PLAIN,
    tie_word_embeddings=True,
    **ENDLESS,
)
SHORT = dict(num_hidden_layers=2)
GPT2 = dict(vocab_size=103, n_embd=33, n_layer=2, n_head=3, n_inner=52, n_positions=96, **ENDLESS)
GPTJ = GPT2 | dict(n_embd=36, rotary_dim=8)
WINDOW = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)

# name: classes, settings, and settings that switch off what the case is there for.
DECODERS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2, ()),
    "gptj": (GPTJForCausalLM, GPTJConfig, GPTJ, [dict(rotary_dim=12)]),
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA, ()),
    "llama_tied": (
        LlamaForCausalLM,
        LlamaConfig,
        LLAMA | dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
        [dict(rope_parameters=PLAIN), dict(rope_parameters=LLAMA3 | dict(low_freq_factor=1.9))],
    ),
    "llama_biased": (
        LlamaForCausalLM,
        LlamaConfig,
        LLAMA | SHORT | dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True),
        [dict(rope_parameters=PLAIN), dict(attention_bias=False), dict(mlp_bias=False)],
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        QWEN2 | dict(rope_parameters=YARN),
        [
            dict(rope_parameters=PLAIN | dict(rope_theta=100.0)),
            dict(rope_parameters=YARN | dict(attention_factor=1.0)),
            dict(rope_parameters=YARN | dict(beta_slow=1.0)),
        ],
    ),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        QWEN2 | WINDOW,
        [dict(use_sliding_window=False), dict(max_window_layers=0), dict(max_window_layers=2)],
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig,
        LLAMA | SHORT | dict(sliding_window=5),
        [dict(sliding_window=None), dict(sliding_window=4)],
    ),
}
BERT = dict(
    vocab_size=89,
    hidden_size=30,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=32,
)
# What a sentence-transformers folder says beside config.json.
SENTENCE_FILES = {
    "modules.json": [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(
            [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        )
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": BERT["hidden_size"],
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    },
}
ENCODERS = {"bert": {}, "bert_mean": SENTENCE_FILES}


def draw(module, seed):
    """Draw every parameter, of norms and biases too: at first many are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm else 0.3 * noise)


def make(model_class, config, seed):
    """Return a model with drawn parameters."""
    model = model_class(config).eval()
    model.set_attn_implementation("eager")
    draw(model, seed)
    return model


def batch(vocabulary):
    """Tokens [3, T], and which of them are real."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    real = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return torch.where(real, tokens, 0), real


def logits_of(model, tokens, real):
    return model(tokens, attention_mask=real.long(), use_cache=False).logits


def effect(model, model_class, config_class, settings, change, tokens, real):
    """The largest change of a logit when the model is run with other settings."""
    other = model_class(config_class(**(settings | change))).eval()
    other.set_attn_implementation("eager")
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys, result
    with torch.no_grad():
        difference = logits_of(other, tokens, real) - logits_of(model, tokens, real)
    return float(difference[real].abs().max())


def greedy(model, prompt):
    """What `generate` appends, and the smallest gap between the best two logits on the way."""
    plan = GenerationConfig(max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        whole = model.generate(
            prompt[None], generation_config=plan, attention_mask=torch.ones_like(prompt[None])
        )
        assert whole.shape[1] == len(prompt) + GENERATED
        best = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2)
    said = whole[0, len(prompt) :]
    # Without a cache it has to come out the same, or the model is too close to a tie.
    gap = best.values[:, 0] - best.values[:, 1]
    gap = torch.where(best.indices[:, 0] == said, gap, 0.0)
    return said, float(gap.min())


def gradients(model, loss):
    """Of every parameter, zeros for those that the loss does not depend on."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        f"gradient/{name}": (torch.zeros_like(p) if g is None else g).numpy()
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def save(model, name, **golden):
    folder = HERE / f"tiny_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "golden.npz", lengths=np.array(LENGTHS, np.int32), **golden)
    return folder


def make_decoder(name):
    model_class, config_class, settings, changes = DECODERS[name]
    tokens, real = batch(settings["vocab_size"])
    prompts = [tokens[i, :length] for i, length in enumerate(PROMPTS)]
    for seed in itertools.count():
        model = make(model_class, config_class(**settings), seed)
        said, gaps = zip(*[greedy(model, prompt) for prompt in prompts], strict=True)
        distinct = min(len(set(s.tolist())) for s in said)
        if min(gaps) > LEAST_GAP and distinct >= LEAST_DISTINCT:
            break
    print(f"{name}: seed {seed}, smallest gap {min(gaps):.4f}, {distinct} distinct tokens")
    for change in changes:
        changed = effect(model, model_class, config_class, settings, change, tokens, real)
        print(f"  with {change} logits change by up to {changed:.3f}")
        assert changed > LEAST_EFFECT, change
    logits = logits_of(model, tokens, real)
    target = torch.where(real[:, 1:], tokens[:, 1:], -100)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten())
    print(f"  loss {loss:.3f}, largest logit {logits[real].abs().max():.2f}")
    texts = {f"prompt_{i}": p.int().numpy() for i, p in enumerate(prompts)}
    texts |= {f"greedy_{i}": s.int().numpy() for i, s in enumerate(said)}
    save(
        model,
        name,
        tokens=tokens.int().numpy(),
        logits=logits[real].detach().numpy(),
        loss=loss.detach().numpy(),
        **texts,
        **gradients(model, loss),
    )


def make_encoder(name):
    model = make(BertModel, BertConfig(**BERT), seed=0)
    tokens, real = batch(BERT["vocab_size"])
    out = model(tokens, attention_mask=real.long())
    pooled = out.pooler_output
    if ENCODERS[name]:
        total = (out.last_hidden_state * real[:, :, None]).sum(1)
        pooled = functional.normalize(total / real.sum(1, keepdim=True), dim=1)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
    loss = (pooled * weight).sum()
    folder = save(
        model,
        name,
        tokens=tokens.int().numpy(),
        hidden=out.last_hidden_state[real].detach().numpy(),
        pooled=pooled.detach().numpy(),
        weight=weight.numpy(),
        loss=loss.detach().numpy(),
        **gradients(model, loss),
    )
    for file, said in ENCODERS[name].items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(said, indent=2) + "\n")


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [*DECODERS, *ENCODERS]:
        (make_decoder if name in DECODERS else make_encoder)(name)


if __name__ == "__main__":
    main()
