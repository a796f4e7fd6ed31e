"""What a compiled program sends between devices, read off its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r'op_name="([^"]*)"')
_GROUPS = re.compile(r"replica_groups=(\{\}|\{\{[^}]*\}|\[\d+,\d+\]|mesh\S* \{[^}]*\})")
_DEVICES = re.compile(r"(?:num_partitions|replica_count)=(\d+)")
_START = re.compile(r"^\s*%?([\w.-]+) = .* [a-z-]+-start\(")
_OPERAND = re.compile(r"-done\(.*?%?([\w.-]+)\)")
_AXES = re.compile(r"'(\w+)'=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective. bytes: of its result on one device; times: how often a step runs it.

    group: how many devices take part. name: where in the traced program it comes from.
    """

    kind: str
    bytes: int
    times: int
    group: int
    name: str

    def within(self, scope: str) -> bool:
        """Whether it comes from a `jax.named_scope`, or from its gradient: "jvp(scope)" and the like."""
        return re.search(rf"[/(]{re.escape(scope)}\)*/", self.name) is not None

    @property
    def moved(self) -> int:
        """Bytes that a device sends in a step, by a ring."""
        n = self.group
        part = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }[self.kind]
        return int(self.bytes * self.times * part)


def collectives(text: str) -> list[Collective]:
    """All collectives between more than one device, in the order of the text.

    Args:
        text: `compiled.as_text()`.
    Raises:
        ValueError: no HLO of which an entry can be told.
    """
    bodies, entry = _computations(text)
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    times = dict.fromkeys(bodies, 0)

    def run(name: str, often: int) -> None:
        times[name] += often
        for line in bodies[name]:
            trips = _TRIPS.search(line)
            inner = often * (int(trips[1]) if trips and " while(" in line else 1)
            for called in _called(line):
                if called in bodies:
                    run(called, inner)

    run(entry, 1)
    devices = math.prod(int(n) for n in _DEVICES.findall(text.split("\n", 1)[0]))
    starts = {m[1]: line for lines in bodies.values() for line in lines if (m := _START.match(line))}
    found = (
        _collective(line, times[name], starts, devices)
        for name, lines in bodies.items()
        for line in lines
    )
    return [one for one in found if one is not None and one.times and one.group > 1]


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    bodies, entry, current = {}, None, None
    for line in text.split("\n"):
        head = _HEAD.match(line)
        if head and " = " not in line.split("(")[0]:
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def _called(line: str) -> Iterator[str]:
    if " async-done(" in line or " async-update(" in line:
        return  # What its start has called.
    for found in _CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in found.strip("{}").split(","))


def _collective(line: str, times: int, starts: dict[str, str], devices: int) -> Collective | None:
    match = _LINE.match(line)
    # An asynchronous one is a pair: its end has the results alone, its start the groups and the name.
    kind = match[2].removesuffix("-done") if match else None
    if kind not in KINDS:
        return None
    operand = _OPERAND.search(line)
    said = starts[operand[1]] if operand else line
    size = sum(
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in _ARRAY.findall(match[1])
    )
    name = _NAME.search(said)
    return Collective(kind, size, times, _group(said, devices), name[1] if name else "")


def _group(line: str, devices: int) -> int:
    found = _GROUPS.search(line)
    if found is None:
        return 2  # Pairs of a permutation.
    text = found[1]
    if text == "{}":
        return devices
    if text.startswith("mesh"):
        sizes = dict(_AXES.findall(text.split("{")[0]))
        return math.prod(int(sizes[axis.strip(" '")]) for axis in text.split("{")[1][:-1].split(","))
    if text.startswith("["):
        return int(text[1:-1].split(",")[1])
    return text.count(",") + 1
