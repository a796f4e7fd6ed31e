"""A million facts in and out of one streaming memory in float32, beside float64.

    python tests/long/drift.py --out runs/drift        # about 8 minutes for each ridge on 2 cores

256 facts are in at any time (K = 512, C = 768); a block forgets 64 of them and writes 64 others of
1,024, row by row. Every 51,200 edits the memory is compared with a float64 solve of the facts that are
in, and its own estimate of its error with the measured one. A line of drift.jsonl each, and a picture,
drift.png; a run that was stopped goes on.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from larimar_jax import memory
from larimar_jax.memory import diagnostics, rls
from larimar_jax.memory.streaming import Streaming

SLOTS, LATENT, POOL, IN = 512, 768, 1024, 256
SWAPPED, BLOCKS = 64, 400  # facts of a block, blocks of a checkpoint


def unit(rng, rows):
    normal = rng.standard_normal((rows, LATENT))
    return np.float64(np.float32(normal / np.linalg.norm(normal, axis=1, keepdims=True)))


def run(ridge, noise, edits):
    """Yield a line for each checkpoint."""
    rng, order = np.random.default_rng(0), np.random.default_rng(1)
    keys, values = unit(rng, POOL), unit(rng, POOL)
    arrays = (jnp.float32(keys), jnp.float32(values))
    variant, m0 = Streaming(SLOTS, LATENT, ridge=ridge, query_noise=noise), np.eye(SLOTS, LATENT)
    params = memory.MemoryParams(jnp.float32(m0), jnp.zeros(()))
    prepared = variant.prepare(params)

    # Arguments all: as constants they would be folded, which takes longer than a stream.
    @functools.partial(jax.jit, donate_argnums=0)
    def swap(now, prepared, arrays, old, new):
        now, _ = rls.without(variant, prepared, now, *(x[old] for x in arrays))
        return rls.stream(variant, prepared, now, *(x[new] for x in arrays))

    @jax.jit
    def certify(now, prepared):
        state = rls.to_state(variant, prepared, now)
        state = dataclasses.replace(state, solution=now.solution)
        return diagnostics.distance(variant, prepared, state), variant.condition(state)

    inside, outside = np.arange(IN), np.arange(IN, POOL)
    state = variant.write(prepared, variant.empty(prepared), *(x[inside] for x in arrays))
    now, factorisations, begin = rls.init(variant, prepared, state), 0, time.perf_counter()
    for block in range(1, edits // (2 * SWAPPED) + 1):
        old = order.choice(IN, SWAPPED, replace=False)
        new = order.choice(POOL - IN, SWAPPED, replace=False)
        now, steps = swap(now, prepared, arrays, inside[old], outside[new])
        inside[old], outside[new] = outside[new], inside[old]
        factorisations += 1 + int(steps.refactorized.sum())
        if block % BLOCKS:
            continue
        seconds = time.perf_counter() - begin
        w, z = keys[inside, :SLOTS], values[inside]
        shrink = noise**2 * 2.0 ** np.round(np.log2(np.square(w).sum() / SLOTS))
        gram = w.T @ w + (float(np.float32(ridge)) + shrink) * np.eye(SLOTS)
        exact = m0 + np.linalg.solve(gram, w.T @ (z - w @ m0) - shrink * m0)
        error = np.float64(now.solution) - exact
        size = np.linalg.norm(w, axis=1, keepdims=True) / np.sqrt(SLOTS)
        noisy = w + 0.5 * size * np.random.default_rng(block).standard_normal(w.shape)
        certificate, condition = certify(now, prepared)

        def relative(q, error=error, exact=exact):
            return float(np.linalg.norm(q @ error) / np.linalg.norm(q @ exact))

        yield {
            "ridge": ridge,
            "query_noise": noise,
            "edits": 2 * SWAPPED * block,
            "read": relative(w),
            "read_noisy": relative(noisy),
            "memory": relative(np.eye(SLOTS)),
            "certificate": float(certificate),
            "count": int(now.count),
            "refused": int(now.state.refused),
            "condition": float(condition),
            "factorisations": factorisations,
            "seconds": seconds,
        }


def draw(lines, path):
    """Draw the error of reads over the edits, a line a ridge, beside the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for case in dict.fromkeys((x["ridge"], x["query_noise"]) for x in lines):
        rows = [x for x in lines if (x["ridge"], x["query_noise"]) == case]
        worst = [max(x["read"], x["read_noisy"]) for x in rows]
        axes.plot([x["edits"] for x in rows], worst, label=f"λ = {case[0]:g}, ρ = {case[1]:g}")
    axes.axhline(1e-4, color="grey", linestyle="--", label="bound")
    axes.set(yscale="log", xlabel="writes and forgets", ylabel="relative error of reads")
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=1_024_000)
    parser.add_argument("--ridges", type=float, nargs="+", default=[1.0, 1e-2, 1e-4])
    parser.add_argument("--query-noise", type=float, default=0.5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "drift.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    for ridge in options.ridges:
        case = (ridge, options.query_noise)
        if any((x["ridge"], x["query_noise"], x["edits"]) == (*case, options.edits) for x in lines):
            continue
        lines = [x for x in lines if (x["ridge"], x["query_noise"]) != case]
        for line in run(*case, options.edits):
            lines.append(line)
            path.write_text("".join(json.dumps(x) + "\n" for x in lines))
            print(json.dumps(line), flush=True)
    draw(lines, options.out / "drift.png")
    worst = max(max(x["read"], x["read_noisy"]) for x in lines)
    ratios = [x["certificate"] / x["memory"] for x in lines]
    print(f"worst error of a read: {worst:.2e}")
    print(f"certificate / error: {min(ratios):.2f} to {max(ratios):.2f}")
    refused = any(x["refused"] for x in lines)
    return int(refused or worst > 1e-4 or min(ratios) < 0.1 or max(ratios) > 10)


if __name__ == "__main__":
    sys.exit(main())
