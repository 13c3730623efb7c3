"""The loss of a row with a label, in one pass: what the label lacks, and the sum over the other classes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._math import safe
from jaxent._math.one_pass import largest_and_others
from jaxent._math.softmax import Normalizer, finite_or_nan, log_probabilities_jvp, shift_of
from jaxent._mesh.class_axis import ClassAxis, row_sum
from jaxent._mesh.types import may_be_split_by_xla

INVALID = -2  # a label that is no class: loss nan, gradient nan


def encode_labels(labels: jax.Array, count: int) -> jax.Array:
    """Labels of any integer dtype as int32 classes or `INVALID`.

    The range is decided before labels that may be wider are cut to 32 bits, and after narrower ones are widened: as
    int8, the class count 1000 would be -24.
    """
    bounds = jnp.iinfo(labels.dtype)
    if bounds.bits < 32:
        labels = labels.astype(jnp.int32)
    inside = labels <= count - 1
    if bounds.min < 0:
        inside &= labels >= 0
    return jnp.where(inside, labels.astype(jnp.int32), INVALID)


def has_label(labels: jax.Array, label: int | None) -> jax.Array:
    """Where a row has this label, compared in the labels' own dtype: as int32, the uint32 2**32 - 100 would be -100."""
    bounds = jnp.iinfo(labels.dtype)
    if label is None or not bounds.min <= label <= bounds.max:
        return jnp.zeros_like(labels, bool)
    return labels == np.array(label, labels.dtype)


