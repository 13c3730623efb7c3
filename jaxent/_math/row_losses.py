"""The row losses with all of their options: what the dense, the streamed and the sharded losses sum up."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxent._math.label_loss import INVALID, label_log_prob, label_loss, label_loss_and_gradient
from jaxent._math.softmax import Normalizer, has_softmax, log_probabilities, log_total, normalizer, probabilities
from jaxent._math.sparse_targets import SparseRow, sparse_gradient, sparse_nll
from jaxent._mesh.class_axis import ClassAxis, row_sum


class RowTargets(NamedTuple):
    """What each row is compared with; the class axis of every leaf but `probabilities` has length 1.

    A row has a label, or probabilities, or neither where only the logits count.
    """

    labels: jax.Array | None  # int32, a class or INVALID; undefined in ignored rows
    ignored: jax.Array  # bool: the row counts for nothing, whatever its values
    probabilities: jax.Array | None = None
    weights: jax.Array | None = None  # the caller's weight of the row
    label_weights: jax.Array | None = None  # the class weight of the row's label
    sparse: SparseRow | None = None  # in place of label and probabilities; its shares have their class weights

    def total_weights(self, classes: ClassAxis) -> jax.Array:
        """What the rows weigh in a mean: 0 where ignored, `w_i c_{y_i}` elsewhere."""
        ignored = jnp.squeeze(self.ignored, classes.axis)
        weights = jnp.where(ignored, 0.0, 1.0)
        for factor in (self.weights, self.label_weights):
            if factor is not None:
                weights = jnp.where(ignored, 0, weights.astype(factor.dtype) * jnp.squeeze(factor, classes.axis))
        return weights


class LossOptions(NamedTuple):
    """What all rows share; None is off."""

    class_weights: jax.Array | None = None  # shaped to broadcast against the logits
    smoothing: jax.Array | None = None
    z_loss: jax.Array | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Rows with probabilities, rows of log-probabilities, binary rows


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def target_nll(z: jax.Array, targets: jax.Array, classes: ClassAxis) -> tuple[jax.Array, Normalizer]:
    """`-sum_k t_k log p_k` of each row, for targets that need not sum to one, with the row's normaliser."""
    row = normalizer(z, classes)
    return _target_terms(z, targets, row, row.log_total, classes), row


def _target_terms(
    z: jax.Array, targets: jax.Array, row: Normalizer, log_rest: jax.Array, classes: ClassAxis
) -> jax.Array:
    """`sum_k t_k ((m - z_k) + log1p(r))`; a removed class without a target is as if it were not there."""
    absent = jnp.isneginf(z) & (targets == 0)
    targets, gaps = (jnp.where(absent, 0, x) for x in (targets, row.shift - z))
    return classes.sum(targets * gaps) + classes.sum(targets) * log_rest


