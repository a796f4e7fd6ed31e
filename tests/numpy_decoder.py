"""§2 in float64 NumPy: one row of tokens through a decoder that a latent conditions.

Written from the specification and not from the library, whose parameters and sizes it takes: loops
instead of masks, complex numbers instead of rotations, no batch and no cache.
"""

import numpy as np


def forward(p, config, tokens, latent=None, *, interleaved=False):
    """Final hidden states [T, D].

    p: the decoder's parameters, nested by name, layers stacked. latent: (vector [D], keys
    [L, P, G, d], values [L, P, G, d]), or None for the untouched model, whose positions start at 0.
    interleaved: which of the two layouts rotary heads have.
    """
    first = 0 if latent is None else 1
    positions = first + np.arange(len(tokens))
    x = p["word"]["embedding"][tokens]
    if latent is not None:
        x = x + latent[0]
    if "position" in p:
        x = x + p["position"]["embedding"][positions]
    for layer in range(config.depth):
        w = pick(p["layers"], layer)
        slots = None if latent is None else (latent[1][layer], latent[2][layer])
        window = window_of(config, layer)
        angles = None if "position" in p else angles_of(config, positions)

        def mixed(y, w=w["attention"], slots=slots, window=window, angles=angles):
            return attention(y, w, config, slots, window, angles, interleaved)

        if "mlp_norm" in w:
            x = x + mixed(norm(x, w["attention_norm"], config))
            x = x + mlp(norm(x, w["mlp_norm"], config), w)
        else:  # GPT-J: both at once
            y = norm(x, w["norm"], config)
            x = x + mixed(y) + mlp(y, w)
    return norm(x, p["norm"], config)


def attention(y, w, config, slots, window, angles, interleaved):
    """Every head of every token, one by one: the slots, then its own past and itself."""
    length, size = len(y), config.head_size
    query, key, value = (
        affine(y, w[name]).reshape(length, -1, size) for name in ("query", "key", "value")
    )
    if angles is not None:
        query, key = turned(query, angles, interleaved), turned(key, angles, interleaved)
    out = np.zeros_like(query)
    for t, head in np.ndindex(length, config.heads):
        group = head // (config.heads // config.kv_heads)
        start = max(0, t + 1 - window)
        keys, values = key[start : t + 1, group], value[start : t + 1, group]
        if slots is not None:
            keys = np.concatenate([slots[0][:, group], keys])
            values = np.concatenate([slots[1][:, group], values])
        scores = keys @ query[t, head] / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        out[t, head] = weights @ values / weights.sum()
    return affine(out.reshape(length, -1), w["output"])


def mlp(y, w):
    """GELU by its tanh approximation, or SwiGLU where there is a gate."""
    up = affine(y, w["up"])
    if "gate" in w:
        gate = affine(y, w["gate"])
        return affine(gate / (1 + np.exp(-gate)) * up, w["down"])
    gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return affine(gelu, w["down"])


def norm(x, w, config):
    """LayerNorm, or RMSNorm where there is no bias."""
    y = x - x.mean(axis=-1, keepdims=True) if "bias" in w else x
    y = y / np.sqrt((y**2).mean(axis=-1, keepdims=True) + config.norm_eps)
    return y * w["scale"] + w.get("bias", 0.0)


def affine(x, w):
    return x @ w["kernel"] + w.get("bias", 0.0)


def angles_of(config, positions):
    """Radians [T, pairs]."""
    size = getattr(config, "rotary", config.head_size)
    theta = getattr(config, "rope_theta", 10000.0)
    return positions[:, None] * theta ** (-np.arange(0, size, 2) / size)


def turned(x, angles, interleaved):
    """[T, H, d] with the first pairs of every head rotated, as complex numbers."""
    pairs = angles.shape[1]
    first = np.arange(pairs) * (2 if interleaved else 1)
    second = first + (1 if interleaved else pairs)
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, None]
    out = x.copy()
    out[..., first], out[..., second] = z.real, z.imag
    return out


def window_of(config, layer):
    """How many tokens back a layer sees, itself included."""
    window = getattr(config, "window", 0)
    return window if window and layer >= config.unwindowed else config.max_length


def pick(tree, layer):
    """One layer of stacked parameters."""
    if isinstance(tree, dict):
        return {name: pick(part, layer) for name, part in tree.items()}
    return tree[layer]
