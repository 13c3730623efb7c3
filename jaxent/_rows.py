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
import numpy as np
from jax import lax

from jaxent import _numerics
from jaxent._sharding import ClassAxis

# Label codes beside the classes 0 .. C-1.
IGNORED = -1  # the row counts for nothing: loss 0, gradient 0
INVALID = -2  # out of range: loss nan, gradient nan


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


def label_codes(labels: jax.Array, count: int, ignore_index: int | None, kept: jax.Array | None) -> jax.Array:
    """Labels of any integer dtype as int32 classes, `IGNORED` or `INVALID`.

    Range and `ignore_index` are decided in the labels' own dtype: as int32, the uint32 label 2**32 - 100 would be -100,
    and as int8, the class count 1000 would be -24.
    """
    bounds = jnp.iinfo(labels.dtype)
    inside = labels <= min(count - 1, bounds.max)
    if bounds.min < 0:
        inside &= labels >= 0
    codes = jnp.where(inside, labels.astype(jnp.int32), INVALID)
    if ignore_index is not None and bounds.min <= ignore_index <= bounds.max:
        codes = jnp.where(labels == np.array(ignore_index, labels.dtype), IGNORED, codes)
    return codes if kept is None else jnp.where(kept, codes, IGNORED)


def is_usable(z: jax.Array, classes: ClassAxis) -> jax.Array:
    """Whether a row has a softmax: no nan, no +inf, and something above -inf."""
    bad = classes.sum((jnp.isnan(z) | jnp.isposinf(z)).astype(jnp.int32)) > 0
    return jnp.isfinite(classes.max(z)) & ~bad


# ----------------------------------------------------------------------------------------------------------------------
# The two numbers of a row


def _shift(z: jax.Array, classes: ClassAxis) -> jax.Array:
    """The row maximum; nan where no shift makes sense (a row of -inf, or one with +inf or nan)."""
    largest = classes.max(z)
    return jnp.where(jnp.isfinite(largest), largest, jnp.nan)


# Logits in a block of rows that stays in cache. Heuristic: 2 MiB; half and twice as much cost 10% more here.
BLOCK_LOGITS = 2**19
# From this many classes on blocks pay: 1.2 times optax at 8192 x 1000 against 1.4, but 1.9 against 1.3 at 16384 x 100.
BLOCK_CLASSES = 2**12


class LabelSums(NamedTuple):
    """One pass over a row with a label: the maximum, the label's logit and the sum over the other classes."""

    shift: jax.Array
    label_logit: jax.Array
    others: jax.Array


