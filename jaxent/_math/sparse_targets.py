"""Targets that name a few classes per row with their probabilities; all other classes have 0.

Classes and probabilities lie along the class axis, which has length k in them. They are looked up in the logits, and
spread over the classes only where a derivative is written, within the pass that writes it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxent._math.softmax import Normalizer, log_probabilities, normalizer, probabilities
from jaxent._mesh.class_axis import ClassAxis, row_sum


class SparseRow(NamedTuple):
    """`k` classes of each row, int32, and what each of them weighs; a class that stands twice counts twice."""

    labels: jax.Array
    shares: jax.Array  # nan for a class outside the vocabulary


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def sparse_nll(z: jax.Array, row: SparseRow, classes: ClassAxis) -> tuple[jax.Array, Normalizer]:
    """`-sum_j s_j log p_{y_j}` of each row, with the row's normaliser."""
    normal = normalizer(z, classes)
    gaps = _gaps(z, row, normal, classes)
    return _sum(row.shares * gaps, classes) + _sum(row.shares, classes) * normal.log_total, normal


def _sum(x: jax.Array, classes: ClassAxis) -> jax.Array:
    """Over the k entries, which every device of a vocabulary axis has."""
    return row_sum(x, classes.axis)


def _gaps(z: jax.Array, row: SparseRow, normal: Normalizer, classes: ClassAxis) -> jax.Array:
    """`m - z_{y_j}`; 0 for a removed class without a share, which is as if it were not named."""
    taken = classes.take_each(z, row.labels)
    nothing = jnp.isneginf(taken) & (row.shares == 0)
    return jnp.where(nothing, 0, normal.shift - jnp.where(nothing, 0, taken))


def _sparse_nll_jvp(classes, primals, tangents):
    (z, row), (dz, d_row) = primals, tangents
    nll, normal = sparse_nll(z, row, classes)
    d_nll, d_rest = jnp.zeros_like(nll), jnp.zeros_like(nll)
    if not isinstance(dz, jax.custom_derivatives.SymbolicZero):
        d_nll += classes.sum(sparse_gradient(z, row, normal, classes) * dz)
        d_rest += classes.sum(jnp.exp(z - normal.shift) * dz)
    if not isinstance(d_row.shares, jax.custom_derivatives.SymbolicZero):
        d_nll += _sum((_gaps(z, row, normal, classes) + normal.log_total) * d_row.shares, classes)
    return (nll, normal), (d_nll, Normalizer(jnp.zeros_like(normal.shift), d_rest))


sparse_nll.defjvp(_sparse_nll_jvp, symbolic_zeros=True)


def sparse_gradient(z: jax.Array, row: SparseRow, normal: Normalizer, classes: ClassAxis) -> jax.Array:
    """`S softmax(z) - s`, `S = sum_j s_j`; at the maximum `(S - s_k) + S (p_k - 1)`, which keeps a tiny `1 - p_k`."""
    mass, spread = _sum(row.shares, classes), classes.spread(row.shares, row.labels, z)
    at_top = (mass - spread) + mass * jnp.expm1(log_probabilities(z, normal, classes))
    return jnp.where(z == normal.shift, at_top, mass * probabilities(z, normal, classes) - spread)
