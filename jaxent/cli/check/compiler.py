"""A known fault of a compiler, which strikes the user's own code however right the losses are."""

from typing import NamedTuple

import jax
import numpy as np

BOUND = 1e-3  # float32 rounding stays below 1e-5 here; the fault is of the size of the numbers themselves


class RowSums(NamedTuple):
    """Whether XLA fuses a sum along rows with a product whose operands have different shapes, and gets it right.

    That of jax 0.10.2 for CPUs takes the small operand where it should take the broadcast one, from 2^15 entries on.
    """

    error: float

    @property
    def ok(self) -> bool:
        return self.error < BOUND

    def sentences(self) -> list[str]:
        if self.ok:
            return []
        return [
            f"OUT OF BOUNDS: under jit `v - (z * v).sum(-1, keepdims=True)` is off by {self.error:.3g} here: the "
            f"compiler of jax {jax.__version__} is at fault, and your own code may be hit by it as well as the losses",
            "remedy: another version of jax and jaxlib (0.10.1, or 0.12 and later), or the environment variable "
            "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=",
        ]


def measure_row_sums() -> RowSums:
    rng = np.random.default_rng(0)
    z, v = (rng.normal(size=shape).astype(np.float32) for shape in ((100, 10), (200, 100, 10)))
    with jax.numpy_rank_promotion("allow"):
        found = jax.jit(lambda z, v: v - (z * v).sum(-1, keepdims=True))(z, v)
    exact = v - (z.astype(np.float64) * v).sum(-1, keepdims=True)
    error = np.abs(np.asarray(found, np.float64) - exact).max()
    return RowSums(float(error) if np.isfinite(error) else float("inf"))
