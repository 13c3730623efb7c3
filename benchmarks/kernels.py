"""The kernels of a compiled program, with their work and their traffic.

A kernel is what a device runs at once: an instruction of the program or of a loop's body, with everything that is fused
into it. Its traffic is what it reads from and writes to the device's main memory, each array once: what is fused into
it stays in registers, an array in another memory space (a TPU's vector memory) does not count, a slice or a gather
reads what it takes, and an update in place writes what it changes.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.hlo import Array, Computation, Instruction, array, parse, source, trip_count


class Product(NamedTuple):
    """A matrix product: the dtypes of its operands and of its result, and its floating-point operations."""

    left: str
    right: str
    result: str
    precision: str
    """"highest", "high" or "default", which for float32 is TF32 on NVIDIA's devices and bfloat16 on a TPU."""
    flops: int

    def __str__(self) -> str:
        operands = self.left if self.left == self.right else f"{self.left} x {self.right}"
        note = f" ({self.precision})" if self.left == "f32" else ""
        return f"{operands} -> {self.result}{note}"


class Part(NamedTuple):
    """An array and how many of its bytes cross the memory bus."""

    array: Array
    bytes: int


@dataclass(frozen=True)
class Kernel:
    name: str
    opcodes: frozenset[str]
    """Of everything that is fused into it."""
    times: int
    """How often the program runs it."""
    in_loop: bool
    products: tuple[Product, ...]
    read: tuple[Part, ...]
    written: tuple[Part, ...]

    @property
    def flops(self) -> int:
        """Of its matrix products, in one run."""
        return sum(product.flops for product in self.products)

    @property
    def bytes(self) -> int:
        """Read and written, in one run."""
        return sum(part.bytes for part in (*self.read, *self.written))


def kernels(text: str, unknown_trips: Sequence[int] = (1,)) -> list[Kernel]:
    """What a program runs, in order.

    `unknown_trips`: how often loops run whose lengths depend on the data, one after the other; the last number stands
    for all that follow.
    """
    return list(_Reader(parse(text), unknown_trips).run("ENTRY", 1, False))


# Nothing is run for these, or what is run is another instruction.
FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|opt-barrier|add-dependency|"
    "domain|.*-done|.*-update"
)
# Of the same elements: what is read of the result is read of the operand.
ELEMENTWISE = re.compile(
    "bitcast|reshape|copy|transpose|convert|add|subtract|multiply|divide|negate|abs|maximum|minimum|select|compare|and|or|"
    "not|is-finite|exponential|exponential-minus-one|log|log-plus-one|tanh|logistic|reduce-precision"
)
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = ("dynamic-update-slice", "scatter")