def target_gradient(z: jax.Array, targets: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`S softmax(z) - t`, `S = sum_k t_k`; at the maximum `(S - t_k) + S (p_k - 1)`, which keeps a tiny `1 - p_k`."""
    mass = classes.sum(targets)
    at_top = (mass - targets) + mass * jnp.expm1(log_probabilities(z, row, classes))
    return jnp.where(z == row.shift, at_top, mass * probabilities(z, row, classes) - targets)


def _target_nll_jvp(classes, primals, tangents):
    (z, targets), (dz, dt) = primals, tangents
    nll, row = target_nll(z, targets, classes)
    d_nll, d_rest = jnp.zeros_like(nll), jnp.zeros_like(nll)
    if not isinstance(dz, jax.custom_derivatives.SymbolicZero):
        d_nll += classes.sum(target_gradient(z, targets, row, classes) * dz)
        d_rest += classes.sum(jnp.exp(z - row.shift) * dz)
    if not isinstance(dt, jax.custom_derivatives.SymbolicZero):
        # A removed class with a target costs +inf, and so does more of it. Twice the largest number, as in `safe.pole`:
        # inf itself would make nan of the zero tangents of the other classes.
        lost = jnp.isneginf(z) & (targets != 0)
        slope = jnp.where(jnp.isneginf(z), 0, (row.shift - jnp.where(jnp.isneginf(z), 0, z)) + row.log_total)
        big = jnp.where(lost, float(jnp.finfo(z.dtype).max), 0).astype(z.dtype)
        d_nll += classes.sum(slope * dt + (big * dt) * big)
    return (nll, row), (d_nll, Normalizer(jnp.zeros_like(row.shift), d_rest))


target_nll.defjvp(_target_nll_jvp, symbolic_zeros=True)


def label_loss_from_log_probs(log_p: jax.Array, rows: RowTargets, classes: ClassAxis) -> jax.Array:
    """The weighted loss `-w c_y log p_y` of each row."""
    labels, ignored = rows.labels, rows.ignored
    assert labels is not None
    if rows.weights is not None:
        ignored |= (rows.weights == 0) & jnp.isnan(classes.take(log_p, labels))
    loss = -label_log_prob(log_p, labels, ignored, classes)
    for weights in (rows.label_weights, rows.weights):
        if weights is not None:
            loss = weighted(jnp.where(ignored, 0, weights), loss)
    return loss


def binary_nll(z: jax.Array, t: jax.Array, pos_weight: jax.Array | None) -> jax.Array:
    """`c t softplus(-z) + (1 - t) softplus(z)`; a side of probability 0 adds 0 even where it is infinite."""
    positive = t if pos_weight is None else pos_weight * t
    return weighted(positive, softplus(-z)) + weighted(1 - t, softplus(z))


@jax.custom_jvp
def softplus(x: jax.Array) -> jax.Array:
    """`log(1 + exp(x))`, exact when it is tiny, with the logistic function as its derivative."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softplus(x), logistic(x) * dx


@jax.custom_jvp
def logistic(x: jax.Array) -> jax.Array:
    """`1 / (1 + exp(-x))`; JAX's own rule has the derivative `p (1 - p)`, which is 0 in float32 from x = 17 on."""
    return jax.nn.sigmoid(x)


@logistic.defjvp
def _logistic_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return logistic(x), logistic(x) * logistic(-x) * dx


# ----------------------------------------------------------------------------------------------------------------------
# The softmax loss


def ignore_zero_weight_rows(rows: RowTargets, classes: ClassAxis, *logits: jax.Array) -> RowTargets:
    """A row of weight 0 is ignored if it has no softmax; if it has one, its derivative with respect to the weight is
    its loss. Rows with an invalid label have been ignored before.
    """
    if rows.weights is None:
        return rows
    has_loss = functools.reduce(jnp.logical_and, [has_softmax(z, classes) for z in logits])
    return rows._replace(ignored=rows.ignored | ((rows.weights == 0) & ~has_loss))


def softmax_loss(z: jax.Array, rows: RowTargets, options: LossOptions, classes: ClassAxis) -> jax.Array:
    """The weighted loss of each row: `w ((1-e) c_y nll_y + e/C sum_k c_k nll_k + z_loss lse^2)` for a label `y`, and
    `w (sum_k c_k ((1-e) t_k + e/C) nll_k + z_loss lse^2)` for probabilities `t`.

    Call `ignore_zero_weight_rows` on the rows first.
    """
    ignored = rows.ignored
    if rows.sparse is not None:
        z = jnp.where(ignored, 0, z)
        loss, row = sparse_nll(z, _smoothed_shares(rows.sparse, ignored, options), classes)
        if options.smoothing is not None:
            loss += _uniform_nll(z, row, options, classes)
    elif rows.probabilities is None:
        assert rows.labels is not None
        loss, row = label_loss(z, rows.labels, ignored, classes)
        if options.smoothing is not None:
            loss = (1 - options.smoothing) * loss
        loss = loss if rows.label_weights is None else weighted(rows.label_weights, loss)
        if options.smoothing is not None:
            loss += _uniform_nll(jnp.where(ignored, 0, z), row, options, classes)
    else:
        targets = _smoothed(jnp.where(ignored, 0, rows.probabilities), options, classes.size(z))
        loss, row = target_nll(jnp.where(ignored, 0, z), targets, classes)
    if options.z_loss is not None:
        kept = jnp.where(ignored, 0, z)
        loss += options.z_loss * jnp.square(row.shift + log_total(kept, row, classes))
    if rows.labels is None or options.smoothing is not None or options.z_loss is not None:
        # The loss of a label alone is 0 there, and one more pass over the rows shows at 65536 x 10.
        loss = jnp.where(ignored, 0, loss)
    return loss if rows.weights is None else weighted(jnp.where(ignored, 0, rows.weights), loss)


def softmax_loss_gradient(z: jax.Array, rows: RowTargets, options: LossOptions, classes: ClassAxis) -> jax.Array:
    """The derivative of `softmax_loss` with respect to the logits, in closed form."""
    ignored = rows.ignored
    count = classes.size(z)
    if rows.sparse is not None:
        z = jnp.where(ignored, 0, z)
        row = normalizer(z, classes)
        gradient = sparse_gradient(z, _smoothed_shares(rows.sparse, ignored, options), row, classes)
        if options.smoothing is not None:
            gradient += target_gradient(z, _smoothed(jnp.zeros_like(z), options, count), row, classes)
    elif rows.probabilities is None:
        assert rows.labels is not None
        _, row, gradient = label_loss_and_gradient(z, rows.labels, ignored, classes)
        if options.smoothing is not None:
            gradient *= 1 - options.smoothing
        if rows.label_weights is not None:
            gradient *= rows.label_weights
        if options.smoothing is not None:
            uniform = _smoothed(jnp.zeros_like(z), options, count)
            # With a normaliser of its own where class weights may leave only a tiny share: see `_uniform_nll`.
            share = row if options.class_weights is None else normalizer(z, classes)
            gradient += target_gradient(z, uniform, share, classes)
    else:
        z = jnp.where(ignored, 0, z)
        targets = _smoothed(jnp.where(ignored, 0, rows.probabilities), options, count)
        row = normalizer(z, classes)
        gradient = target_gradient(z, targets, row, classes)
    if options.z_loss is not None:
        gradient += 2 * options.z_loss * (row.shift + row.log_total) * (jnp.exp(z - row.shift) / row.total)
    if rows.weights is not None:
        gradient *= rows.weights
    return jnp.where(ignored, 0, gradient)


def target_mass(z: jax.Array, rows: RowTargets, options: LossOptions, classes: ClassAxis) -> jax.Array:
    """`S`, what a row's targets add up to in its loss, with smoothing and class weights; 1 in the plain case."""
    count = classes.size(z)
    if rows.probabilities is not None:
        return classes.sum(_smoothed(jnp.where(rows.ignored, 0, rows.probabilities), options, count))
    if rows.sparse is not None:
        mass = row_sum(_smoothed_shares(rows.sparse, rows.ignored, options).shares, classes.axis)
        return mass if options.smoothing is None else mass + classes.sum(_smoothed(jnp.zeros_like(z), options, count))
    if rows.labels is None:
        return jnp.ones_like(rows.ignored, z.dtype)
    mass = jnp.where((rows.labels == INVALID) & ~rows.ignored, jnp.nan, 1).astype(z.dtype)
    if rows.label_weights is not None:
        mass *= rows.label_weights
    if options.smoothing is not None and options.class_weights is not None:
        mass = (1 - options.smoothing) * mass + classes.sum(_smoothed(jnp.zeros_like(z), options, count))
    return mass


def weighted(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """`weights * losses`, where a weight of 0 also silences an infinite loss, but not nan, whose gradient is nan."""
    return weights * jnp.where((weights == 0) & jnp.isinf(losses), 0, losses)


def _smoothed(targets: jax.Array, options: LossOptions, count: int) -> jax.Array:
    """`c_k ((1-e) t_k + e/C)`."""
    if options.smoothing is not None:
        targets = (1 - options.smoothing) * targets + options.smoothing / count
    return targets if options.class_weights is None else options.class_weights * targets


def _smoothed_shares(row: SparseRow, ignored: jax.Array, options: LossOptions) -> SparseRow:
    """`(1-e) s_j`; what smoothing gives to all classes is `_smoothed` of nothing."""
    shares = jnp.where(ignored, 0, row.shares)
    return row._replace(shares=shares if options.smoothing is None else (1 - options.smoothing) * shares)


def _uniform_nll(z: jax.Array, row: Normalizer, options: LossOptions, classes: ClassAxis) -> jax.Array:
    """`e/C sum_k c_k nll_k`, the smoothing's share, given the normaliser of the label's loss.

    That one's `r` has absolute accuracy only where the label does not hold the maximum. It is lost in the gaps
    `m - z_k`, unless class weights of 0 take them out: logits (0, -20), label 1, weights (1, 0).
    """
    targets = _smoothed(jnp.zeros_like(z), options, classes.size(z))
    if options.class_weights is not None:
        return target_nll(z, targets, classes)[0]
    return _target_terms(z, targets, row, log_total(z, row, classes), classes)
