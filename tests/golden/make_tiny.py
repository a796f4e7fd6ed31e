"""Makes model.safetensors and golden.npz of tiny_*/: random towers, with what torch computes.

A case is a folder with a config.json, laid out as on Hugging Face; an encoder that pools by the mean
has the files of sentence-transformers beside it. A decoder's golden.npz has right-padded `tokens`
[3, T] and their `lengths`, `logits` of the real tokens in order, `loss` (the mean cross-entropy of the
real next tokens), what `generate` appends greedily to `prompt_0` and `prompt_1`: `greedy_0`, `greedy_1`,
and `conditioned`: logits under the latents `embedding` [3, D] and `slots` [layers, key and value, 3,
heads, P, d] (§2). An encoder's has `tokens`, `lengths`, `hidden` of the real tokens, `pooled`, `weight`,
and `loss` = sum(pooled · weight). Both have `gradient/NAME`, the loss's gradient with respect to every
parameter.

Sizes differ from each other on purpose, so that a swapped axis fails. A case's features are switched
off one by one, to prove that its logits depend on them; seeds are searched until no greedy step is
near a tie. Run anywhere, with an interpreter that has torch and transformers (2.13.0 and 5.23.0 made
these files); it takes ten seconds:

    python -m pip install torch==2.13.0 transformers==5.23.0 numpy
    python tests/golden/make_tiny.py [tiny_llama …]
"""

import itertools
import pathlib
import sys

import numpy as np
import torch
import transformers
from torch.nn import functional

HERE = pathlib.Path(__file__).parent
LENGTHS = (24, 17, 9)
PROMPTS = (5, 9)
GENERATED, SLOTS = 64, 2
# Greedy decoding is comparable only if no rounding can swap the best two tokens.
LEAST_GAP = 1e-3
# And worth comparing only if it does not repeat itself from the start.
LEAST_DISTINCT = 12
# What switching a feature off must change some logit by, where logits are of order 1.
LEAST_EFFECT = 0.1


def rope(**changes):
    return {"rope_parameters": changes}


PLAIN = rope(rope_type="default")
# Settings that switch off what a case is there for.
CHANGES = {
    "tiny_gptj": [dict(rotary_dim=12)],
    # Of its four pairs one is kept, one blended, the rest slowed.
    "tiny_llama_tied": [PLAIN, rope(low_freq_factor=1.9)],
    "tiny_llama_biased": [PLAIN, dict(attention_bias=False), dict(mlp_bias=False)],
    "tiny_qwen2": [PLAIN, rope(attention_factor=1.0), rope(beta_slow=1.0)],
    "tiny_qwen2_window": [
        dict(use_sliding_window=False), dict(max_window_layers=0), dict(max_window_layers=2)
    ],
    "tiny_mistral": [dict(sliding_window=None), dict(sliding_window=4)],
}  # fmt: skip


def draw(module, seed):
    """Draw every parameter, of norms and biases too: at first many are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if norm else 0.3 * noise)


def build(config):
    model = getattr(transformers, config.architectures[0])(config).eval()
    model.set_attn_implementation("eager")
    return model


def batch(vocabulary):
    """Tokens [3, T], and which of them are real."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    real = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return torch.where(real, tokens, 0), real


def logits_of(model, tokens, real):
    return model(tokens, attention_mask=real.long(), use_cache=False).logits


def effect(model, change, tokens, real):
    """The largest change of a logit when the model is run with other settings."""
    settings = model.config.to_dict()
    settings.pop("layer_types", None)  # follows from the others
    if "rope_parameters" in change:
        change = rope(**settings["rope_parameters"] | change["rope_parameters"])
    other = build(type(model.config)(**settings | change))
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys, result
    with torch.no_grad():
        difference = logits_of(other, tokens, real) - logits_of(model, tokens, real)
    return float(difference[real].abs().max())


def greedy(model, prompt):
    """What `generate` appends, and the smallest gap between the best two logits on the way."""
    plan = transformers.GenerationConfig(max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        whole = model.generate(
            prompt[None], generation_config=plan, attention_mask=torch.ones_like(prompt[None])
        )
        assert whole.shape[1] == len(prompt) + GENERATED
        best = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2)
    text = whole[0, len(prompt) :]
    # Without a cache it has to come out the same, or the model is too close to a tie.
    gap = best.values[:, 0] - best.values[:, 1]
    gap = torch.where(best.indices[:, 0] == text, gap, 0.0)
    return text, float(gap.min())


