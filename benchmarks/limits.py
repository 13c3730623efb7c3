"""What the device can do, measured in the same run as what is compared with it."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.harness import FULL, Contender, Effort, compiled, measure
from benchmarks.inputs import Inputs

# Rows, contracted, columns: square, and a head's proportions. Large enough that starting them does not count.
COPY_BYTES = {"cpu": 2**28, "accelerator": 2**31}
PRODUCT_SIZES = {
    "cpu": ((2048, 2048, 2048), (1024, 512, 8192)),
    "accelerator": ((8192, 8192, 8192), (8192, 4096, 32768)),
}
PRODUCT_LOGITS_BYTES = 2**32  # where all logits take more, the products alone are timed on as many rows as take this


@dataclass(frozen=True)
class Bound:
    """The part of a case that cannot be avoided and nothing else, timed beside the others."""

    contender: Contender
    flops: int = 0
    bytes: int = 0


def bound(case: Case, inputs: Inputs, effort: Effort) -> Bound:
    """The three matrix products of a head, with the logits as their own gradient; or reading or copying logits."""
    if not case.hidden:
        logits = inputs.arrays[0]
        if case.mode == "value":
            contender = compiled("read alone", lambda x: jnp.max(x, axis=-1), logits, effort=effort)
        else:
            contender = compiled("copy alone", lambda x: x + 1, logits, effort=effort, donate=case.donated)
        return Bound(_unchecked(contender), bytes=case.bytes_moved())
    hidden, kernel = inputs.arrays[:2]
    rows = min(case.rows, max(1, PRODUCT_LOGITS_BYTES // (case.classes * kernel.dtype.itemsize)))

    def three(hidden: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = hidden @ kernel
        return logits @ kernel.T, hidden.T @ logits

    name = "three products alone" + ("" if rows == case.rows else f", {rows} rows")
    contender = compiled(name, three, hidden[:rows], kernel, effort=effort)
    return Bound(_unchecked(contender), flops=case.flops_of(3) * rows // case.rows)


def _unchecked(contender: Contender) -> Contender:
    return dataclasses.replace(contender, results=None, peer="bound")


@dataclass(frozen=True)
class Limits:
    """The best rates of several rounds."""

    copy_bytes_per_second: float
    """Read plus written, into fresh memory, as a gradient is."""
    product_flops_per_second: dict[str, float]
    """By dtype, float32 in float32 accuracy."""

    def at_own_shapes(self, dtype: str, alone: Bound, seconds: float) -> "Limits":
        """With the rates of a case's own shapes: of its products; of its bytes where they move faster, from a cache."""
        if alone.flops:
            products = self.product_flops_per_second | {dtype: alone.flops / seconds}
            return dataclasses.replace(self, product_flops_per_second=products)
        fastest = max(self.copy_bytes_per_second, alone.bytes / seconds)
        return dataclasses.replace(self, copy_bytes_per_second=fastest)

    def reached(self, case: Case, seconds: float) -> "Limits":
        """With the rates that a contender showed to be possible: what nobody beats is a limit."""
        rate = max(self.product_flops_per_second[case.dtype], case.flops() / seconds)
        return Limits(
            max(self.copy_bytes_per_second, case.bytes_moved() / seconds),
            self.product_flops_per_second | {case.dtype: rate},
        )

    def seconds(self, case: Case) -> float:
        """The least time that the case can take: products or memory, whichever binds."""
        return max(self._by_memory(case), self._by_products(case))

    def binding(self, case: Case) -> str:
        return "bytes moved" if self._by_memory(case) > self._by_products(case) else "matrix products"

    def _by_memory(self, case: Case) -> float:
        return case.bytes_moved() / self.copy_bytes_per_second

    def _by_products(self, case: Case) -> float:
        return case.flops() / self.product_flops_per_second[case.dtype]


def _copy(size: int, effort: Effort) -> Contender:
    x = jnp.zeros(size // 4, jnp.float32)
    return compiled("copy", lambda x: x + 1, x, effort=effort)


def _product(rows: int, contracted: int, columns: int, dtype: str, effort: Effort) -> Contender:
    a, b = jnp.ones((rows, contracted), dtype), jnp.ones((contracted, columns), dtype)
    return compiled(f"{rows}x{contracted}x{columns} {dtype}", lambda a, b: a @ b, a, b, effort=effort)


def measure_limits(dtypes: set[str], effort: Effort) -> Limits:
    scale = 1 if effort is FULL else 4
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    size, shapes = COPY_BYTES[kind] // scale, PRODUCT_SIZES[kind]
    copy = _copy(size, effort)
    with jax.default_matmul_precision("highest"):  # of float32; it says nothing about narrower types
        products = {
            dtype: {2 * n * d * v // scale: _product(n // scale, d, v, dtype, effort) for n, d, v in shapes}
            for dtype in dtypes
        }
    contenders = [copy, *(c for by_flops in products.values() for c in by_flops.values())]
    best = {name: min(samples) / 1e3 for name, samples in measure(contenders, effort).items()}
    rates = {d: max(flops / best[c.name] for flops, c in by.items()) for d, by in products.items()}
    jax.clear_caches()
    return Limits(2 * size / best["copy"], rates)
