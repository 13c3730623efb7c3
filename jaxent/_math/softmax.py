"""The mathematics of one row of logits: one definition for the dense, the streamed and the sharded losses.

A row `z` is reduced to two numbers, its maximum `m` and the rest `r`:

    m = max_k z_k        r = sum_k exp(z_k - m) - 1, summed without the maximum, so that it keeps its relative accuracy

From them come the total `T = 1 + r`, the log-normaliser `m + log1p(r)`, the probabilities `exp(z_k - m) / T`, the
log-probabilities `(z_k - m) - log1p(r)`, and what is missing to one at the maximum, `r / T`. A loss of 1e-18 is then
`log1p(1e-18)`, where `log(sum exp)` would round it to 0.

`m` is a constant to every derivative: what is computed from `m` and `r` does not depend on the shift.
Functions take logits in the accumulation dtype and row quantities that keep the class axis with length 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._mesh.class_axis import ClassAxis
from jaxent._mesh.types import pcast_like


class Normalizer(NamedTuple):
    """What a row's softmax needs: the shift `m` and the rest `r` of the sum of exponentials."""

    shift: jax.Array
    rest: jax.Array

    @property
    def total(self) -> jax.Array:
        return 1 + self.rest

    @property
    def log_total(self) -> jax.Array:
        return jnp.log1p(self.rest)


def has_softmax(z: jax.Array, classes: ClassAxis) -> jax.Array:
    """Whether a row has a softmax: no nan, no +inf, and something above -inf."""
    bad = classes.sum((jnp.isnan(z) | jnp.isposinf(z)).astype(jnp.int32)) > 0
    return jnp.isfinite(classes.max(z)) & ~bad


def shift_of(z: jax.Array, classes: ClassAxis) -> jax.Array:
    """The row maximum; nan where no shift makes sense (a row of -inf, or one with +inf or nan)."""
    return finite_or_nan(classes.max(z))


