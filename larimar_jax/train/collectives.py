"""Collectives of a compiled program, read off its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

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
_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)=(\{\}|\{\{[^}]*\}|\[[\d,]+\]<=" + _IOTA + "|"
    r"mesh\[[^\]]*\](?:, device_ids=\(" + _IOTA + r"\))? \{[^}]*\})"
)
_MESH_AXES = re.compile(r"'(\w+)'=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective. bytes: of its result on one device; times: how often a step runs it.

    group: those that take part, with the first device. name: its place in the traced program.
    conditional: whether a device may leave it out, and another wait for it for ever.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...]
    name: str
    conditional: bool

    def within(self, scope: str) -> bool:
        """Return whether it is of a `jax.named_scope` or of its gradient, such as "jvp(scope)"."""
        return re.search(rf"[/(]{re.escape(scope)}\)*/", self.name) is not None

    @property
    def moved(self) -> int:
        """Bytes that a device sends in a step, by a ring."""
        return int(self.bytes * self.times * KINDS[self.kind](len(self.group)))

    def leaving(self, node: int) -> int:
        """Bytes that a node of so many devices sends to others in a step.

        A ring that visits a node's devices one after the other leaves the node once.
        """
        nodes = collections.Counter(device // node for device in self.group)
        return self.moved * node // max(nodes.values()) if len(nodes) > 1 else 0


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
    read = []
    for body, line in ((name, text) for name, texts in bodies.items() for text in texts):
        if match := _COLLECTIVE.match(line):
            size = sum(
                int(bits or 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)
                for bits, shape in _ARRAY.findall(match[1])
            )
            place, group = _NAME.search(line), _group(line, devices)
            name = place[1] if place else ""
            read.append(Collective(match[2], size, times[body], group, name, conditional[body]))
    return [c for c in read if c.times and len(c.group) > 1]


def _group(line: str, devices: int) -> tuple[int, ...]:
    """Return the first group of devices that exchange, in the order of the program's devices."""
    text = _GROUPS.search(line)[1]
    if text == "{}":
        return tuple(range(devices))
    if text.startswith("{"):
        return tuple(map(int, text.strip("{}").split(",")))
    # Devices in the order [shape]T(order), by their groups or by a mesh of which some axes are a group.
    lists = re.findall(r"[\d,]*\d(?=[\])])", text.partition("device_ids")[2] or text)
    iota = [[int(n) for n in part.split(",")] for part in lists]
    if text.startswith("["):
        sizes, iota = iota[0], iota[1:]
        is_group = [False, *[True] * (len(sizes) - 1)]
    else:
        axes = dict(_MESH_AXES.findall(text))
        names = re.findall(r"'(\w+)'(?!=)", text)
        sizes, is_group = [*map(int, axes.values())], [name in names for name in axes]
        iota = iota if "device_ids" in text else []
    shape = iota[0] if iota else [math.prod(sizes)]
    ids = np.arange(math.prod(sizes)).reshape(shape)
    ids = (ids.transpose(iota[1]) if iota[1:] else ids).reshape(sizes)
    return tuple(ids[tuple(slice(None) if free else 0 for free in is_group)].ravel().tolist())
