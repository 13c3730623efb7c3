"""Sums in two floating numbers each, so that no addition rounds: Ogita, Rump and Oishi (2005), algorithm 4.4."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._mesh.types import pcast_like
from jaxent._serialization import exportable
from jaxent._typing import DTypeLike

_HISTOGRAM = 2**22  # entries of all lanes of a histogram: 32 MiB in float32


@exportable
class TwoFloat(NamedTuple):
    """The unevaluated sum `hi + lo`, where `lo` holds what rounding took from `hi`: 48 bits from two float32."""

    hi: jax.Array
    lo: jax.Array

    def plus(self, other: "TwoFloat") -> "TwoFloat":
        hi, error = _two_sum(self.hi, other.hi)
        return TwoFloat(*_two_sum(hi, (self.lo + other.lo) + error))

    def astype(self, dtype: DTypeLike) -> "TwoFloat":
        """In a narrower type: `lo` takes what `hi` no longer holds."""
        hi = self.hi.astype(dtype)
        rest = lax.stop_gradient(self.hi - hi.astype(self.hi.dtype))
        return TwoFloat(hi, (jnp.where(jnp.isfinite(hi), rest, 0) + self.lo).astype(dtype))

    def over(self, other: "TwoFloat") -> jax.Array:
        """The quotient, to one ulp; 0, with derivative 0, when `other` is 0.

        `hi / hi` alone is up to three roundings off: each `hi` has been rounded once.
        """
        empty = other.hi == 0
        divisor = jnp.where(empty, 1, other.hi)
        ratio = self.hi / divisor
        rest = (self.lo - ratio * other.lo) / divisor
        return jnp.where(empty, 0, jnp.where(jnp.isfinite(ratio), ratio + rest, ratio))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a + b` and its rounding error, exactly (Knuth, 1969, section 4.2.2, theorem B).

    As a real function the error is 0, and so is its derivative. Where the sum is infinite the formula gives
    `inf - inf = nan`; the error is 0 there.
    """
    total = a + b
    a, b, rounded = lax.stop_gradient((a, b, total))
    b_used = rounded - a
    error = (a - (rounded - b_used)) + (b - b_used)
    return total, jnp.where(jnp.isfinite(rounded), error, 0)


@jax.custom_jvp
def two_float_sum(x: jax.Array) -> TwoFloat:
    """The sum of all entries. `jnp.sum` of 10,000 float32 losses is 1e-7 off, however well such sums are then added."""
    axes = tuple(range(x.ndim))
    zero = jnp.zeros_like(x, shape=())
    fixed = lax.stop_gradient(x)
    total = TwoFloat(
        *lax.reduce((fixed, jnp.zeros_like(x)), (zero, zero), lambda a, b: tuple(TwoFloat(*a).plus(TwoFloat(*b))), axes)
    )
    # Zeros with the derivative of the sum: jax 0.10 differentiates this and not the rule in a jvp of a grad through a
    # scan, and a reduction of pairs has no derivative.
    return total._replace(hi=total.hi + jnp.sum(jnp.where(jnp.isfinite(x), x - fixed, 0)))


@two_float_sum.defjvp
def two_float_sum_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[TwoFloat, TwoFloat]:
    tangent = jnp.sum(tangents[0])
    return two_float_sum(*primals), TwoFloat(tangent, jnp.zeros_like(tangent))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def two_float_histogram(index: jax.Array, amounts: jax.Array, count: int) -> TwoFloat:
    """The sum of the amounts at each index below `count`; the others are left out.

    An addition at an index has to know what is there already, so that entries with the same index follow each other.
    They are taken many at a time all the same, one in each lane, and each lane has a histogram of its own.
    """
    size = index.shape[0]
    lanes = max(1, min(size, _HISTOGRAM // count))
    steps = -(-size // lanes)
    index = jnp.pad(index, (0, steps * lanes - size), constant_values=count).reshape(lanes, steps)
    amounts = jnp.pad(amounts, (0, steps * lanes - size)).reshape(lanes, steps)
    lane = jnp.arange(lanes, dtype=jnp.int32)

    def step(sums: TwoFloat, added: tuple[jax.Array, jax.Array]) -> tuple[TwoFloat, None]:
        at, amount = added
        old = TwoFloat(*(x.at[lane, at].get(mode="fill", fill_value=0) for x in sums))
        new = old.plus(TwoFloat(amount, jnp.zeros_like(amount)))
        return TwoFloat(*(x.at[lane, at].set(y, mode="drop") for x, y in zip(sums, new, strict=True))), None

    empty = pcast_like(jnp.zeros((lanes, count), amounts.dtype), [index, amounts])
    sums, _ = lax.scan(step, TwoFloat(empty, empty), (index.T, amounts.T))
    return _sum_of_lanes(sums)


@two_float_histogram.defjvp
def _two_float_histogram_jvp(
    count: int, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[TwoFloat, TwoFloat]:
    index, amounts = primals
    zero = pcast_like(jnp.zeros(count, amounts.dtype), [index, amounts])
    tangent = zero.at[index].add(tangents[1], mode="drop")
    return two_float_histogram(index, amounts, count), TwoFloat(tangent, zero)


def _sum_of_lanes(sums: TwoFloat) -> TwoFloat:
    zero = jnp.zeros_like(sums.hi, shape=())
    return TwoFloat(*lax.reduce(tuple(sums), (zero, zero), lambda a, b: tuple(TwoFloat(*a).plus(TwoFloat(*b))), (0,)))
