"""Norms of rows and of sums of outer products, and what of a row lies in the row space of a matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jaxent._mesh.class_axis import ClassAxis, row_sum

# A sequence's gradient of the kernel is taken in so many blocks of its features, each at most this share of its logits.
FEATURE_BLOCKS = 4


def in_units(x: jax.Array, axis: ClassAxis) -> tuple[jax.Array, jax.Array]:
    """The rows, divided by the power of two at their largest entry, and that power; 1 where there is nothing."""
    size = power_of_two(axis.max(jnp.abs(x)))
    return x / size, size


def power_of_two(largest: jax.Array) -> jax.Array:
    """The power of two above a positive number, a constant; 1 for others."""
    largest = lax.stop_gradient(largest)
    _, exponent = jnp.frexp(jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1))
    lowest, highest = jnp.finfo(largest.dtype).minexp, jnp.finfo(largest.dtype).maxexp - 1
    return jnp.ldexp(jnp.ones_like(largest), jnp.clip(exponent, lowest, highest))


def norm(x: jax.Array, axis: ClassAxis) -> jax.Array:
    """The Euclidean norm of each row, with derivative 0 where it is 0."""
    if x.shape[axis.axis] == 0:
        return jnp.sum(x, axis=axis.axis, keepdims=True)
    unit, size = in_units(x, axis)
    return size * norm_in_units(unit, axis)


def norm_in_units(unit: jax.Array, axis: ClassAxis) -> jax.Array:
    return root(axis.sum(jnp.square(unit)))


def root(squares: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


# ----------------------------------------------------------------------------------------------------------------------
# Sums over a sequence


def triangular_factor(x: jax.Array) -> jax.Array:
    """`(..., tokens, tokens)` with the inner products of the tokens of `(..., tokens, features)`.

    A factor, not the inner products themselves: those would square the condition, and half of the digits would be lost
    where the terms of a sum nearly cancel.
    """
    return jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(x, -1, -2), mode="r"), -1, -2)


def squared_product_norms(
    x: jax.Array, y: jax.Array, classes: ClassAxis, precision: lax.PrecisionLike, dtype: Any
) -> jax.Array:
    """`|sum_t x_t y_t^T|^2` of `(sequences, tokens, features)` and `(sequences, tokens, classes)`, `(sequences,)`
    in `dtype`.

    A block of the features at a time, so that no sum of outer products is ever held. Of the sum itself, not as
    `sum_ts <x_t, x_s> <y_t, y_s>`, which keeps only half of the digits where it nearly cancels.
    """
    sequences, tokens, features = x.shape
    blocks = max(1, min(FEATURE_BLOCKS, features))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -features % blocks)))
    x = jnp.moveaxis(x.reshape(sequences, tokens, blocks, x.shape[-1] // blocks), 2, 0)

    @jax.checkpoint
    def squares(x: jax.Array) -> jax.Array:
        total = lax.dot_general(x, y, (((1,), (1,)), ((0,), (0,))), precision=precision, preferred_element_type=dtype)
        return row_sum(jnp.square(total), (1, 2), keepdims=False)

    return classes.psum(jnp.sum(lax.map(squares, x), axis=0))


# ----------------------------------------------------------------------------------------------------------------------
# The row space of a matrix


class RowSpace(NamedTuple):
    """The row space of `W (features, classes)`, as far as it is seen from products with `W^T`.

    `L L^T = C + e I` where `C` are the inner products of the rows of `W` at length one. `e` is what rounding can make
    of an eigenvalue of 0: directions below it are none of the row space.
    """

    scale: jax.Array  # (features,), one over the lengths of the rows
    factor: jax.Array  # (features, features)

    @classmethod
    def of(cls, gram: jax.Array) -> "RowSpace":
        """From `W W^T`."""
        features = gram.shape[0]
        lengths = root(jnp.diagonal(gram))
        scale = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
        correlation = gram * scale[:, None] * scale[None, :]
        return cls(scale, jnp.linalg.cholesky(correlation + cls._least(gram) * jnp.eye(features, dtype=gram.dtype)))

    @staticmethod
    def _least(gram: jax.Array) -> float:
        return 2 * max(1, gram.shape[0]) * float(jnp.finfo(gram.dtype).eps)

    def norms(self, products: jax.Array) -> jax.Array:
        """The norms of the projections of rows `d` onto the row space, `(rows, 1)`, given `d W^T (rows, features)`.

        `g^T (M^-1 + e M^-2) g` with `M = C + e I` and `g = d W^T` in the units of `C`: one step of refinement towards
        `g^T C^-1 g`, which is off by `(e / (c + e))^2` along an eigenvector of eigenvalue `c`.
        """
        g = (products * self.scale[None, :]).T
        y = solve_triangular(self.factor, g, lower=True)
        x = solve_triangular(self.factor, y, lower=True, trans="T")
        squares = jnp.square(y) + self._least(self.factor) * jnp.square(x)
        return root(row_sum(squares, 0))[0][:, None]
