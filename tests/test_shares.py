"""A benchmark in shares gives what one process gives."""

import argparse
import threading

import pytest
from test_bench import KnownEditor, cases, experiment

from larimar_jax import cli
from larimar_jax.bench import counterfact, runner, shares


@pytest.mark.parametrize(("count", "n"), [(2, 11), (3, 11), (5, 11), (4, 3)])
def test_shares_make_the_result_of_one_process(tmp_path, count, n):
    whole = runner.run(experiment(n), tmp_path / "whole", quiet=True)
    folder, found = tmp_path / "shared", []
    for index in reversed(range(count)):
        found.append(shares.run(experiment(n), folder, shares.Share(index, count), quiet=True))
    assert found[:-1] == [None] * (count - 1)
    assert found[-1]["results"] == whole["results"]
    assert found[-1]["settings"] == whole["settings"]
    lines = (folder / runner.CASES).read_bytes()
    assert lines == (tmp_path / "whole" / runner.CASES).read_bytes()
    assert runner.run(experiment(n), folder, quiet=True)["run"]["resumed_at_case"] == n


def test_no_case_is_computed_twice_and_a_share_goes_on_where_it_was(tmp_path):
    computed = []

    class Counting(counterfact.CounterFact):
        def run(self, some):
            computed.extend(case.case_id for case in some)
            return super().run(some)

    def made():
        return Counting(KnownEditor(), cases(11), data={}, chunk=2)

    shares.run(made(), tmp_path, shares.Share(1, 2), quiet=True)
    assert computed == [case.case_id for start in (2, 6, 10) for case in cases(11)[start : start + 2]]
    first = tmp_path / "share-1-of-2" / runner.CASES
    first.write_bytes(first.read_bytes()[:-5])
    assert shares.run(made(), tmp_path, shares.Share(0, 2), quiet=True) is None  # one line is missing
    assert shares.run(made(), tmp_path, shares.Share(1, 2), quiet=True)["cases"] == 11
    assert sorted(computed) == sorted([case.case_id for case in cases(11)] + [cases(11)[10].case_id])


@pytest.mark.parametrize("attempt", range(3))
def test_shares_that_end_together_make_one_result(tmp_path, attempt):
    whole = runner.run(experiment(23, 1), tmp_path / "whole", quiet=True)
    found = []
    parts = [
        threading.Thread(
            target=lambda i=i: found.append(
                shares.run(experiment(23, 1), tmp_path / "shared", shares.Share(i, 4), quiet=True)
            )
        )
        for i in range(4)
    ]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    made = [summary for summary in found if summary is not None]
    assert len(found) == 4 and made
    assert all(summary["results"] == whole["results"] for summary in made)
    assert (tmp_path / "shared" / runner.CASES).read_bytes() == (
        tmp_path / "whole" / runner.CASES
    ).read_bytes()


def test_a_share_of_other_settings_is_refused(tmp_path):
    shares.run(experiment(), tmp_path, shares.Share(0, 2), quiet=True)
    with pytest.raises(runner.DifferentSettings, match="data.limit"):
        shares.run(experiment(limit=3), tmp_path, shares.Share(0, 2), quiet=True)
    with pytest.raises(runner.DifferentSettings, match="share-0-of-2.*\n.*data.limit"):
        shares.run(experiment(limit=3), tmp_path, shares.Share(1, 2), quiet=True)
    assert not (tmp_path / runner.CASES).exists()


def test_lines_that_no_share_wrote_are_an_error(tmp_path):
    shares.run(experiment(), tmp_path, shares.Share(0, 2), quiet=True)
    with (tmp_path / "share-0-of-2" / runner.CASES).open("a") as file:
        file.write('{"case_id": 99}\n')
    with pytest.raises(runner.BrokenRun, match="has 8 lines, and there are 7 cases in this share"):
        shares.run(experiment(), tmp_path, shares.Share(1, 2), quiet=True)


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_what_is_no_share_is_refused(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="is no share: say I/N"):
        shares.share(text)
    assert shares.share("3/4") == shares.Share(3, 4)
    line = ["bench", "counterfact", "--data", "x", "--out", "y", "--share", text]
    with pytest.raises(SystemExit):
        cli.main(line)