def finite_or_nan(largest: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(largest), largest, jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalizer(z: jax.Array, classes: ClassAxis) -> Normalizer:
    """`m` and `r` of rows without a label: the maxima are left out of the sum and counted.

    The count is that of the ones which the sum left out. XLA may recompute `z` in each sum and round it differently (a
    division by a constant becomes a product in one of them): `z == m` can hold in one and not in the other.
    """
    shift = shift_of(z, classes)
    exponentials = jnp.exp(z - shift)
    total = classes.sum(exponentials)
    others = classes.sum(jnp.where(z == shift, 0, exponentials))
    rest = jnp.where(total < 4, others + (jnp.round(total - others) - 1), total - 1)
    # With the derivative of `total`: jax 0.10 differentiates this and not the rule in a jvp of a grad through a scan.
    return Normalizer(shift, lax.stop_gradient(rest) + (total - lax.stop_gradient(total)))


@normalizer.defjvp
def _normalizer_jvp(classes, primals, tangents):
    (z,), (dz,) = primals, tangents
    shift, rest = normalizer(z, classes)
    return Normalizer(shift, rest), Normalizer(jnp.zeros_like(shift), classes.sum(jnp.exp(z - shift) * dz))


# ----------------------------------------------------------------------------------------------------------------------
# Softmax


def log_softmax(z: jax.Array, classes: ClassAxis) -> jax.Array:
    return log_probabilities(z, normalizer(z, classes), classes)


def softmax(z: jax.Array, classes: ClassAxis) -> jax.Array:
    return probabilities(z, normalizer(z, classes), classes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def log_probabilities(z: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`(z_k - m) - log1p(r)`, with the row's own normaliser."""
    return (z - row.shift) - row.log_total


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def probabilities(z: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`exp(z_k - m) / T`, which rounds once less than `exp(log p_k)`."""
    return jnp.exp(z - row.shift) / row.total


@log_probabilities.defjvp
def log_probabilities_jvp(classes, primals, tangents):
    # d log p_k = dz_k - sum_j p_j dz_j, see `less_mean`.
    (z, row), (dz, _) = primals, tangents
    return log_probabilities(z, row, classes), less_mean(dz, probabilities(z, row, classes), classes)


def less_mean(x: jax.Array, p: jax.Array, classes: ClassAxis) -> jax.Array:
    """`x_k - <p, x>`, centred twice.

    At logits (0, -41) and x = (1, 0) the first mean rounds to 1, and the second, of (0, -1), is the missing -1.6e-18.
    So it is in reverse mode, where `p` and the ones of the sum change places.
    """
    # Means are cast before they are spread over the classes, so that cotangents cross the mesh as one number per row.
    centred = x - pcast_like(classes.sum(p * x), [p])
    return centred - pcast_like(classes.sum(p * centred), [p])


@probabilities.defjvp
def _probabilities_jvp(classes, primals, tangents):
    p = probabilities(*primals, classes)
    _, d_log_p = log_probabilities_jvp(classes, primals, tangents)
    return p, p * d_log_p


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def log_total(z: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`log1p(r)`, the log-normaliser less its shift, whose derivative is `p` and keeps the digits of `p (1 - p)`."""
    return row.log_total


@log_total.defjvp
def _log_total_jvp(classes, primals, tangents):
    (z, row), (dz, _) = primals, tangents
    return log_total(z, row, classes), classes.sum(probabilities(z, row, classes) * dz)


# ----------------------------------------------------------------------------------------------------------------------
# Entropy and variance


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def entropy(z: jax.Array, classes: ClassAxis) -> jax.Array:
    """`H = log1p(r) + sum_k p_k (m - z_k)`: no term is negative, so that a tiny entropy keeps its digits."""
    row = normalizer(z, classes)
    return row.log_total + _mean_gap(z, row, classes)


@entropy.defjvp
def _entropy_jvp(classes, primals, tangents):
    (z,), (dz,) = primals, tangents
    row = normalizer(z, classes)
    gradient = probabilities(z, row, classes) * _centred_gaps(z, row, classes)
    return entropy(z, classes), classes.sum(gradient * dz)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def half_variance(z: jax.Array, step: jax.Array, classes: ClassAxis) -> jax.Array:
    """`sum_k p_k (u_k - <p, u>)^2 / 2`, half the quadratic form of `diag(p) - p p^T` at `u`: never negative."""
    p, centred = _centred(z, step, classes)
    return classes.sum(p * jnp.square(centred)) / 2


def _half_variance_jvp(classes, primals, tangents):
    (z, step), (dz, d_step) = primals, tangents
    p, centred = _centred(z, step, classes)
    squares = jnp.square(centred)
    half = classes.sum(p * squares) / 2
    tangent = jnp.zeros_like(half)
    if not isinstance(d_step, jax.custom_derivatives.SymbolicZero):
        tangent += classes.sum((p * centred) * d_step)
    if not isinstance(dz, jax.custom_derivatives.SymbolicZero):
        tangent += classes.sum(p * (squares / 2 - half) * dz)
    return half, tangent


half_variance.defjvp(_half_variance_jvp, symbolic_zeros=True)


def _centred(z: jax.Array, step: jax.Array, classes: ClassAxis) -> tuple[jax.Array, jax.Array]:
    """`p` and `u_k - <p, u>`, the derivative of `log p_k` along `u`."""
    shift = shift_of(z, classes)
    total = classes.sum(jnp.exp(z - shift))
    p = probabilities(z, Normalizer(shift, total - 1), classes)
    return p, less_mean(step, p, classes)


def _gaps(z: jax.Array, row: Normalizer) -> jax.Array:
    """`m - z_k`; 0 where `z_k` is -inf and its probability, which multiplies it, is 0."""
    return jnp.where(jnp.isneginf(z), 0, row.shift - z)


def _mean_gap(z: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`sum_k p_k (m - z_k)`, divided by `T` after the sum: then one pass over the logits gives both."""
    gaps = _gaps(z, row)
    return classes.sum(jnp.exp(-gaps) * gaps) / row.total


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _centred_gaps(z: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`(m - z_k) - sum_j p_j (m - z_j)`, which is `-log p_k - H`."""
    return _gaps(z, row) - _mean_gap(z, row, classes)


@_centred_gaps.defjvp
def _centred_gaps_jvp(classes, primals, tangents):
    # From -log p_k, whose derivative keeps its digits where one class has nearly everything, and from -H.
    (z, row), (dz, _) = primals, tangents
    _, d_log_p = log_probabilities_jvp(classes, (z, row), (dz, None))
    gradient = probabilities(z, row, classes) * _centred_gaps(z, row, classes)
    return _centred_gaps(z, row, classes), -d_log_p - classes.sum(gradient * dz)
