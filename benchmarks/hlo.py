"""The text of a compiled program, as instructions."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_BITS = {"pred": 8, "token": 0}


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        if self.dtype in _BITS:
            return self.size * _BITS[self.dtype] // 8
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        return self.size * (int(bits[1]) if bits else 8) // 8

    @property
    def traffic(self) -> int:
        return self.bytes if self.in_main_memory else 0


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays in the text of a type, which is a tuple or not."""
    found = _ARRAY.findall(text)
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), re.search(r"S\([1-9]", layout) is None)
        for dtype, dims, layout in found
    )


@dataclass(frozen=True)
class Instruction:
    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    index: int = 0
    """Of a parameter; the value of an integer constant."""

    def called(self, *attributes: str) -> str:
        """The computation that the first of these attributes names."""
        for name in attributes:
            if found := re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes):
                return found[1]
        raise KeyError(f"{self.name}: no {attributes}")

    def numbers(self, attribute: str) -> tuple[int, ...]:
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Computation(NamedTuple):
    instructions: dict[str, Instruction]
    root: Instruction
    parameters: tuple[Instruction, ...]
    users: dict[str, list[Instruction]]


def parse(text: str) -> dict[str, Computation]:
    """The computations of a module; that of the program is called ENTRY."""
    blocks: dict[str, list[Instruction]] = {}
    block: list[Instruction] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := _HEAD.match(line):
            block = blocks.setdefault("ENTRY" if head[1] else head[2], [])
        elif match := _LINE.match(line):
            block.append(_instruction(match[2], match[3], match[1] is not None))
    return {name: _computation(block) for name, block in blocks.items() if block}


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    inside, attributes = rest[start + 1 : stop - 1], rest[stop:]
    opcode = rest[:start]
    index = int(inside) if opcode in ("parameter", "constant") and inside.isdecimal() else 0
    return Instruction(
        name, arrays_of(kind), opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), attributes, is_root, index
    )


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"an open parenthesis: {text[:80]}")


def _computation(block: list[Instruction]) -> Computation:
    users: dict[str, list[Instruction]] = {}
    for instruction in block:
        for operand in dict.fromkeys(instruction.operands):
            users.setdefault(operand, []).append(instruction)
    root = next((i for i in block if i.is_root), block[-1])
    parameters = sorted((i for i in block if i.opcode == "parameter"), key=lambda i: i.index)
    return Computation({i.name: i for i in block}, root, tuple(parameters), users)


def array(computation: Computation, name: str) -> Array:
    """The first array of an instruction's result."""
    return computation.instructions[name].arrays[0]


def source(computation: Computation, name: str) -> Instruction:
    """The instruction whose memory this one's result is."""
    instruction = computation.instructions[name]
    while instruction.opcode == "bitcast":
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def trip_count(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """How often a loop's body runs, if the program says it: in a note, or as the bound of a count from 0."""
    if known := re.search(r"known_trip_count\D+(\d+)", loop.attributes):
        return int(known[1])
    condition = computations[loop.called("condition")]
    if condition.root.opcode != "compare" or "direction=LT" not in condition.root.attributes:
        return None
    bound = condition.instructions[condition.root.operands[1]]
    return bound.index if bound.opcode == "constant" else None