def conditioned(model, tokens, real):
    """Slots that every token sees, in a cache at position 0, and a vector on every embedding."""
    config, rows, length = model.config, *tokens.shape
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    generator = torch.Generator().manual_seed(3)
    shape = (config.num_hidden_layers, 2, rows, heads, SLOTS, size)
    slots = torch.randn(shape, generator=generator)
    embedding = torch.randn(rows, config.hidden_size, generator=generator)
    cache = transformers.DynamicCache()
    for layer, (key, value) in enumerate(slots):
        cache.update(key, value, layer)
    back = torch.arange(length)[:, None] - torch.arange(length)
    visible = {"full_attention": back >= 0}
    if getattr(config, "sliding_window", None):
        visible["sliding_attention"] = (back >= 0) & (back < config.sliding_window)
    masks = {
        kind: torch.where(functional.pad(mask, (SLOTS, 0), value=True), 0.0, -torch.inf)[None, None]
        for kind, mask in visible.items()
    }
    if config.model_type != "qwen2":  # whose layers differ
        masks = masks.popitem()[1]
    logits = model(
        inputs_embeds=model.get_input_embeddings()(tokens) + embedding[:, None],
        attention_mask=masks,
        past_key_values=cache,
        position_ids=torch.arange(1, length + 1)[None].expand(rows, -1),
    ).logits
    return dict(slots=slots, embedding=embedding, conditioned=logits[real])


def save(model, folder, loss, **golden):
    names, parameters = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    golden |= {f"gradient/{name}": slope for name, slope in zip(names, slopes, strict=True)}
    golden |= dict(loss=loss, lengths=torch.tensor(LENGTHS))
    arrays = {name: tensor.detach().numpy() for name, tensor in golden.items()}
    arrays = {n: a.astype(np.int32) if a.dtype == np.int64 else a for n, a in arrays.items()}
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    np.savez_compressed(folder / "golden.npz", **arrays)


def make_decoder(folder, model, tokens, real):
    prompts = [tokens[i, :length] for i, length in enumerate(PROMPTS)]
    for seed in itertools.count():
        draw(model, seed)
        texts, gaps = zip(*[greedy(model, prompt) for prompt in prompts], strict=True)
        distinct = min(len(set(text.tolist())) for text in texts)
        if min(gaps) > LEAST_GAP and distinct >= LEAST_DISTINCT:
            break
    print(f"{folder.name}: seed {seed}, smallest gap {min(gaps):.4f}, {distinct} distinct tokens")
    for change in CHANGES.get(folder.name, ()):
        changed = effect(model, change, tokens, real)
        print(f"  with {change} logits change by up to {changed:.3f}")
        assert changed > LEAST_EFFECT, change
    logits = logits_of(model, tokens, real)
    target = torch.where(real[:, 1:], tokens[:, 1:], -100)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten())
    print(f"  loss {loss:.3f}, largest logit {logits[real].abs().max():.2f}")
    golden = {f"prompt_{i}": prompt for i, prompt in enumerate(prompts)}
    golden |= {f"greedy_{i}": text for i, text in enumerate(texts)}
    golden |= conditioned(model, tokens, real)
    save(model, folder, loss, tokens=tokens, logits=logits[real], **golden)


def make_encoder(folder, model, tokens, real):
    draw(model, seed=0)
    out = model(tokens, attention_mask=real.long())
    pooled = out.pooler_output
    if (folder / "modules.json").exists():
        total = (out.last_hidden_state * real[:, :, None]).sum(1)
        pooled = functional.normalize(total / real.sum(1, keepdim=True), dim=1)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
    golden = dict(tokens=tokens, hidden=out.last_hidden_state[real], pooled=pooled, weight=weight)
    save(model, folder, (pooled * weight).sum(), **golden)


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("tiny_*")):
        config = transformers.AutoConfig.from_pretrained(HERE / name)
        make = make_encoder if config.model_type == "bert" else make_decoder
        make(HERE / name, build(config), *batch(config.vocab_size))


if __name__ == "__main__":
    main()
