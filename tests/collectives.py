"""Which of the collectives in a compiled program should not be there."""

from typing import Any

from meshes import CLASSES, FEATURES, ROWS, TOP

from benchmarks.collectives import Collective
from benchmarks.collectives import collectives as read


def collectives(compiled: Any) -> list[Collective]:
    """Every collective in a compiled program."""
    return read(compiled.as_text())


def large_in_loops(found: list[Collective], least: int) -> list[Collective]:
    """Those that stand in a loop and send at least as many numbers at a time."""
    return [c for c in found if c.looped and c.numbers >= c.times * least]


def foreign(found: list[Collective], data: int, vocab: int) -> list[Collective]:
    """Whatever is not a sum of a few numbers per row, of one per class, or of a gradient of hidden states or kernel."""

    def is_due(extent: tuple[int, ...]) -> bool:
        if len(extent) < 2:
            return sum(extent) <= max(ROWS // data, CLASSES)
        few = [n for n in extent if n in (FEATURES, TOP, vocab)]
        many = [n for n in extent if n not in few]
        return len(many) <= 1 and sum(many) <= max(ROWS // data, CLASSES // vocab)

    return [c for c in found if c.kind not in ("all-reduce", "reduce-scatter") or not is_due(c.extent)]
