"""What a run writes down: metrics.jsonl, every step in full, and TensorBoard scalars."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import tensorboardX


class MetricsLog:
    """metrics.jsonl and TensorBoard of one run.

    A line is {"step": steps done, "kind": "train" | "evaluation", name: value, …}. Values have all
    their digits, so that two runs can be compared bit for bit.
    """

    def __init__(self, run_dir: str | Path, step: int):
        """Opens the logs of a run that has done `step` steps, and drops what is past it.

        A killed run has logged steps that its last checkpoint does not hold; they are run again.
        """
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            # Of a run that starts again, nothing is kept: its first line is the evaluation at 0.
            kept = [line for line in read(self.path) if line["step"] <= step != 0]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(Path(run_dir) / "tensorboard"), purge_step=step + 1, flush_secs=10
        )

    def write(self, step: int, kind: str, values: Mapping[str, float], *, board: bool = True):
        """One line, and one scalar for each value where `board`."""
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()  # To the system: what a killed process has written stays.
        if board:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut off in the middle is left out."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
