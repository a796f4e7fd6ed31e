"""A run that is killed while it saves loses the checkpoint that was being written and no other."""

import kills


def test_a_run_killed_while_saving_goes_on_from_the_save_before(tmp_path):
    found = kills.kills(tmp_path / "run", count=3, seed=0, interval=2, pause=0.01)
    assert len(found) == 3
    assert found[-1].restored > 0
