"""Divergences from a teacher of whom only the top k classes were stored, with their log-probabilities.

The classes and their log-probabilities lie along the class axis, which has length k in them.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxent._math import safe
from jaxent._math.label_loss import INVALID
from jaxent._math.softmax import Normalizer, normalizer
from jaxent._math.sparse_targets import SparseRow
from jaxent._mesh.class_axis import ClassAxis, row_sum

Tail = Literal["bucket", "renormalize", "drop"]


def top_divergence_rows(z: jax.Array, top: SparseRow, classes: ClassAxis, tail: Tail, *, reverse: bool) -> jax.Array:
    """`D(P || Q)`, or `D(Q || P)`, of the teacher P of `top`, whose shares are `log p`, and `Q = softmax(z)`.

    `"bucket"` makes one more outcome of all other classes, on both sides. An entry without a class has `log p` -inf, or
    nan, which makes the row nan.
    """
    row = normalizer(z, classes)
    taken = jnp.where(top.labels == INVALID, -jnp.inf, classes.take_each(z, top.labels))
    log_p, log_q = top.shares, (taken - row.shift) - row.log_total
    if tail == "renormalize":
        log_p = log_p - _log_sum(log_p, classes)
        log_q = log_q - _log_sum(log_q, classes) if reverse else log_q
    # Where both sum to one, `p log(p / q) + (q - p)` is never negative. Elsewhere the masses differ.
    term = _balanced if tail == "bucket" or (reverse and tail == "renormalize") else _terms
    total = _sum(term(log_q, log_p) if reverse else term(log_p, log_q), classes)
    if tail == "bucket" and top.labels.shape[classes.axis] < classes.size(z):
        rest_p, rest_q = _log_rest_of_teacher(log_p, classes), _log_rest(z, top, row, classes)
        total += _balanced(rest_q, rest_p) if reverse else _balanced(rest_p, rest_q)
    return jnp.where(jnp.any(jnp.isnan(log_p), axis=classes.axis, keepdims=True), jnp.nan, total)


def _sum(x: jax.Array, classes: ClassAxis) -> jax.Array:
    return row_sum(x, classes.axis)


def _log_sum(log_p: jax.Array, classes: ClassAxis) -> jax.Array:
    return jax.nn.logsumexp(log_p, axis=classes.axis, keepdims=True)


def _log(x: jax.Array) -> jax.Array:
    """The logarithm of what is not negative; -inf, with derivative 0, at 0."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), -jnp.inf)


def _log_rest(z: jax.Array, top: SparseRow, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`log(1 - sum_j q_j)`, from a sum over the classes that are not in the top, where the difference would cancel."""
    in_top = classes.spread(jnp.ones_like(top.shares), top.labels, z) > 0
    others = jnp.where(in_top, -jnp.inf, z - row.shift)
    return _log(classes.sum(jnp.exp(others))) - row.log_total


def _log_rest_of_teacher(log_p: jax.Array, classes: ClassAxis) -> jax.Array:
    """`log(1 - sum_j p_j)`; the largest `p_j` as `-expm1(log p_j)`, whose distance to one has its digits."""
    index = jnp.argmax(log_p, axis=classes.axis, keepdims=True).astype(jnp.int32)
    is_largest = classes.local_indices(log_p) == index
    largest = _sum(jnp.where(is_largest, log_p, 0), classes)
    others = _sum(jnp.where(is_largest, 0, jnp.exp(log_p)), classes)
    return _log(jnp.maximum(-safe.expm1(largest) - others, 0))


def _terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`p log(p / q)`; 0 at `p = 0`, +inf at `p > 0`, `q = 0`."""
    log_p, log_q, absent, lost = _supported(log_p, log_q)
    return jnp.where(absent, 0, jnp.exp(log_p) * (log_p - log_q)) + _pole(lost, log_p)


def _balanced(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """`p log(p / q) + (q - p)`, from logarithms: `q` may be 0 in float32 where its logarithm is not -inf."""
    both_absent = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    q = jnp.where(jnp.isneginf(log_q), 0, jnp.exp(jnp.where(both_absent, 0, log_q)))
    log_p, log_q, absent, lost = _supported(log_p, log_q)
    term = safe.kl_given_log_ratio(jnp.exp(log_p), jnp.where(absent | lost, jnp.exp(log_p), q), log_p - log_q)
    return jnp.where(absent, q, jnp.where(lost, 0, term)) + _pole(lost, log_p)


def _supported(log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The logarithms, 0 where either is -inf; where `p` is 0; and where `q` is 0 and `p` is not."""
    absent = jnp.isneginf(log_p)
    lost = ~absent & jnp.isneginf(log_q)
    return jnp.where(absent, 0, log_p), jnp.where(absent | lost, 0, log_q), absent, lost


def _pole(lost: jax.Array, log_p: jax.Array) -> jax.Array:
    return safe.infinity(log_p, lost & (jnp.exp(log_p) > 0))
