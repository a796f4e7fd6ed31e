"""Sides timed in turns within one process, so that both see the same machine load, and their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

# Seconds before each timing: threads of the side before may still be spinning for more work.
REST = 0.5


class Times(NamedTuple):
    """Wall-clock seconds of one side's repeats, and CPU seconds of all its threads, which other programs
    on the machine disturb least."""

    wall: list[float]
    cpu: list[float]


class Ratio(NamedTuple):
    """How many times faster `ours` is than `plain`.

    wanted: the least ratio that the documentation promises, None where it promises none. agreement: how
    far apart the results of both sides are.
    """

    name: str
    plain: Times
    ours: Times
    wanted: float | None
    agreement: str

    def of(self, one: Callable[[Sequence[float]], float], clock: str = "wall") -> float:
        """Return the ratio of one number of both sides' seconds, such as the median."""
        return one(getattr(self.plain, clock)) / one(getattr(self.ours, clock))


def interleave(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Return the times of every side. Each has to have run once before, which compiles it."""
    times = {name: Times([], []) for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            time.sleep(REST)
            start, used = time.perf_counter(), time.process_time()
            side()
            times[name].cpu.append(time.process_time() - used)
            times[name].wall.append(time.perf_counter() - start)
    return times


def table(ratios: Sequence[Ratio]) -> Table:
    """Return a row for each ratio; a ratio below what is wanted has an exclamation mark."""
    columns = ("beside (s)", "here (s)", "ratio", "of best", "of CPU", "wanted", "agreement")
    rows = Table("", *columns)
    for ratio in ratios:
        median = ratio.of(statistics.median)
        wanted = "–" if ratio.wanted is None else f"≥ {ratio.wanted:g}"
        short = ratio.wanted is not None and median < ratio.wanted
        numbers = [median, ratio.of(min), ratio.of(statistics.median, "cpu")]
        seconds = [f"{statistics.median(side.wall):.3g}" for side in (ratio.plain, ratio.ours)]
        cells = (*seconds, *(f"{number:.2f}" for number in numbers), wanted + " !" * short)
        rows.add_row(ratio.name, *cells, ratio.agreement)
    return rows