class _Reader:
    def __init__(self, computations: dict[str, Computation], unknown_trips: Sequence[int]):
        self.computations = computations
        self.unknown_trips = itertools.chain(unknown_trips, itertools.repeat(unknown_trips[-1]))

    def run(self, name: str, times: int, in_loop: bool) -> Iterator[Kernel]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if FREE.fullmatch(opcode) or '"AllocateBuffer"' in instruction.attributes:
                continue
            if opcode == "while":
                trips = trip_count(instruction, self.computations)
                trips = next(self.unknown_trips) if trips is None else trips
                if trips:
                    yield from self.run(instruction.called("body"), times * trips, True)
            elif opcode == "conditional":
                yield from self._dearest_branch(instruction, times, in_loop)
            elif opcode in ("call", "async-start"):
                yield from self.run(instruction.called("to_apply", "calls"), times, in_loop)
            else:
                yield self._kernel(computation, instruction, times, in_loop)

    def _dearest_branch(self, instruction: Instruction, times: int, in_loop: bool) -> list[Kernel]:
        """Which branch runs depends on the data."""
        listed = re.search(r"branch_computations=\{(.*?)\}", instruction.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        names += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
        branches = [list(self.run(name, times, in_loop)) for name in names]
        return max(branches, key=lambda branch: sum(k.times * (k.bytes + k.flops) for k in branch), default=[])

    def _kernel(self, computation: Computation, instruction: Instruction, times: int, in_loop: bool) -> Kernel:
        return Kernel(
            instruction.name,
            frozenset(self._opcodes(instruction)),
            times,
            in_loop,
            tuple(self._products(computation, instruction)),
            tuple(part for part in self._read(computation, instruction) if part.bytes),
            tuple(part for part in self._written(computation, instruction) if part.bytes),
        )

    def _fused(self, instruction: Instruction) -> Computation | None:
        return self.computations[instruction.called("calls")] if instruction.opcode == "fusion" else None

    def _opcodes(self, instruction: Instruction) -> Iterator[str]:
        fused = self._fused(instruction)
        if fused is None:
            yield instruction.opcode
        else:
            for inner in fused.instructions.values():
                yield from self._opcodes(inner)

    # ------------------------------------------------------------------------------------------------------------------
    # Traffic

    def _read(self, computation: Computation, instruction: Instruction) -> Iterator[Part]:
        counts: dict[str, int] = {}
        for place, operand in enumerate(instruction.operands):
            name = source(computation, operand).name
            used = self._elements_used(computation, instruction, place)
            counts[name] = max(counts.get(name, 0), used)
        for name, count in counts.items():
            read = array(computation, name)
            yield Part(read, read.traffic * count // max(1, read.size))

    def _elements_used(self, computation: Computation, user: Instruction, place: int) -> int:
        """Of an operand, by one instruction."""
        size = array(computation, user.operands[place]).size
        fused = self._fused(user)
        if fused is not None:
            return min(size, self._elements_of_parameter(fused, fused.parameters[place].name))
        if place == 0 and user.opcode in SLICES:
            return min(size, user.arrays[0].size)
        return 0 if place == 0 and user.opcode in UPDATES else size

    def _elements_of_parameter(self, fused: Computation, name: str) -> int:
        size, total = array(fused, name).size, 0
        for user in fused.users.get(name, ()):
            if user.is_root and user.opcode == "tuple":
                handed_on = fused.instructions[name].opcode in ("parameter", "bitcast")
                total += 0 if handed_on else size
                continue
            for place in (i for i, operand in enumerate(user.operands) if operand == name):
                if total >= size:
                    return size
                if user.arrays[0].size == size and not user.is_root and ELEMENTWISE.fullmatch(user.opcode):
                    total += self._elements_of_parameter(fused, user.name)
                else:
                    total += self._elements_used(fused, user, place)
        return total

    def _written(self, computation: Computation, instruction: Instruction) -> Iterator[Part]:
        fused = self._fused(instruction)
        if fused is not None:
            roots = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
            for result, root in zip(instruction.arrays, roots, strict=False):
                yield Part(result, min(result.traffic, self._bytes_changed(fused, root)))
        elif instruction.opcode.endswith("-start"):
            # A copy's type names its target first; others may name their operands before their results.
            count = len(instruction.operands)
            is_copy = instruction.opcode == "copy-start"
            results = instruction.arrays[:1] if is_copy else instruction.arrays[count:] or instruction.arrays
            yield from (Part(result, result.traffic) for result in results[:count])
        else:
            changed = self._bytes_changed(computation, instruction.name)
            yield from (Part(result, min(result.traffic, changed)) for result in instruction.arrays)

    def _bytes_changed(self, computation: Computation, name: str) -> int:
        """Of an update in place, what is updated."""
        instruction = computation.instructions[name]
        if instruction.opcode in ("bitcast", "reshape"):
            return self._bytes_changed(computation, instruction.operands[0])
        if instruction.opcode in UPDATES:
            return array(computation, instruction.operands[1 if instruction.opcode != "scatter" else -1]).bytes
        fused = self._fused(instruction)
        if fused is not None and fused.root.opcode != "tuple":
            return self._bytes_changed(fused, fused.root.name)
        if instruction.opcode == "parameter":
            return 0  # handed on
        return sum(result.bytes for result in instruction.arrays)

    # ------------------------------------------------------------------------------------------------------------------
    # Work

    def _products(self, computation: Computation, instruction: Instruction) -> Iterator[Product]:
        fused = self._fused(instruction)
        if fused is not None:
            for inner in fused.instructions.values():
                yield from self._products(fused, inner)
            return
        summed = _summed(computation, instruction)
        if summed:
            left, right = (array(computation, name) for name in instruction.operands[:2])
            result = instruction.arrays[0]
            asked = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
            precision = asked[1] if asked else "default"
            yield Product(left.dtype, right.dtype, result.dtype, precision, 2 * result.size * summed)


def _summed(computation: Computation, instruction: Instruction) -> int:
    """Over how many terms each number of a product is summed; 0 for what is no product."""
    if instruction.opcode == "dot":
        left = array(computation, instruction.operands[0]).shape
        return math.prod(left[axis] for axis in instruction.numbers("lhs_contracting_dims"))
    if instruction.opcode == "convolution":  # a TPU's products
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
        right = array(computation, instruction.operands[1]).shape
        return math.prod(n for n, label in zip(right, labels[1] if labels else "", strict=False) if label != "o")
    if instruction.opcode == "custom-call" and re.search(r'target="[^"]*(?:gemm|matmul)', instruction.attributes):
        left = array(computation, instruction.operands[0]).shape
        axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        return math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes[1])) if axes else 0
    return 0