# Of logits, labels, shifts and the class axis, which all but the logits go without.
SumOfOthers = Callable[[jax.Array, jax.Array, jax.Array, ClassAxis], jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def label_loss(
    z: jax.Array, labels: jax.Array, ignored: jax.Array, classes: ClassAxis, for_gradient: bool = False
) -> tuple[jax.Array, Normalizer]:
    """`-log p_y` of each row, `(m - z_y) + log1p(r)`, with the row's `m` and `r`; both 0 in ignored rows.

    Shift first: `logsumexp(z) - z_y` at logits near 1e4 is 2.40723 where 2.40761 is due. With `for_gradient` the
    exponentials are those that the gradient needs too; without, `m` may be the label's logit instead of the maximum.
    """
    # Row quantities go without the class axis: the CPU back end takes twice as long over (65536, 1) as over (65536,).
    rows = labels, ignored, classes.take(z, labels)
    label, ignored, label_logit = (jnp.squeeze(x, classes.axis) for x in rows)
    label_logit = _of_valid(label_logit, label, ignored)
    if for_gradient:
        loss = _nll_from_maximum(z, label, ignored, label_logit, classes, _sum_for_gradient)
    else:
        loss = _nll_for_value(z, label, ignored, label_logit, classes)
    return jax.tree.map(lambda x: jnp.expand_dims(x, classes.axis), loss)


def _of_valid(x: jax.Array, label: jax.Array, ignored: jax.Array) -> jax.Array:
    """`x`; 0 in ignored rows, nan for invalid labels."""
    return jnp.where(ignored, 0, jnp.where(label == INVALID, jnp.nan, x))


def _nll_from_maximum(
    z: jax.Array,
    label: jax.Array,
    ignored: jax.Array,
    label_logit: jax.Array,
    classes: ClassAxis,
    sum_of_others: SumOfOthers,
) -> tuple[jax.Array, Normalizer]:
    """`r` from the sum over the other classes: the label is a guess at the maximum.

    If it holds the maximum, that sum is `r`. If not, `r` is that sum less what the label lacks to one, and may lose
    digits when it is small; but then `m - z_y` is the loss, and `log1p(r)` is lost in it.
    """
    shift, others = _shift_and_others(z, label, ignored, classes, sum_of_others)
    others = classes.psum(others)
    others = jnp.where(others < 2.0**90, others, jnp.nan)  # a row with nan, whose sum of distances did not show it
    row = Normalizer(shift, jnp.where(ignored, 0, others + (jnp.exp(label_logit - shift) - 1)))
    return (shift - label_logit) + row.log_total, row


def _shift_and_others(
    z: jax.Array, label: jax.Array, ignored: jax.Array, classes: ClassAxis, sum_of_others: SumOfOthers
) -> tuple[jax.Array, jax.Array]:
    """The shift of each row, and this device's sum over the other classes.

    NVIDIA's compiler reads the logits once for both if one reduction computes them; a TPU's finds the maximum while it
    multiplies; on a CPU such a reduction is slow.
    """

    def in_two_passes(z: jax.Array, label: jax.Array, ignored: jax.Array) -> tuple[jax.Array, jax.Array]:
        shift = _of_valid(jnp.squeeze(shift_of(z, classes), classes.axis), label, ignored)
        return shift, sum_of_others(z, label, shift, classes)

    def in_one_pass(z: jax.Array, label: jax.Array, ignored: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest, others = largest_and_others(z, label, classes)
        return _of_valid(finite_or_nan(largest), label, ignored), others

    if may_be_split_by_xla(z):
        return in_two_passes(z, label, ignored)  # a reduction to two results would be gathered
    return lax.platform_dependent(z, label, ignored, cuda=in_one_pass, default=in_two_passes)


def _nll_for_value(
    z: jax.Array, label: jax.Array, ignored: jax.Array, label_logit: jax.Array, classes: ClassAxis
) -> tuple[jax.Array, Normalizer]:
    """The same, on one CPU with `m = z_y`, which needs no pass for the maximum: 0.8 times the time at 8192 x 1000.

    A loss above 62 nats shows as a sum above 2**90, and all rows are counted again from their maxima.
    """
    from_maximum = functools.partial(_nll_from_maximum, classes=classes, sum_of_others=_sum_of_others)
    if may_be_split_by_xla(z) or not jax.typeof(z).sharding.mesh.empty:
        # Whether to count again would be one more number to cross the mesh.
        return from_maximum(z, label, ignored, label_logit)

    def from_label(
        z: jax.Array, label: jax.Array, ignored: jax.Array, label_logit: jax.Array
    ) -> tuple[jax.Array, Normalizer]:
        others = _sum_of_others_in_groups(z, label, label_logit, classes)
        row = Normalizer(label_logit, jnp.where(ignored, 0, others))
        once = (label_logit - label_logit) + row.log_total, row  # nan for a label at infinity
        # Of `others` anew: a sum of `rest`, which the loss needs too, would have to wait for it.
        too_large = ~(jnp.sum(jnp.where(ignored | (label == INVALID), 0, others)) < 2.0**90)

        def again(_: Any) -> Any:
            return jnp.zeros_like(too_large), from_maximum(z, label, ignored, label_logit)

        # A loop of one step or none: `vmap` would turn `cond` into both of its branches.
        return lax.while_loop(lambda state: state[0], again, (too_large, once))[1]

    return lax.platform_dependent(z, label, ignored, label_logit, cpu=from_label, default=from_maximum)


# ----------------------------------------------------------------------------------------------------------------------
# The sum of `exp(z_k - m)` over the classes that an array holds, without the label

# From this many classes on the label is left out of its own group of classes only. Heuristic: that costs the same at
# 2048 classes, 1.1 times as much at 1000, and 0.7 to 0.9 times as much at 4096. Beyond `FUSED_CLASSES` the CPU back end
# writes the exponentials of a row sum out (512 x 65536: 80 ms, in groups 10).
GROUPED_CLASSES = 2**12
FUSED_CLASSES = 2**15


def _sum_for_gradient(z: jax.Array, label: jax.Array, shift: jax.Array, classes: ClassAxis) -> jax.Array:
    label, shift = (jnp.expand_dims(x, classes.axis) for x in (label, shift))
    return row_sum(_other_exponentials(z, label, shift, classes), classes.axis, keepdims=False)


def _other_exponentials(z: jax.Array, labels: jax.Array, shift: jax.Array, classes: ClassAxis) -> jax.Array:
    """`exp(z_k - m)`, and 0 at the label; undefined in ignored rows."""
    # A column that depends on the row: a scan would keep a constant block of -inf, as large as the logits.
    nothing = jnp.minimum(shift, -jnp.inf)
    return jnp.exp(jnp.where(classes.is_class(labels, z), nothing, z - shift))


def _sum_of_others(z: jax.Array, label: jax.Array, shift: jax.Array, classes: ClassAxis) -> jax.Array:
    """The same where no gradient needs the exponentials; above 2**90 or nan if one of them is nan.

    The CPU back end fuses arithmetic into a row sum, but not a comparison (8192 x 1000: twice the time). The distance
    between two classes, scaled by a power of two so that it stays exact, is 0 or at least 2**100.
    """
    scale = 2.0**100
    label = (label - classes.offset(z)).astype(z.dtype) * scale
    label, shift = (jnp.expand_dims(x, classes.axis) for x in (label, shift))
    distances = jnp.abs(classes.local_indices(z, z.dtype) * scale - label)
    return jnp.sum(jnp.minimum(distances, jnp.exp(z - shift)), axis=classes.axis)


def _sum_of_others_in_groups(z: jax.Array, label: jax.Array, shift: jax.Array, classes: ClassAxis) -> jax.Array:
    """The same for many classes: the plain sums of groups of classes, and of the label's group without the label."""
    count = z.shape[classes.axis]
    if classes.axis != -1 or not isinstance(count, int) or count < GROUPED_CLASSES:  # or a symbol of `jax.export`
        return _sum_of_others(z, label, shift, classes)
    size = min((n for n in range(16, 2**12) if count % n == 0), key=lambda n: max(n, 2**16 // n), default=count)
    if size < count:
        groups = z.reshape(*z.shape[:-1], count // size, size)
        own = jnp.clip(label, 0, count - 1) // size
        group = jnp.take_along_axis(groups, own[..., None, None], axis=-2, mode="promise_in_bounds")[..., 0, :]
        sums = jnp.sum(jnp.exp(groups - shift[..., None, None]), axis=-1)
        elsewhere = jnp.sum(jnp.where(classes.local_indices(sums) == own[..., None], 0, sums), axis=-1)
        return elsewhere + _sum_for_gradient(group, label - own * size, shift, classes)
    if count > FUSED_CLASSES:  # a prime number of classes, say
        half = count // 2
        sum_of = functools.partial(_sum_of_others_in_groups, shift=shift, classes=classes)
        return sum_of(z[..., :half], label) + sum_of(z[..., half:], jnp.where(label < half, INVALID, label - half))
    return _sum_of_others(z, label, shift, classes)


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


def label_gradient(
    z: jax.Array, labels: jax.Array, ignored: jax.Array, nll: jax.Array, row: Normalizer, classes: ClassAxis
) -> jax.Array:
    """`softmax(z) - onehot(y)`, with `-(1 - p_y) = expm1(-nll)` at the label; 0 in ignored rows, whatever they hold."""
    # In ignored rows `nll` is 0. One comparison: with `is_class(labels, z) | ignored` the CPU back end no longer
    # vectorises, and in `_other_exponentials` it would cost 1.3 times the time at 16384 x 100.
    reach = jnp.where(ignored, 2**30, 0)
    at_label = jnp.abs(classes.local_indices(z) - (labels - classes.offset(z))) <= reach
    return jnp.where(at_label, safe.expm1(-nll), _other_probabilities(z, labels, ignored, row, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _other_probabilities(
    z: jax.Array, labels: jax.Array, ignored: jax.Array, row: Normalizer, classes: ClassAxis
) -> jax.Array:
    """`probabilities`, and 0 at the label; undefined in ignored rows, where its derivative is finite."""
    return _other_exponentials(z, labels, row.shift, classes) / row.total


@_other_probabilities.defjvp
def _other_probabilities_jvp(classes, primals, tangents):
    (z, labels, ignored, row), (dz, _, _, _) = primals, tangents
    z_kept, dz = jnp.where(ignored, 0, z), jnp.where(ignored, 0, dz)
    _, d_log_p = log_probabilities_jvp(classes, (z_kept, row), (dz, None))
    p = _other_probabilities(z, labels, ignored, row, classes)
    return p, p * d_log_p


@label_loss.defjvp
def _label_loss_jvp(classes, for_gradient, primals, tangents):
    (z, labels, ignored), (dz, _, _) = primals, tangents
    nll, row = label_loss(z, labels, ignored, classes, True)
    d_nll = classes.sum(label_gradient(z, labels, ignored, nll, row, classes) * dz)
    exponentials = jnp.exp(jnp.where(ignored, -jnp.inf, z - row.shift))
    return (nll, row), (d_nll, Normalizer(jnp.zeros_like(row.shift), classes.sum(exponentials * dz)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def label_log_prob(log_p: jax.Array, labels: jax.Array, ignored: jax.Array, classes: ClassAxis) -> jax.Array:
    """`log_p` at the label; 0 in ignored rows; nan, as is the whole row of the gradient, for an invalid label."""
    return _of_valid(classes.take(log_p, labels), labels, ignored)


@label_log_prob.defjvp
def _label_log_prob_jvp(classes, primals, tangents):
    (log_p, labels, ignored), (d_log_p, _, _) = primals, tangents
    # A comparison that never holds: without an operand of its shape XLA would give every device the whole gradient.
    invalid = (labels == INVALID) & ~ignored
    chosen = (classes.is_class(labels, log_p) & ~ignored) | (log_p > jnp.inf) | invalid
    # A choice, not a product with 0 and 1: a cotangent that is not finite stays with the label.
    share = jnp.where(chosen, jnp.where(invalid, jnp.nan, 1).astype(log_p.dtype) * d_log_p, 0)
    return label_log_prob(log_p, labels, ignored, classes), classes.sum(share)
