"""What a compiled program sends between devices, read from its HLO."""

import math
import re
from typing import NamedTuple

from benchmarks.hlo import Array, Computation, parse, trip_count

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast", "send", "recv"),
)


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
        return self.times * Array(self.dtype, self.shape).bytes

    @property
    def numbers(self) -> int:
        """In the results of all the times together, on one device."""
        return self.times * math.prod(self.shape)

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
    computations = parse(hlo)
    found = []
    for name, times in _executions(computations).items():
        for instruction in computations[name].instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                devices = _group_size(instruction.attributes)
                found += [Collective(kind, array.dtype, array.shape, times, devices) for array in instruction.arrays]
    return found


def _group_size(attributes: str) -> int:
    """Of the groups of devices, which are listed, counted, or named by axes of a mesh; 0 where there are none."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        return math.prod(int(sizes[axis]) for axis in named[2].split(","))
    return 0


def _executions(computations: dict[str, Computation]) -> dict[str, int]:
    """How often each computation runs; a loop of unknown length counts once."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for instruction in computations[name].instructions.values():
            trips = (trip_count(instruction, computations) or 1) if instruction.opcode == "while" else 1
            for called in re.findall(r"(?:calls|body|to_apply|_computation)=%?([\w.\-]+)", instruction.attributes):
                visit(called, count * trips)

    visit("ENTRY", 1)
    return times
