"""The loss of a row with a label, in one pass: the label's gap to the maximum, and the sum over the other classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._math import safe
from jaxent._math.blocked_sums import in_row_blocks, takes_blocks
from jaxent._math.one_pass import largest_and_others
from jaxent._math.softmax import Normalizer, finite_or_nan, less_mean
from jaxent._mesh.class_axis import ClassAxis, row_sum
from jaxent._mesh.types import may_be_split_by_xla, pcast_like

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def label_loss(
    z: jax.Array, labels: jax.Array, ignored: jax.Array, classes: ClassAxis, for_gradient: bool = False
) -> tuple[jax.Array, Normalizer]:
    """`-log p_y` of each row, `(m - z_y) + log1p(r)`, with the row's `m` and `r`; both 0 in ignored rows.

    Shift first: `logsumexp(z) - z_y` at logits near 1e4 is 2.40723 where 2.40761 is due. `r` comes from the sum over
    the other classes: the label is a guess at the maximum. If it holds the maximum, that sum is `r`. If not, `r` is
    that sum minus `1 - exp(z_y - m)`, and may lose digits when it is small; but then the loss is `m - z_y`, against
    which `log1p(r)` is negligible. With `for_gradient` the gradient can share the exponentials.
    """
    # Row quantities go without the class axis: the CPU back end takes twice as long over (65536, 1) as over (65536,).
    rows = labels, ignored, classes.take(z, labels)
    label, ignored, label_logit = (jnp.squeeze(x, classes.axis) for x in rows)
    label_logit = jnp.where(label == INVALID, jnp.nan, label_logit)
    shift, others = _shift_and_others(z, label, ignored, classes, for_gradient)
    rest = classes.psum(others) + (jnp.exp(label_logit - shift) - 1)
    loss, rest = (jnp.where(ignored, 0, x) for x in ((shift - label_logit) + jnp.log1p(rest), rest))
    if not for_gradient:
        shift = jnp.where(ignored, 0, shift)
    loss, shift, rest = (jnp.expand_dims(x, classes.axis) for x in (loss, shift, rest))
    return loss, Normalizer(shift, rest)


# ----------------------------------------------------------------------------------------------------------------------
# The shift, and the sum of `exp(z_k - m)` over the classes that an array holds, without the label


def _shift_and_others(
    z: jax.Array, label: jax.Array, ignored: jax.Array, classes: ClassAxis, for_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """The maximum of each row, and this device's sum over the other classes.

    NVIDIA's compiler reads the logits once for both if one reduction computes them; a TPU's finds the maximum while it
    multiplies; on a CPU such a reduction is slow.
    """

    def in_two_passes(z: jax.Array, label: jax.Array, ignored: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A row without a softmax becomes nan by itself: its maximum is infinite, or one of the exponentials is nan.
        shift = jnp.squeeze(classes.max(z), classes.axis)
        if for_gradient:
            # Chosen before the sum: what is done once per row afterwards, XLA would repeat for each logit.
            shift = jnp.where(ignored, 0, shift)
            return shift, _sum_of_others(z, label, shift, ignored, classes)
        if takes_blocks(z, classes.axis):
            # Ignored rows are chosen afterwards: one array less is cut into blocks.
            row_sums = functools.partial(_sum_of_others, classes=classes, ignored=jnp.zeros((), bool))
            return shift, in_row_blocks(row_sums, z, label, shift)
        return shift, _fused_sum_of_others(z, label, shift, classes)

    def in_one_pass(z: jax.Array, label: jax.Array, ignored: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest, others = largest_and_others(z, label, classes)
        return jnp.where(ignored, 0, finite_or_nan(largest)), others

    if may_be_split_by_xla(z):
        return in_two_passes(z, label, ignored)  # a reduction to two results would be gathered
    return lax.platform_dependent(z, label, ignored, cuda=in_one_pass, default=in_two_passes)


def _at_label(z: jax.Array, labels: jax.Array, ignored: jax.Array, classes: ClassAxis) -> jax.Array:
    """Where the label is, and all of an ignored row.

    By the distance from the label: XLA's CPU back end counts classes in 64 bits, and LLVM compares them in 64 bits if
    it can, as with a constant reach, which doubles the time of the exponentials around it. One comparison: with
    `| ignored` it no longer vectorises.
    """
    reach = jnp.where(ignored, 2**30, labels >> 31)  # 0, and -1 for `INVALID`
    return jnp.abs(classes.local_indices(z) - (labels - classes.offset(z))) <= reach


def _other_exponentials(
    z: jax.Array, labels: jax.Array, ignored: jax.Array, shift: jax.Array, classes: ClassAxis
) -> jax.Array:
    """`exp(z_k - m)`, and 0 at the label and in ignored rows."""
    # A column that depends on the row: a scan would keep a constant block of -inf, as large as the logits.
    nothing = jnp.minimum(shift, -jnp.inf)
    return jnp.exp(jnp.where(_at_label(z, labels, ignored, classes), nothing, z - shift))


def _sum_of_others(
    z: jax.Array, label: jax.Array, shift: jax.Array, ignored: jax.Array, classes: ClassAxis
) -> jax.Array:
    label, shift, ignored = (jnp.expand_dims(x, classes.axis) for x in (label, shift, ignored))
    return row_sum(_other_exponentials(z, label, ignored, shift, classes), classes.axis, keepdims=False)


def _fused_sum_of_others(z: jax.Array, label: jax.Array, shift: jax.Array, classes: ClassAxis) -> jax.Array:
    """The same without a comparison, which the CPU back end does not fuse into a row sum as it does arithmetic.

    `exp(z_k - m) <= 1 <= |k - y|` for every class but the label, whose own distance is 0: up to 2^24 classes.
    """
    label = (label - classes.offset(z)).astype(z.dtype)
    label, shift = (jnp.expand_dims(x, classes.axis) for x in (label, shift))
    distances = jnp.abs(classes.local_indices(z, z.dtype) - label)
    return row_sum(jnp.minimum(distances, jnp.exp(z - shift)), classes.axis, keepdims=False)


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


def label_loss_and_gradient(
    z: jax.Array, labels: jax.Array, ignored: jax.Array, classes: ClassAxis, materialized: bool = False
) -> tuple[jax.Array, Normalizer, jax.Array]:
    """`label_loss` and its gradient `softmax(z) - onehot(y)`, with `-(1 - p_y) = expm1(-nll)` at the label; 0 in
    ignored rows, whatever they hold. `materialized`: labels and `ignored` are behind a barrier already.
    """
    # Without the barrier XLA would recompute per logit what is known once per row. Behind a second one it would not see
    # that the derivative of the loss needs the same exponentials.
    if not materialized:
        labels, ignored = lax.optimization_barrier((labels, ignored))
    nll, row = label_loss(z, labels, ignored, classes, True)
    # Cast before they are spread over the classes, so that their cotangents cross the mesh as one number per row.
    own, label_probability = (pcast_like(x, [z]) for x in (safe.expm1(-nll), jnp.exp(-nll)))
    others = _other_probabilities(z, labels, ignored, row, label_probability, classes)
    # In ignored rows `nll` and so `own` is 0.
    return nll, row, jnp.where(_at_label(z, labels, ignored, classes), own, others)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _other_probabilities(
    z: jax.Array,
    labels: jax.Array,
    ignored: jax.Array,
    row: Normalizer,
    label_probability: jax.Array,
    classes: ClassAxis,
) -> jax.Array:
    """`probabilities`, and 0 at the label and in ignored rows."""
    del label_probability  # of which the derivative is made
    return _other_exponentials(z, labels, ignored, row.shift, classes) / row.total


@_other_probabilities.defjvp
def _other_probabilities_jvp(classes, primals, tangents):
    (z, labels, ignored, _, label_probability), (dz, *_) = primals, tangents
    others = _other_probabilities(*primals, classes)
    # Made of `others`: a CPU would write the exponentials of all classes as one more array as large as the logits.
    p = jnp.where(_at_label(z, labels, ignored, classes), label_probability, others)
    return others, others * less_mean(jnp.where(ignored, 0, dz), p, classes)


@label_loss.defjvp
def _label_loss_jvp(classes, for_gradient, primals, tangents):
    (z, labels, ignored), (dz, _, _) = primals, tangents
    nll, row, gradient = label_loss_and_gradient(z, labels, ignored, classes, for_gradient)
    d_nll = classes.sum(gradient * dz)
    exponentials = jnp.exp(jnp.where(ignored, -jnp.inf, z - row.shift))
    return (nll, row), (d_nll, Normalizer(jnp.zeros_like(row.shift), classes.sum(exponentials * dz)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def label_log_prob(log_p: jax.Array, labels: jax.Array, ignored: jax.Array, classes: ClassAxis) -> jax.Array:
    """`log_p` at the label; 0 in ignored rows; nan, as is the whole row of the gradient, for an invalid label."""
    return jnp.where(ignored, 0, jnp.where(labels == INVALID, jnp.nan, classes.take(log_p, labels)))


@label_log_prob.defjvp
def _label_log_prob_jvp(classes, primals, tangents):
    (log_p, labels, ignored), (d_log_p, _, _) = primals, tangents
    # A comparison that never holds: without an operand of its shape XLA would give every device the whole gradient.
    invalid = (labels == INVALID) & ~ignored
    chosen = (classes.is_class(labels, log_p) & ~ignored) | (log_p > jnp.inf) | invalid
    # A choice, not a product with 0 and 1: a cotangent that is not finite stays with the label.
    share = jnp.where(chosen, jnp.where(invalid, jnp.nan, 1).astype(log_p.dtype) * d_log_p, 0)
    return label_log_prob(log_p, labels, ignored, classes), classes.sum(share)
