"""Collectives of a compiled program, read off its HLO text."""

import dataclasses
import math
import re
from collections.abc import Callable

# Bytes that each of n devices sends by a ring, per byte of the result.
KINDS: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})\(")
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(\{\}|\{\{[^}]*\}|\[\d+,\d+\]|mesh\S* \{[^}]*\})")
_MESH_AXES = re.compile(r"'(\w+)'=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective. bytes: of its result on one device; times: how often a step runs it.

    group: how many devices take part. name: its place in the traced program. conditional: whether a
    device may leave it out, and another wait for it for ever.
    """

    kind: str
    bytes: int
    times: int
    group: int
    name: str
    conditional: bool

    def within(self, scope: str) -> bool:
        """Return whether it is of a `jax.named_scope` or of its gradient, such as "jvp(scope)"."""
        return re.search(rf"[/(]{re.escape(scope)}\)*/", self.name) is not None

    @property
    def moved(self) -> int:
        """Bytes that a device sends in a step, by a ring."""
        return int(self.bytes * self.times * KINDS[self.kind](self.group))


def read_collectives(text: str) -> list[Collective]:
    """Return all collectives between two or more devices in the HLO text of a program for CPU.

    Args:
        text: `compiled.as_text()`.
    Raises:
        ValueError: no HLO in which an entry can be recognised.
    """
    bodies: dict[str, list[str]] = {}
    entry = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif bodies:
            lines.append(line)
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    times, conditional = dict.fromkeys(bodies, 0), dict.fromkeys(bodies, False)

    def run(name: str, often: int, branch: bool) -> None:
        times[name] += often
        conditional[name] |= branch
        for line in bodies[name]:
            trips = _TRIPS.search(line)
            inner = often * (int(trips[1]) if trips and " while(" in line else 1)
            branches = branch or " conditional(" in line
            for called in _CALLED.findall(line):
                for body in called.strip("{}").split(","):
                    if body.strip(" %") in bodies:
                        run(body.strip(" %"), inner, branches)

    run(entry, 1, False)
    devices = math.prod(
        int(n)
        for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    )
    collectives = []
    for body, line in ((name, text) for name, texts in bodies.items() for text in texts):
        if match := _COLLECTIVE.match(line):
            size = sum(
                int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)
                for bits, shape in _ARRAY.findall(match[1])
            )
            place, group = _NAME.search(line), _group_size(line, devices)
            name = place[1] if place else ""
            collectives.append(
                Collective(match[2], size, times[body], group, name, conditional[body])
            )
    return [c for c in collectives if c.times and c.group > 1]


def _group_size(line: str, devices: int) -> int:
    groups = _GROUPS.search(line)
    if groups is None:
        return 2  # Pairs of a permutation.
    text = groups[1]
    if text == "{}":
        return devices
    if text.startswith("mesh"):
        sizes, axes = dict(_MESH_AXES.findall(text.split("{")[0])), text.split("{")[1][:-1]
        return math.prod(int(sizes[axis.strip(" '")]) for axis in axes.split(","))
    return int(text[1:-1].split(",")[1]) if text.startswith("[") else text.count(",") + 1
