"""The speed benchmark on a tiny decoder: what it records, and that it compares equals."""

import argparse
import json

import numpy as np
import pytest

from larimar_jax import weights
from larimar_jax.bench import generation, runner


@pytest.fixture
def args(tiny, monkeypatch):
    model = tiny.model.decoder, tiny.decoder_tokenizer
    monkeypatch.setattr(weights, "load_decoder", lambda source: model)
    parser = argparse.ArgumentParser()
    generation.arguments(parser)
    command = ["--batch", "1", "3", "--prompt", "4", "--tokens", "6", "--repeats", "2", "--alone"]
    return parser.parse_args(command)


def test_a_run_is_recorded_and_taken_up(args, tmp_path):
    summary = runner.run(generation.experiment(args), tmp_path, quiet=True)
    assert set(summary["results"]) == {"1", "3"}
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert [line["case_id"] for line in lines] == ["1x0", "1x1", "3x0", "3x1"]
    median = np.median([line["seconds"]["larimar"] for line in lines[2:]])
    speed = summary["results"]["3"]["tokens_per_second"]["larimar"]
    assert speed == pytest.approx(3 * 6 / median)
    again = runner.run(generation.experiment(args), tmp_path, quiet=True)
    assert again["results"] == summary["results"]


def test_both_sides_are_warm_and_given_the_same(args, tmp_path, monkeypatch):
    given = []

    class Theirs:
        def __init__(self, ours):
            self.ours = ours

        def decode(self, ids, tokens):
            given.append((ids.tolist(), tokens))
            return self.ours.decode(ids, tokens)

    monkeypatch.setattr(generation, "_Theirs", Theirs)
    args.alone = False
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: True)
    summary = runner.run(generation.experiment(args), tmp_path, quiet=True)
    assert len(given) == 2 * (1 + 2)  # per batch size one untimed and two timed
    for found in summary["results"].values():
        speed = found["tokens_per_second"]
        assert found["ratio"] == pytest.approx(speed["larimar"] / speed["huggingface"])
        assert found["same_tokens"] == 1.0


def test_a_comparison_without_torch_says_what_to_install(args, monkeypatch):
    args.alone = False
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"\[compare\].*--alone"):
        generation.experiment(args)
