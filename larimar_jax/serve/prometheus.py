"""Counters, histograms and gauges in Prometheus' text format."""

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping

_ABOUT = {
    "larimar_requests_total": "Requests, by endpoint and status.",
    "larimar_tokens_total": "Tokens of answers.",
    "larimar_passes_total": "Decoder passes; questions enter one while it is on its way.",
    "larimar_answers_total": "Answers, by whether a written fact gave them.",
    "larimar_ask_seconds": "From a question's arrival to the end of its answer.",
    "larimar_write_seconds": "From a change's arrival to its place on the disk.",
    "larimar_queue": "Questions that wait.",
    "larimar_facts": "Facts of each memory that is open.",
    "larimar_ready": "Whether the programs of usual requests are compiled.",
}
_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What a server counts; threads may share it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = defaultdict(float)
        self._seconds: dict[str, list[float]] = {}

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, tuple(labels.items())] += amount

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        with self._lock:
            row = self._seconds.setdefault(name, [0.0] * (len(_BUCKETS) + 2))
            for place, bound in enumerate(_BUCKETS):
                row[place] += seconds <= bound
            row[-2] += 1
            row[-1] += seconds

    def text(self, gauges: Iterable[tuple[str, Mapping[str, str], float]]) -> str:
        """Return all of it, with gauges as (name, labels, value)."""
        with self._lock:
            counts, seconds = dict(self._counts), {n: [*row] for n, row in self._seconds.items()}
        lines: dict[str, list[str]] = defaultdict(list)
        kinds = dict.fromkeys((name for name, _ in counts), "counter")
        for (name, labels), value in counts.items():
            lines[name].append(_line(name, labels, value))
        for name, row in seconds.items():
            kinds[name] = "histogram"
            for bound, value in zip((*map(str, _BUCKETS), "+Inf"), row, strict=False):
                lines[name].append(_line(f"{name}_bucket", (("le", bound),), value))
            lines[name].append(_line(f"{name}_count", (), row[-2]))
            lines[name].append(_line(f"{name}_sum", (), row[-1]))
        for name, labels, value in gauges:
            kinds[name] = "gauge"
            lines[name].append(_line(name, tuple(labels.items()), value))
        return "".join(
            f"# HELP {name} {_ABOUT[name]}\n# TYPE {name} {kinds[name]}\n" + "".join(lines[name])
            for name in lines
        )


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{label}="{text}"' for label, text in labels)
    return f"{name}{{{inside}}} {value:.12g}\n" if labels else f"{name} {value:.12g}\n"
