"""From the losses of the rows to what the caller asked for."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxent import _arrays
from jaxent.risk import WeightedSum

Reduction = Literal["mean", "sum", "none", "sum_and_weight"]


def check(function: str, reduction: Any, denominator: ArrayLike | None) -> jax.Array | None:
    """The divisor as a scalar array, if one was given."""
    if reduction not in ("mean", "sum", "none", "sum_and_weight"):
        raise ValueError(
            f"jaxent.{function}: `reduction` must be 'mean', 'sum', 'none' or 'sum_and_weight', got {reduction!r}"
        )
    if denominator is None:
        return None
    if reduction != "mean":
        raise ValueError(f"jaxent.{function}: `denominator` goes with reduction='mean', got reduction={reduction!r}")
    return _arrays.scalar(function, "denominator", denominator, low=0.0)


def reduce(
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
    if denominator is None:
        return summed.mean()
    return WeightedSum(summed.total, denominator.astype(summed.total.dtype)).mean()
