"""A run that is killed while it saves loses the checkpoint that was being written and no other."""

import kills


def test_a_run_killed_while_saving_is_resumed_from_the_save_before(tmp_path):
    killed = kills.kills(tmp_path / "run", count=3, seed=0, interval=2, pause=0.01)
    assert len(killed) == 3
    assert killed[-1].restored > 0
