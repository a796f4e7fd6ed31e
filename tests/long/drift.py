"""A million facts in and out of one streaming memory in float32, beside float64.

    python tests/long/drift.py --out runs/drift        # about 5 minutes for each ridge on 2 cores

256 facts are in at any time (K = 512, C = 768); each two steps forget one of them and write another of
1,024. Every 50,000 steps the memory is compared with a float64 solve of the facts that are in, and its
own estimate of its error with what it is. A line of drift.jsonl each, and a picture, drift.png; a run
that was stopped goes on.
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
from larimar_jax.memory import health, rls
from larimar_jax.memory.streaming import Streaming

SLOTS, LATENT, POOL, IN = 512, 768, 1024, 256
BLOCK, EVERY = 10_000, 50_000


def unit(rng, rows):
    found = rng.standard_normal((rows, LATENT))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


class Facts:
    """Which facts are in: a swap at a time, a function of the seed alone."""

    def __init__(self):
        self._rng = np.random.default_rng(1)
        self.inside, self._outside = list(range(IN)), list(range(IN, POOL))

    def swaps(self, steps):
        chosen, signs = [], []
        for _ in range(steps // 2):
            gone, come = self._rng.integers(IN), self._rng.integers(POOL - IN)
            chosen += [self.inside[gone], self._outside[come]]
            signs += [-1, 1]
            self.inside[gone], self._outside[come] = self._outside[come], self.inside[gone]
        return np.int32(chosen), np.int32(signs)


def run(ridge, noise, steps):
    """Yields a line every EVERY steps."""
    rng = np.random.default_rng(0)
    keys, values = unit(rng, POOL), unit(rng, POOL)
    keys32, values32 = jnp.float32(keys), jnp.float32(values)
    keys, values = np.float64(keys32), np.float64(values32)
    variant = Streaming(SLOTS, LATENT, ridge=ridge, query_noise=noise)
    m0 = np.eye(SLOTS, LATENT)
    prepared = variant.prepare(memory.MemoryParams(jnp.float32(m0), jnp.zeros(())))

    # Arguments all: as constants they would be folded, which takes longer than a stream.
    @functools.partial(jax.jit, donate_argnums=0)
    def stream(now, prepared, keys, values, chosen, signs):
        return rls.stream(variant, prepared, now, keys[chosen], values[chosen], signs)

    @jax.jit
    def certify(now, prepared):
        state = rls.to_state(variant, prepared, now)
        return health.distance(variant, prepared, dataclasses.replace(state, solution=now.solution))

    @jax.jit
    def begin(prepared, keys, values):
        state = variant.write(prepared, variant.empty(prepared), keys, values)
        return rls.init(variant, prepared, state)

    now = begin(prepared, keys32[:IN], values32[:IN])
    facts, refreshed, begun = Facts(), 0, time.perf_counter()
    for step in range(BLOCK, steps + 1, BLOCK):
        now, done = stream(now, prepared, keys32, values32, *facts.swaps(BLOCK))
        refreshed += int(done.refreshed.sum())
        if step % EVERY:
            continue
        seconds = time.perf_counter() - begun
        w, z = keys[facts.inside, :SLOTS], values[facts.inside]
        level = 2.0 ** np.round(np.log2(np.square(w).sum() / SLOTS))
        shrink = noise**2 * level
        matrix = w.T @ w + (float(np.float32(ridge)) + shrink) * np.eye(SLOTS)
        exact = m0 + np.linalg.solve(matrix, w.T @ (z - w @ m0) - shrink * m0)
        found = np.float64(now.solution)
        size = np.linalg.norm(w, axis=1, keepdims=True) / np.sqrt(SLOTS)
        noisy = w + 0.5 * size * np.random.default_rng(step).standard_normal(w.shape)

        def apart(q, found=found, exact=exact):
            return float(np.linalg.norm(q @ (found - exact)) / np.linalg.norm(q @ exact))

        yield {
            "ridge": ridge,
            "query_noise": noise,
            "step": step,
            "read": apart(w),
            "read_noisy": apart(noisy),
            "memory": apart(np.eye(SLOTS)),
            "certificate": float(certify(now, prepared)),
            "count": int(now.count),
            "refused": int(now.state.refused),
            "condition": float(now.condition),
            "refreshed": refreshed,
            "seconds": seconds,
        }


def draw(lines, path):
    """The error of reads over the steps, a line a ridge, beside the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for case in dict.fromkeys((x["ridge"], x["query_noise"]) for x in lines):
        rows = [x for x in lines if (x["ridge"], x["query_noise"]) == case]
        worst = [max(x["read"], x["read_noisy"]) for x in rows]
        axes.plot([x["step"] for x in rows], worst, label=f"λ = {case[0]:g}, ρ = {case[1]:g}")
    axes.axhline(1e-4, color="grey", linestyle="--", label="bound")
    axes.set(yscale="log", xlabel="writes and forgets", ylabel="relative error of reads")
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--ridges", type=float, nargs="+", default=[1.0, 1e-2, 1e-4])
    parser.add_argument("--query-noise", type=float, default=0.5)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "drift.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    for ridge in given.ridges:
        case = (ridge, given.query_noise)
        if any((x["ridge"], x["query_noise"], x["step"]) == (*case, given.steps) for x in lines):
            continue
        lines = [x for x in lines if (x["ridge"], x["query_noise"]) != case]
        for line in run(*case, given.steps):
            lines.append(line)
            path.write_text("".join(json.dumps(x) + "\n" for x in lines))
            print(json.dumps(line), flush=True)
    draw(lines, given.out / "drift.png")
    worst = max(max(x["read"], x["read_noisy"]) for x in lines)
    ratios = [x["certificate"] / x["memory"] for x in lines]
    print(f"worst error of a read: {worst:.2e}")
    print(f"certificate / error: {min(ratios):.2f} to {max(ratios):.2f}")
    return 0 if worst <= 1e-4 and 0.1 <= min(ratios) and max(ratios) <= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