def _label_sums(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> LabelSums:
    shift = _label_shift(z, codes, classes)
    return LabelSums(shift, classes.take(z, codes), classes.sum(_other_exponentials(z, codes, shift, classes)))


def _label_shift(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> jax.Array:
    """The row maximum; 0 in ignored rows, nan for invalid labels."""
    return jnp.where(codes == IGNORED, 0, jnp.where(codes == INVALID, jnp.nan, _shift(z, classes)))


def _other_exponentials(z: jax.Array, codes: jax.Array, shift: jax.Array, classes: ClassAxis) -> jax.Array:
    """`exp(z_k - m)`, and 0 at the label and in ignored rows, whatever they hold."""
    # One comparison: with `is_class(codes, z) | (codes == IGNORED)` the CPU back end no longer vectorises (2.8 ms
    # against 0.6 at 65536 x 10).
    reach = jnp.where(codes == IGNORED, 2**30, 0)
    left_out = jnp.abs(classes.index(z) - (codes - classes.first(z))) <= reach
    # A column that depends on the row: a scan would keep a constant block of -inf, as large as the logits.
    nothing = jnp.where(codes == IGNORED, -jnp.inf, jnp.minimum(shift, -jnp.inf))
    return jnp.exp(jnp.where(left_out, nothing, z - shift))


def _label_sums_for_value(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> LabelSums:
    """The same, when no gradient needs the exponentials, which the CPU back end would write out.

    It fuses arithmetic into a row sum, but not a comparison (8192 x 1000: twice the time). The distance between two
    classes, scaled by a power of two so that it stays exact, is 0 or at least 2**100, and no exponential exceeds 1.
    """
    if z.shape[classes.axis] >= BLOCK_CLASSES:
        return _label_sums_in_blocks(z, codes, classes)
    shift = _label_shift(z, codes, classes)
    scale = 2.0**100
    label = (codes - classes.first(z)).astype(z.dtype) * scale
    others = jnp.minimum(jnp.abs(classes.index(z, z.dtype) * scale - label), jnp.exp(z - shift))
    return LabelSums(shift, classes.take(z, codes), classes.sum(others))


def _label_sums_in_blocks(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> LabelSums:
    """The same, on a CPU a few rows at a time.

    Above 2**15 classes the CPU back end does not even fuse `exp` into the row sum: 1400 ms at 4096 x 50257, against 120
    in blocks. They are strided, so that rows which are sharded stay where they are.
    """
    one_device = classes.mesh_axis is None and jax.typeof(z).sharding.mesh.empty
    known = all(isinstance(size, int) for size in z.shape)  # and not a symbol of `jax.export`
    if not one_device or not known or classes.axis != -1 or z.size <= BLOCK_LOGITS:
        return _label_sums(z, codes, classes)
    rows, count = z.size // z.shape[-1], z.shape[-1]
    size = max(n for n in range(1, max(1, BLOCK_LOGITS // count) + 1) if rows % n == 0)

    def in_blocks(z: jax.Array, codes: jax.Array) -> LabelSums:
        blocks = z.reshape(size, rows // size, count), codes.reshape(size, rows // size, 1)

        def one(i: jax.Array) -> LabelSums:
            z_i, codes_i = (lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in blocks)
            return _label_sums(z_i, codes_i, classes)

        sums = lax.map(one, jnp.arange(rows // size, dtype=jnp.int32))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(codes.shape), sums)

    return lax.platform_dependent(z, codes, cpu=in_blocks, default=lambda z, codes: _label_sums(z, codes, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalizer(z: jax.Array, classes: ClassAxis) -> Normalizer:
    """`m` and `r` of rows without a label: the maxima are left out of the sum and counted.

    The count is that of the ones which the sum left out. XLA may compute `z` anew in each sum and round it otherwise (a
    division by a constant becomes a product in one of them): `z == m` can hold in one and not in the other.
    """
    shift = _shift(z, classes)
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
def _log_probabilities_jvp(classes, primals, tangents):
    # d log p_k = dz_k - sum_j p_j dz_j, which a constant in dz does not change. Counted from dz at the maximum, nothing
    # large cancels there: at logits (0, -41), where 1 - p_0 is 1.6e-18, the plain sum rounds to dz_0 and leaves 0. The
    # zero at a single maximum is written out for reverse mode, which would add and subtract `p - p^2` otherwise.
    (z, row), (dz, _) = primals, tangents
    top = lax.optimization_barrier(z == row.shift)  # one answer for the three uses
    ties = jnp.maximum(classes.sum(top.astype(jnp.int32)), 1)
    at_top = classes.sum(jnp.where(top, dz, 0)) / ties.astype(dz.dtype)
    step = jnp.where(top & (ties == 1), 0, dz - at_top)
    return log_probabilities(z, row, classes), step - classes.sum(probabilities(z, row, classes) * step)


@probabilities.defjvp
def _probabilities_jvp(classes, primals, tangents):
    p = probabilities(*primals, classes)
    _, d_log_p = _log_probabilities_jvp(classes, primals, tangents)
    return p, p * d_log_p


# ----------------------------------------------------------------------------------------------------------------------
# Negative log-likelihoods


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def label_nll(
    z: jax.Array, codes: jax.Array, classes: ClassAxis, beside_gradient: bool = False
) -> tuple[jax.Array, Normalizer]:
    """`-log p_y` of each row, with the row's normaliser: `(m - z_y) + log1p(r)`; both 0 in ignored rows.

    Shift first: `logsumexp(z) - z_y` at logits near 1e4 is 2.40723 where 2.40761 is due. With `beside_gradient` the
    exponentials are those that the gradient needs too.
    """
    sums = _label_sums if beside_gradient else _label_sums_for_value
    return _nll_of_sums(sums(z, codes, classes), codes, classes)


def _nll_of_sums(sums: LabelSums, codes: jax.Array, classes: ClassAxis) -> tuple[jax.Array, Normalizer]:
    """The label is a guess at the maximum.

    If it holds the maximum, the sum over the other classes is `r`. If not, `r` is that sum less what the label lacks to
    one, and may lose digits when it is small; but then `m - z_y` is the loss, and `log1p(r)` is lost in it.
    """
    # Without the class axis: the CPU back end takes twice as long over (65536, 1) as over (65536,).
    shift, label_logit, others, code = (jnp.squeeze(x, classes.axis) for x in (*sums, codes))
    others = jnp.where(others < 2.0**90, others, jnp.nan)  # a row with nan, whose sum of distances did not show it
    rest = others + (jnp.exp(label_logit - shift) - 1)
    nll = (shift - label_logit) + jnp.log1p(rest)
    nll, rest = (jnp.expand_dims(jnp.where(code == IGNORED, 0, x), classes.axis) for x in (nll, rest))
    return nll, Normalizer(sums.shift, rest)


def label_gradient(z: jax.Array, codes: jax.Array, nll: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`softmax(z) - onehot(y)`, with `-(1 - p_y) = expm1(-nll)` at the label; 0 in ignored rows, whatever they hold."""
    return jnp.where(classes.is_class(codes, z), _numerics.expm1(-nll), _other_probabilities(z, codes, row, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _other_probabilities(z: jax.Array, codes: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`probabilities`, and 0 at the label and in ignored rows."""
    return _other_exponentials(z, codes, row.shift, classes) / row.total


@_other_probabilities.defjvp
def _other_probabilities_jvp(classes, primals, tangents):
    (z, codes, row), (dz, _, _) = primals, tangents
    ignored = codes == IGNORED
    z_kept, dz = jnp.where(ignored, 0, z), jnp.where(ignored, 0, dz)
    _, d_log_p = _log_probabilities_jvp(classes, (z_kept, row), (dz, None))
    p = _other_probabilities(z, codes, row, classes)
    return p, p * d_log_p


@label_nll.defjvp
def _label_nll_jvp(classes, beside_gradient, primals, tangents):
    (z, codes), (dz, _) = primals, tangents
    nll, row = label_nll(z, codes, classes, True)
    d_nll = classes.sum(label_gradient(z, codes, nll, row, classes) * dz)
    exponentials = jnp.exp(jnp.where(codes == IGNORED, -jnp.inf, z - row.shift))
    return (nll, row), (d_nll, Normalizer(jnp.zeros_like(row.shift), classes.sum(exponentials * dz)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def target_nll(z: jax.Array, targets: jax.Array, classes: ClassAxis) -> tuple[jax.Array, Normalizer]:
    """`-sum_k t_k log p_k` of each row, for targets that need not sum to one, with the row's normaliser."""
    row = normalizer(z, classes)
    gaps = jnp.where(targets == 0, 0, row.shift - z)
    return classes.sum(targets * gaps) + classes.sum(targets) * row.log_total, row


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
        d_nll += classes.sum(((row.shift - z) + row.log_total) * dt)
    return (nll, row), (d_nll, Normalizer(jnp.zeros_like(row.shift), d_rest))


target_nll.defjvp(_target_nll_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def entropy(z: jax.Array, classes: ClassAxis) -> jax.Array:
    """`H = log1p(r) + sum_k p_k (m - z_k)`: no term is negative, so that a tiny entropy keeps its digits."""
    row = normalizer(z, classes)
    return row.log_total + classes.sum(probabilities(z, row, classes) * _gaps(z, row))


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
    """`p` and `u_k - <p, u>`, the derivative of `log p_k` along `u`.

    Centred twice: at logits (0, -41) and u = (1, 0) the first mean rounds to 1, and the second, of (0, -1), is the
    -1.6e-18 that it lacks. The derivatives by `u` are centred twice as well, forward and reverse. Sums of products,
    which the CPU back end fuses, cost less than finding the maximum to count from.
    """
    shift = _shift(z, classes)
    total = classes.sum(jnp.exp(z - shift))
    p = probabilities(z, Normalizer(shift, total - 1), classes)
    centred = step - classes.sum(p * step)
    return p, centred - classes.sum(p * centred)


def _gaps(z: jax.Array, row: Normalizer) -> jax.Array:
    """`m - z_k`; 0 where `z_k` is -inf and its probability, which multiplies it, is 0."""
    return jnp.where(jnp.isneginf(z), 0, row.shift - z)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _centred_gaps(z: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`(m - z_k) - sum_j p_j (m - z_j)`, which is `-log p_k - H`."""
    gaps = _gaps(z, row)
    return gaps - classes.sum(probabilities(z, row, classes) * gaps)


@_centred_gaps.defjvp
def _centred_gaps_jvp(classes, primals, tangents):
    # By -log p_k, whose derivative keeps its digits where one class has nearly everything, and by -H.
    (z, row), (dz, _) = primals, tangents
    _, d_log_p = _log_probabilities_jvp(classes, (z, row), (dz, None))
    gradient = probabilities(z, row, classes) * _centred_gaps(z, row, classes)
    return _centred_gaps(z, row, classes), -d_log_p - classes.sum(gradient * dz)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def picked(log_p: jax.Array, codes: jax.Array, classes: ClassAxis) -> jax.Array:
    """`log_p` at the label; 0 in ignored rows; nan, as is the whole row of the gradient, for an invalid label."""
    return jnp.where(codes == INVALID, jnp.nan, classes.take(log_p, codes))


@picked.defjvp
def _picked_jvp(classes, primals, tangents):
    (log_p, codes), (d_log_p, _) = primals, tangents
    # A comparison that never holds: without an operand of its shape XLA would give every device the whole gradient.
    invalid = codes == INVALID
    chosen = classes.is_class(codes, log_p) | (log_p > jnp.inf) | invalid
    # A choice, not a product with 0 and 1: a cotangent that is not finite stays with the label.
    share = jnp.where(chosen, jnp.where(invalid, jnp.nan, 1).astype(log_p.dtype) * d_log_p, 0)
    return picked(log_p, codes, classes), classes.sum(share)


def picked_nll(log_p: jax.Array, rows: "RowTargets", classes: ClassAxis) -> jax.Array:
    """The weighted loss `-w c_y log p_y` of each row."""
    codes = rows.codes
    if rows.weights is not None:
        no_loss = (codes == INVALID) | jnp.isnan(classes.take(log_p, codes))
        codes = jnp.where((rows.weights == 0) & no_loss, IGNORED, codes)
    loss = -picked(log_p, codes, classes)
    for weights in (rows.label_weights, rows.weights):
        if weights is not None:
            loss = weighted(jnp.where(codes == IGNORED, 0, weights), loss)
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
    return softplus(x), jax.nn.sigmoid(x) * dx


# ----------------------------------------------------------------------------------------------------------------------
# The softmax loss with all of its options


class RowTargets(NamedTuple):
    """What each row is compared with; the class axis of every leaf but `probabilities` has length 1."""

    codes: jax.Array  # the class, IGNORED or INVALID; with `probabilities` just 0 or IGNORED
    probabilities: jax.Array | None = None
    weights: jax.Array | None = None  # the caller's weight of the row
    label_weights: jax.Array | None = None  # the class weight of the row's label

    def total_weights(self, classes: ClassAxis) -> jax.Array:
        """What the rows weigh in a mean: 0 where ignored, `w_i c_{y_i}` elsewhere."""
        ignored = jnp.squeeze(self.codes, classes.axis) == IGNORED
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


def without_weightless(z: jax.Array, rows: RowTargets, classes: ClassAxis) -> RowTargets:
    """A row of weight 0 is ignored if it has no loss; if it has one, its derivative by the weight is that loss."""
    if rows.weights is None:
        return rows
    no_loss = (rows.codes == INVALID) | ~is_usable(z, classes)
    return rows._replace(codes=jnp.where((rows.weights == 0) & no_loss, IGNORED, rows.codes))


def softmax_loss(z: jax.Array, rows: RowTargets, options: LossOptions, classes: ClassAxis) -> jax.Array:
    """The weighted loss of each row: `w ((1-e) c_y nll_y + e/C sum_k c_k nll_k + z_loss lse^2)` for a label `y`, and
    `w (sum_k c_k ((1-e) t_k + e/C) nll_k + z_loss lse^2)` for probabilities `t`.
    """
    rows = without_weightless(z, rows, classes)
    ignored = rows.codes == IGNORED
    if rows.probabilities is None:
        loss, row = label_nll(z, rows.codes, classes)
        if options.smoothing is not None:
            loss = (1 - options.smoothing) * loss
        loss = loss if rows.label_weights is None else weighted(rows.label_weights, loss)
        if options.smoothing is not None:
            loss += _uniform_nll(jnp.where(ignored, 0, z), row, options, classes)
    else:
        targets = _smoothed(jnp.where(ignored, 0, rows.probabilities), options, classes.size(z))
        loss, row = target_nll(jnp.where(ignored, 0, z), targets, classes)
    if options.z_loss is not None:
        loss += options.z_loss * jnp.square(row.shift + row.log_total)
    loss = jnp.where(ignored, 0, loss)
    return loss if rows.weights is None else weighted(jnp.where(ignored, 0, rows.weights), loss)


def softmax_loss_gradient(z: jax.Array, rows: RowTargets, options: LossOptions, classes: ClassAxis) -> jax.Array:
    """The derivative of `softmax_loss` by the logits, in closed form."""
    rows = without_weightless(z, rows, classes)
    ignored = rows.codes == IGNORED
    count = classes.size(z)
    if rows.probabilities is None:
        nll, row = label_nll(z, rows.codes, classes, True)
        gradient = label_gradient(z, rows.codes, nll, row, classes)
        if options.smoothing is not None:
            gradient *= 1 - options.smoothing
        if rows.label_weights is not None:
            gradient *= rows.label_weights
        if options.smoothing is not None:
            uniform = _smoothed(jnp.zeros_like(z), options, count)
            # Of the kept rows' own normaliser where class weights may leave only a tiny share: see `_uniform_nll`.
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
        return classes.sum(_smoothed(jnp.where(rows.codes == IGNORED, 0, rows.probabilities), options, count))
    mass = jnp.where(rows.codes == INVALID, jnp.nan, 1).astype(z.dtype)
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


def _uniform_nll(z: jax.Array, row: Normalizer, options: LossOptions, classes: ClassAxis) -> jax.Array:
    """`e/C sum_k c_k nll_k`, the smoothing's share, given the normaliser of the label's loss.

    That one's `r` has absolute accuracy only where the label does not hold the maximum. It is lost in the gaps
    `m - z_k`, unless class weights of 0 take them out: logits (0, -20), label 1, weights (1, 0).
    """
    targets = _smoothed(jnp.zeros_like(z), options, classes.size(z))
    if options.class_weights is not None:
        return target_nll(z, targets, classes)[0]
    gaps = jnp.where(targets == 0, 0, row.shift - z)
    return classes.sum(targets * gaps) + classes.sum(targets) * row.log_total
