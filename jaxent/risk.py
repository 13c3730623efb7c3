"""Sums that know their weight: the empirical risk of a batch, of many batches, of many devices."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A sum of losses and the sum of their weights, so that means over parts of a batch add up to the exact mean.

    A mean of means weighs a part with few counted rows like a full one. Adding totals and weights does not, and the two
    numbers pass through `jax.lax.psum`, a scan's carry, and `has_aux` like any pytree:

    >>> a, b = WeightedSum(jnp.float32(6.0), jnp.float32(3.0)), WeightedSum(jnp.float32(1.0), jnp.float32(1.0))
    >>> float((a + b).mean())
    1.75
    """

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: "WeightedSum") -> "WeightedSum":
        if not isinstance(other, WeightedSum):
            return NotImplemented
        return WeightedSum(self.total + other.total, self.weight + other.weight)

    def __radd__(self, other: object) -> "WeightedSum":
        """`sum(parts)` starts from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> jax.Array:
        """`total / weight`; 0, with derivative 0, when nothing was weighed."""
        empty = self.weight == 0
        return jnp.where(empty, 0, self.total / jnp.where(empty, 1, self.weight))
