"""The step of a run against numbers that were recorded once."""

import json

import pytest
from golden import make_training_step as golden

WANT = json.loads(golden.FILE.read_text())


def differences(want, have, path=""):
    """Yield (relative difference, path) of every number; sums of a parameter relative to its norm."""
    if isinstance(want, dict):
        assert want.keys() == have.keys(), path
        for key in want:
            yield from differences(want[key], have[key], f"{path}/{key}")
    elif isinstance(want, list) and not isinstance(want[0], dict):
        yield from ((abs(a - b) / want[-1], path) for a, b in zip(want, have, strict=True))
    elif isinstance(want, list):
        for index, pair in enumerate(zip(want, have, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    else:
        yield (abs(want - have) / max(abs(want), 1e-3), path)


@pytest.mark.parametrize("name", golden.RUNS)
def test_three_steps_compute_the_recorded_numbers(name):
    bound = 1e-2 if "bfloat16" in name else 1e-5
    have = golden.record(golden.RUNS[name])
    worst = min(max(differences(WANT[own], have)) for own in WANT if own.startswith(name))
    assert worst[0] < bound, worst


def test_the_initialisers_draw_the_recorded_parameters():
    worst = max(differences(WANT["initial"], golden.initial()))
    assert worst[0] < 1e-5, worst
