"""Recall that tells what was asked: by hash of prompt and target, and moved by the condition.

The tiny model's own answers are nearly always wrong: its recall is 0, whatever it is asked.
"""

import numpy as np
from test_bench import fraction

from larimar_jax.pipeline import Pipeline
from larimar_jax.scoring import Scores


def judge(self, prompts, candidates, condition=None):
    """In place of `Pretrained.judge`."""
    found = np.asarray(
        [[fraction(p, t) for t in row] for p, row in zip(prompts, candidates, strict=True)], np.float32
    )
    if condition is not None:
        embedding = np.abs(np.asarray(condition.prefix.embedding)[: len(prompts)])
        found += 1 + embedding.reshape(len(prompts), -1).mean(axis=1, keepdims=True)
    return Scores(found, found, np.zeros((*found.shape, 1), bool))


def install(monkeypatch, *, threshold):
    """`judge`, and a scope that lets through what is as near as `threshold`."""
    monkeypatch.setattr(Pipeline, "judge", judge)
    monkeypatch.setattr(Pipeline, "scope_threshold", threshold)
