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
    looped: bool = False
    """Whether it stands in a loop, be it one of unknown length, which counts once."""

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
    for (name, looped), times in _executions(computations).items():
        for instruction in computations[name].instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                devices = _group_size(instruction.attributes)
                sent = instruction.arrays
                found += [Collective(kind, array.dtype, array.shape, times, devices, looped) for array in sent]
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


def _executions(computations: dict[str, Computation]) -> dict[tuple[str, bool], int]:
    """How often each computation runs outside and inside loops; one of unknown length counts once, as a branch does."""
    times: dict[tuple[str, bool], int] = {}

    def visit(name: str, count: int, looped: bool) -> None:
        times[name, looped] = times.get((name, looped), 0) + count
        for instruction in computations[name].instructions.values():
            loop = instruction.opcode == "while"
            trips = (trip_count(instruction, computations) or 1) if loop else 1
            called = re.findall(r"(?:calls|body|condition|to_apply|_computation)=%?([\w.\-]+)", instruction.attributes)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", instruction.attributes):
                called += re.findall(r"[\w.\-]+", branches)
            for other in called:
                visit(other, count * trips, looped or loop)

    visit("ENTRY", 1, False)
    return times
