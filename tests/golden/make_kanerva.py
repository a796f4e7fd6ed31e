"""Makes kanerva.npz: the released code's memory without direct writing, in float64.

For every case M₀, encodings, queries and σ; M, U, W̄ and what is read. The recursion is written down
here from the formulas, with σ the observation_noise_std, memory_logvar = 0, and samples left out:

    U₀ = (exp(memory_logvar) + 1e-6) I
    w = (M Mᵀ + σ²I)⁻¹ M z,    Σ = w U wᵀ + σ²,    M ← M + (U w / Σ)(z − w M),    U ← U − U w wᵀU / Σ
    W̄ = Z X,    Z_read = W̄ M,    X ≈ M† by 15 steps of Newton–Schulz

Run with an interpreter that has torch (2.13.0 made the file):

    python tests/golden/make_kanerva.py
"""

import math
import pathlib

import numpy as np
import torch

# (K, C, σ, size of M₀'s numbers, or None for the identity). Of "small" 15 steps invert only a part.
CASES = {
    "released": (12, 20, 1e-6, None),
    "random": (12, 20, 1e-6, 1.0),
    "noisy": (12, 20, 0.1, 1.0),
    "small": (12, 20, 0.1, 0.1),
    "tall": (20, 12, 0.1, 1.0),
}


def write(memory, encodings, noise):
    identity = torch.eye(len(memory)).double()
    covariance = (math.exp(0.0) + 1e-6) * identity
    for z in encodings:
        w = torch.linalg.inv(memory @ memory.T + noise**2 * identity) @ memory @ z
        spread = covariance @ w
        gain = spread / (w @ spread + noise**2)
        memory = memory + torch.outer(gain, z - w @ memory)
        covariance = covariance - torch.outer(gain, spread)
    return memory, covariance


def read(memory, queries):
    inverse = min(math.exp(-5.0), 5e-4) * memory.T
    for _ in range(15):
        inverse = 2 * inverse - inverse @ memory @ inverse
    weights = queries @ inverse
    return weights, weights @ memory


golden, generator = {}, torch.Generator().manual_seed(0)
for name, (slots, latent, noise, size) in CASES.items():
    shapes = dict(prior=slots, encodings=7, queries=5)
    case = {n: torch.randn(k, latent, generator=generator).double() for n, k in shapes.items()}
    case["prior"] = torch.eye(slots, latent).double() if size is None else size * case["prior"]
    case["memory"], case["covariance"] = write(case["prior"], case["encodings"], noise)
    case["weights"], case["read"] = read(case["memory"], case["queries"])
    golden |= {f"{name}/{field}": value.numpy() for field, value in case.items()}
    golden[f"{name}/noise"] = np.float64(noise)
np.savez_compressed(pathlib.Path(__file__).with_name("kanerva.npz"), **golden)
