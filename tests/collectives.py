"""What a compiled program sends between devices, read from its HLO."""

import math
import re
from typing import Any, NamedTuple

from meshes import CLASSES, FEATURES, ROWS, TOP

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|send|recv"
INSTRUCTION = re.compile(rf"= (.*?) ((?:ragged-)?(?:{KINDS}))(?:-start)?\(")
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "f64": 8, "s64": 8, "bf16": 2}


class Collective(NamedTuple):
    """One array that a program sends, `times` times, within groups of `devices`."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int
    devices: int

    @property
    def bytes(self) -> int:
        """Of all the times together, on one device."""
        return self.times * math.prod(self.shape) * BYTES[self.dtype]

    @property
    def sent(self) -> float:
        """What a device sends of an all-reduce in a ring: all of it but its own part, once to add, once to share."""
        assert self.kind == "all-reduce"
        return 2 * self.bytes * (self.devices - 1) / self.devices

    @property
    def extent(self) -> tuple[int, ...]:
        """The dimensions other than 1, in order of size."""
        return tuple(sorted(n for n in self.shape if n != 1))


def collectives(compiled: Any) -> list[Collective]:
    """Every collective in a compiled program; one that is started and ended by two instructions counts once."""
    computations = _computations(compiled.as_text())
    found = []
    for name, times in _executions(computations).items():
        for line in computations[name]:
            match = INSTRUCTION.search(line)
            if match:
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                found += [
                    Collective(match[2], dtype, tuple(int(n) for n in dims.split(",") if n), times, _group_size(line))
                    for dtype, dims in arrays
                ]
    return found


def _group_size(line: str) -> int:
    """Of the groups of devices, which are listed, counted, or named by axes of a mesh; 0 where there are none."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        return math.prod(int(sizes[axis]) for axis in named[2].split(","))
    return 0


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation; that of the program is called ENTRY."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            lines = computations.setdefault("ENTRY" if head[1] else head[2], [])
        lines.append(line)
    return computations


def _executions(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in computations[name]:
            trips = 1
            if " while(" in line:
                known = re.search(r"known_trip_count\D+(\d+)", line)
                assert known, f"a loop of unknown length: {line}"
                trips = int(known[1])
            for called in re.findall(r"(?:calls|body|to_apply|_computation)=%?([\w.\-]+)", line):
                visit(called, count * trips)

    visit("ENTRY", 1)
    return times


def foreign(found: list[Collective], data: int, vocab: int) -> list[Collective]:
    """What is neither a sum of a few numbers a row, nor of one a class, nor of a gradient by hidden or kernel."""

    def is_due(extent: tuple[int, ...]) -> bool:
        if len(extent) < 2:
            return sum(extent) <= max(ROWS // data, CLASSES)
        few = [n for n in extent if n in (FEATURES, TOP, vocab)]
        many = [n for n in extent if n not in few]
        return len(many) <= 1 and sum(many) <= max(ROWS // data, CLASSES // vocab)

    return [c for c in found if c.kind not in ("all-reduce", "reduce-scatter") or not is_due(c.extent)]
