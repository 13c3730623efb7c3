"""What a compiled program sends between devices, read from its HLO."""

import math
import re
from typing import Any, NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|send|recv"
INSTRUCTION = re.compile(rf"= (.*?) ((?:ragged-)?(?:{KINDS}))(?:-start)?\(")
BYTES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "f64": 8, "s64": 8, "bf16": 2}


class Collective(NamedTuple):
    """One array that a program sends, `times` times."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int

    @property
    def bytes(self) -> int:
        """Of all the times together, on one device."""
        return self.times * math.prod(self.shape) * BYTES[self.dtype]

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
                    Collective(match[2], dtype, tuple(int(n) for n in dims.split(",") if n), times)
                    for dtype, dims in arrays
                ]
    return found


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
