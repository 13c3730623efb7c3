"""From the losses of the rows to what the caller asked for."""

import dataclasses
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._errors import ArgumentValueError
from jaxent._serialization import exportable
from jaxent._typing import ArrayLike

Reduction = Literal["mean", "sum", "none", "sum_and_weight"]
MatrixReduction = Literal["mean", "sum"]


def _zero() -> jax.Array:
    """In the widest dtype that a loss can have, so that adding one does not change a carry's dtype."""
    return jnp.zeros((), jnp.result_type(float))


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A sum of losses and the sum of their weights, so that means over parts of a batch add up to the exact mean.

    A mean of means gives a part with few counted rows the weight of a full one. Adding totals and weights does not, and
    the two numbers pass through `jax.lax.psum`, a scan's carry, and `has_aux` like any pytree. `WeightedSum()` is the
    empty sum, to start a scan with; inside `jax.shard_map` start with
    `jax.lax.pcast(WeightedSum(), axis_name, to="varying")`.

    >>> a, b = WeightedSum(jnp.float32(6.0), jnp.float32(3.0)), WeightedSum(jnp.float32(1.0), jnp.float32(1.0))
    >>> float((a + b).mean())
    1.75
    """

    total: jax.Array = dataclasses.field(default_factory=_zero)
    """`sum_n w_n l_n`, in nats for the losses of this library."""
    weight: jax.Array = dataclasses.field(default_factory=_zero)
    """`sum_n w_n`."""

    def __add__(self, other: "WeightedSum") -> "WeightedSum":
        if not isinstance(other, WeightedSum):
            return NotImplemented
        return WeightedSum(_add(self.total, other.total), _add(self.weight, other.weight))

    def __radd__(self, other: object) -> "WeightedSum":
        """`sum(parts)` starts from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> jax.Array:
        """`total / weight`; 0, with derivative 0, when the weights sum to 0."""
        total, weight = arrays.accumulated(_array(self.total), _array(self.weight))
        return quotient(total, weight)


def quotient(total: jax.Array | float, weight: jax.Array) -> jax.Array:
    """`total / weight`; 0, with derivative 0, where the weight is 0."""
    empty = weight == 0
    return jnp.where(empty, 0, total / jnp.where(empty, 1, weight))


def _array(x: ArrayLike) -> jax.Array:
    """A number of the host, such as a count of 64 bits, becomes floating."""
    if isinstance(x, jax.Array):
        return x
    return arrays.real("total or weight", float(x) if isinstance(x, int) else x)


def _add(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """In the wider of two dtypes, so that a scan may add float32 sums to a float64 carry."""
    a, b = _array(a), _array(b)
    return a + b if a.dtype == b.dtype else operator.add(*arrays.accumulated(a, b))


def check_reduction(reduction: Any, denominator: ArrayLike | None) -> jax.Array | None:
    """The divisor as a scalar array, if one was given."""
    if reduction not in ("mean", "sum", "none", "sum_and_weight"):
        raise ArgumentValueError(f"`reduction` must be 'mean', 'sum', 'none' or 'sum_and_weight', got {reduction!r}")
    if denominator is None:
        return None
    if reduction != "mean":
        raise ArgumentValueError(f"`denominator` goes with reduction='mean', got reduction={reduction!r}")
    return arrays.scalar("denominator", denominator, low=0.0)


def reduce_losses(
    losses: jax.Array, weights: jax.Array, reduction: Reduction, denominator: jax.Array | None
) -> jax.Array | WeightedSum:
    """`losses` are weighted already; `weights` are what they count in a mean."""
    if reduction == "none":
        return losses
    return reduce_sum(WeightedSum(jnp.sum(losses), jnp.sum(weights.astype(losses.dtype))), reduction, denominator)


def reduce_sum(summed: WeightedSum, reduction: Reduction, denominator: jax.Array | None) -> jax.Array | WeightedSum:
    if reduction == "sum_and_weight":
        return summed
    if reduction == "sum":
        return summed.total
    return quotient(summed.total, (summed.weight if denominator is None else denominator).astype(summed.total.dtype))


def check_matrix_reduction(reduction: Any) -> None:
    if reduction not in ("mean", "sum"):
        raise ArgumentValueError(f"`reduction` must be 'mean' or 'sum', got {reduction!r}")
