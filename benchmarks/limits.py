"""What the device can do, measured in the same run as what is compared with it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.harness import FULL, Contender, Effort, compiled, measure

COPY_BYTES = 2**28
PRODUCT_SIZES = ((2048, 2048, 2048), (1024, 512, 8192))  # rows, contracted, columns: square, and a head's proportions


@dataclass(frozen=True)
class Limits:
    """The best rates of several rounds."""

    copy_bytes_per_second: float
    """Read plus written, into fresh memory, as a gradient is."""
    product_flops_per_second: dict[str, float]
    """By dtype, float32 at the precision that a plain `@` has on this device."""

    def seconds(self, case: Case) -> float:
        """The least time that the case can take: products or memory, whichever binds."""
        return max(
            case.bytes_moved() / self.copy_bytes_per_second,
            case.flops() / self.product_flops_per_second[case.dtype],
        )

    def binding(self, case: Case) -> str:
        by_memory = case.bytes_moved() / self.copy_bytes_per_second
        return "bytes moved" if by_memory == self.seconds(case) else "matrix products"


def _copy(size: int, effort: Effort) -> Contender:
    x = jnp.zeros(size // 4, jnp.float32)
    return compiled("copy", lambda x: x + 1, x, effort=effort)


def _product(rows: int, contracted: int, columns: int, dtype: str, effort: Effort) -> Contender:
    a, b = jnp.ones((rows, contracted), dtype), jnp.ones((contracted, columns), dtype)
    return compiled(f"{rows}x{contracted}x{columns} {dtype}", lambda a, b: a @ b, a, b, effort=effort)


def measure_limits(dtypes: set[str], effort: Effort) -> Limits:
    scale = 1 if effort is FULL else 4
    copy = _copy(COPY_BYTES // scale, effort)
    products = {
        dtype: {2 * n * d * v // scale: _product(n // scale, d, v, dtype, effort) for n, d, v in PRODUCT_SIZES}
        for dtype in dtypes
    }
    contenders = [copy, *(c for by_flops in products.values() for c in by_flops.values())]
    best = {name: min(samples) / 1e3 for name, samples in measure(contenders, effort).items()}
    rates = {d: max(flops / best[c.name] for flops, c in by.items()) for d, by in products.items()}
    jax.clear_caches()
    return Limits(2 * (COPY_BYTES // scale) / best["copy"], rates)
