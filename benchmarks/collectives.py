"""What a compiled program sends between devices, read from its HLO."""

import math
import re
from typing import NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|send|recv"
INSTRUCTION = re.compile(rf"= (.*?) ((?:ragged-)?(?:{KINDS}))(?:-start)?\(")
BITS = re.compile(r"[a-z]+(\d+)")


class Collective(NamedTuple):
    """One array that a program sends, `times` times, within groups of `devices`."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int
    devices: int

    @property
    def bytes(self) -> int:
        """Of the results of all the times together, on one device."""
        bits = BITS.match(self.dtype)
        return self.times * math.prod(self.shape) * (int(bits[1]) // 8 if bits else 1)

    @property
    def extent(self) -> tuple[int, ...]:
        """The dimensions other than 1, in order of size."""
        return tuple(sorted(n for n in self.shape if n != 1))

    @property
    def sent(self) -> float:
        """By one device, in a ring; an all-reduce sends all but the device's own part once to add, once to share."""
        others = max(self.devices - 1, 0)
        share = others / max(self.devices, 1)
        ring = {"all-reduce": 2 * share, "all-gather": share, "all-to-all": share, "reduce-scatter": others}
        return self.bytes * ring.get(self.kind, 1)


def collectives(hlo: str) -> list[Collective]:
    """Every collective in a compiled program; one that is started and ended by two instructions counts once."""
    computations = _computations(hlo)
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
    """How often each computation runs; a loop of unknown length counts once."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in computations[name]:
            known = re.search(r"known_trip_count\D+(\d+)", line) if " while(" in line else None
            for called in re.findall(r"(?:calls|body|to_apply|_computation)=%?([\w.\-]+)", line):
                visit(called, count * (int(known[1]) if known else 1))

    visit("ENTRY", 1)
    return times
