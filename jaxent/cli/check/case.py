"""What a case of `jaxent check` is, and the inputs that all of them draw on.

Logits and hidden states lie on binary grids, so that what is measured is the loss and not the rounding of its inputs.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from jaxent.cli.check.references import WIDE, Array, Exact

ROWS, CLASSES, FEATURES = 5, 4, 3
EVERY_DTYPE = ("float32", "bfloat16", "float16", "float64")
WIDE_DTYPES = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss with one option: a scalar function of floating arguments, and what it should return."""

    loss: str
    option: str
    function: Callable[..., jax.Array]
    args: tuple[Array, ...]
    oracle: Callable[..., Exact]
    closed_form: Callable[..., jax.Array] | None = None
    dtypes: tuple[str, ...] = EVERY_DTYPE
    products: bool = False
    """Whether it multiplies matrices, so that half precision rounds twice."""

    def exact(self) -> Exact:
        return self.oracle(*(x.astype(WIDE) for x in self.args))


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


def rng_for(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def distributions(rng: np.random.Generator, *shape: int) -> Array:
    """Rows of multiples of 1/64 that sum to one, none of them 0."""
    spare = 64 - shape[-1]
    return (rng.multinomial(spare, np.full(shape[-1], 1 / shape[-1]), size=shape[:-1]) + 1) / 64


def heads(count: int, bias: bool = False) -> tuple[Array, ...]:
    """(hidden, kernel[, bias]) of each head in quarters, so that the logits are exact in every dtype."""
    rng, arrays = rng_for("heads"), []
    for _ in range(count):
        hidden, kernel = (rng.integers(-6, 7, s) / 4 for s in ((ROWS, FEATURES), (FEATURES, CLASSES)))
        arrays += [hidden, kernel, *([rng.integers(-6, 7, CLASSES) / 4] if bias else [])]
    return tuple(arrays)
