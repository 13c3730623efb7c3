"""The suite `compiled`: what the compilers of accelerators make of the losses, read from their text. Nothing is run."""

import collections
import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks import optimized
from benchmarks.collectives import collectives
from benchmarks.compiled_programs import Program
from benchmarks.kernels import Kernel, Part, Product, kernels
from jaxent._engine.devices import DEVICES, Device
from jaxent._engine.footprint import temporaries
from jaxent._engine.roofline import EFFICIENCY


@dataclass(frozen=True)
class Reading:
    """What a compiled program holds, computes and moves."""

    kernels: list[Kernel]
    temp_bytes: int
    compile_seconds: float
    text: str
    cost: dict[str, float]

    @property
    def flops(self) -> int:
        return sum(k.times * k.flops for k in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(k.times * k.bytes for k in self.kernels)


def compile_for(function: Any, arguments: Sequence[Any], unknown_trips: Sequence[int] = (1,)) -> Reading:
    """`unknown_trips` of the loops over rows: one over whole chunks and, of few chunks, one over parts of the last."""
    lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    program = lowered.compile()
    spent = time.perf_counter() - start
    text, memory, cost = program.as_text() or "", program.memory_analysis(), program.cost_analysis()
    assert memory is not None
    on_tpu = any(device.platform == "tpu" for device in arguments[0].sharding.device_set)
    return Reading(kernels(text, unknown_trips), temporaries(memory, on_tpu), spent, text, dict(cost or {}))


def products(reading: Reading, program: Program) -> dict[str, float]:
    """Matrix products in units of N x D x V multiply-adds, by their dtypes."""
    unit = 2 * program.rows * program.features * program.classes
    counts: collections.Counter[str] = collections.Counter()
    for kernel in reading.kernels:
        for product in kernel.products:
            counts[str(product)] += kernel.times * product.flops
    return {kind: round(flops / unit, 2) for kind, flops in counts.items() if flops / unit > 0.005}


def passes(reading: Reading, program: Program) -> dict[str, dict[str, float]]:
    """How often each dtype's block of logits is read and written: over all blocks, in blocks as large as a chunk's.

    An array counts if it has as many elements as a chunk's logits, whatever its shape.
    """
    rows, classes = program.block_rows, program.classes
    counts: dict[str, dict[str, float]] = {}

    def count(kernel: Kernel, parts: Sequence[Part], what: str) -> None:
        for part in parts:
            if _is_block(part, rows, classes, program.features):
                found = counts.setdefault(part.array.dtype, {"read": 0.0, "written": 0.0})
                found[what] += kernel.times * part.bytes / part.array.bytes / program.num_chunks

    for kernel in reading.kernels:
        count(kernel, kernel.read, "read")
        count(kernel, kernel.written, "written")
    return {dtype: {k: round(v, 2) for k, v in found.items()} for dtype, found in counts.items()}


def _is_block(part: Part, rows: int, classes: int, features: int) -> bool:
    same_size = part.array.size == rows * classes
    return same_size and (rows != features or features not in part.array.shape)


def largest(reading: Reading) -> Part | None:
    """The largest array that any kernel writes."""
    written = [part for kernel in reading.kernels for part in kernel.written]
    return max(written, key=lambda part: part.array.size, default=None)


def roofline(reading: Reading, device: Device) -> dict[str, float]:
    """Milliseconds, each kernel at the larger of its work at `EFFICIENCY` of the peak and its traffic: of the products'
    work alone, and of everything.
    """
    work = total = 0.0
    for kernel in reading.kernels:
        alone = sum(product.flops / _rate(device, product) for product in kernel.products)
        work += kernel.times * alone
        total += kernel.times * max(alone, kernel.bytes / device.bytes_per_second)
    return {"products_ms": 1e3 * work, "all_ms": 1e3 * total}


def _rate(device: Device, product: Product) -> float:
    dtype = {"bf16": "bfloat16", "f16": "float16"}.get(product.left, "float32")
    return EFFICIENCY * device.product_rate(dtype, exact=product.precision == "highest")


def measure(program: Program) -> dict[str, Any]:
    """One program for its device, as a row of the record."""
    row = program.record
    try:
        found = optimized.optimized(program.target, "compiled_programs", dataclasses.asdict(program))
    except optimized.RefusedError as error:
        return row | {"failed": _reason(str(error))}
    parts = kernels(found.text, (program.loop_trips, 0))
    reading = Reading(parts, found.temp_bytes, found.seconds, found.text, {})
    biggest = largest(reading)
    estimates = roofline(reading, DEVICES[program.target])
    sent = [c for c in collectives(reading.text) if c.extent]
    return row | {
        "compile_s": round(reading.compile_seconds, 2),
        "temp_mib": round(reading.temp_bytes / 2**20, 1),
        "plan_mib": program.planned_mib,
        "products": products(reading, program),
        "passes": passes(reading, program),
        "moved_gb": round(reading.bytes / 1e9, 2),
        "collectives": len(sent),
        "largest_by_logits": round(biggest.array.size / (program.rows * program.classes), 3) if biggest else 0.0,
        **{name: round(value, 2) for name, value in estimates.items()},
        "products_share": round(estimates["products_ms"] / estimates["all_ms"], 4),
    }


def _reason(message: str) -> str:
    """Why a compiler gave up, in a few words; for want of memory, how much it wanted."""
    needs = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", message)
    return f"needs {needs[1]} of {needs[2]}" if needs else message.strip().splitlines()[0][:160]
