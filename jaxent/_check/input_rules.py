"""What can be wrong with the inputs of a loss over classes, from the same lines with NumPy and with `jax.numpy`.

A `RuleMatch` says in which rows, and what to say of the first one.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.targets import SoftmaxArguments, SparseTargets, rows_shape
from jaxent._check.rule_match import Counted, RuleMatch, not_finite, row_weights
from jaxent._math.label_loss import INVALID, encode_labels, has_label

# Heuristics: how unlikely it must be that uniform logits look like probabilities, for those to be reported; by how much
# typed or rounded probabilities may miss the sum of one; by how much targets may; how many tenths of the rows must be
# ignored to be mentioned (masked language models leave out 85% on purpose); what no logit lies below, only a mask.
CHANCE = 1e-4
TYPED = 0.02
NORMALIZED = 1e-3
IGNORED_TENTHS = 9
MASK = -1e8
# The smallest number that becomes an infinite float16: half a unit above the largest, 65504.
FLOAT16_LIMIT = 65520.0


class Rows(Counted):
    """The arguments of one call of a loss over classes; batch axes are one.

    `inputs` are logits or log-probabilities `(rows, classes)`, or hidden states `(rows, features)`.
    """

    def __init__(
        self,
        xp: Any,
        inputs: jax.Array,
        axis: int,
        count: int,
        arguments: SoftmaxArguments,
        ignore_index: int | None,
    ):
        self.xp, self.count, self.arguments = xp, count, arguments
        self.epsilon = float(jnp.finfo(inputs.dtype).eps)
        self.inputs = self._last(inputs, axis)
        targets: Any = arguments.targets
        self.sparse_classes = None
        if isinstance(targets, SparseTargets):
            self.sparse_classes, targets = self._sparse(targets, ignore_index)
        by_label = jnp.issubdtype(targets.dtype, jnp.integer)
        self.labels: Any = xp.asarray(targets).reshape(-1) if by_label else None
        self.classes: Any = xp.asarray(encode_labels(targets, count)).reshape(-1) if by_label else None
        # For sparse targets, those of the few classes.
        self.probabilities: Any = None if by_label else self._last(targets, axis if self.sparse_classes is None else -1)
        self.target_epsilon = 0.0 if by_label else float(jnp.finfo(targets.dtype).eps)
        self.weights = None if arguments.weights is None else xp.asarray(arguments.weights).reshape(-1)
        self.class_weights = None if arguments.class_weights is None else xp.asarray(arguments.class_weights)
        counted = xp.ones(self.inputs.shape[0], bool)
        if by_label:
            counted = ~xp.asarray(has_label(targets, ignore_index)).reshape(-1)
        if isinstance(arguments.targets, SparseTargets):
            ignored = xp.asarray(has_label(jnp.asarray(arguments.targets.classes), ignore_index))
            counted = ~xp.all(ignored.reshape(counted.shape[0], -1), axis=-1)
        if arguments.where is not None:
            counted = counted & xp.asarray(arguments.where).reshape(-1)
        super().__init__(xp, counted if self.weights is None else counted & (self.weights != 0))

    def _last(self, x: jax.Array, axis: int) -> Any:
        rows = math.prod(rows_shape(x.shape, axis))
        wide = self.xp.asarray(x).astype(arrays.accumulation_dtype(x))
        return self.xp.moveaxis(wide, axis, -1).reshape(rows, x.shape[axis])

    def _sparse(self, targets: SparseTargets, ignore_index: int | None) -> tuple[Any, jax.Array]:
        """The classes as `(rows, k)`, and the probabilities, which are 0 for entries that are ignored."""
        classes, probabilities = jnp.asarray(targets.classes), jnp.asarray(targets.probabilities)
        ignored = has_label(classes, ignore_index)
        encoded = jnp.where(ignored, 0, encode_labels(classes, self.count))
        return self.xp.asarray(encoded).reshape(-1, classes.shape[-1]), jnp.where(ignored, 0, probabilities)

    @functools.cached_property
    def shares(self) -> Any:
        """`(rows, classes)`: the target probabilities; those of sparse targets spread out."""
        if self.sparse_classes is None:
            return self.probabilities
        classes = self.xp.arange(self.count, dtype=np.int32)[None, :]
        return sum(
            self.xp.where(classes == self.sparse_classes[:, i, None], self.probabilities[:, i, None], 0)
            for i in range(self.sparse_classes.shape[1])
        )

    @functools.cached_property
    def target_classes(self) -> Any:
        """`(rows, classes)`: the target counts on this class."""
        if self.probabilities is not None:
            return self.shares > 0
        return self.xp.arange(self.count, dtype=np.int32)[None, :] == self.classes[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def rule_matches(r: Rows, inputs: str) -> Iterator[RuleMatch]:
    """Everything that `diagnose` names, in its order, for `inputs` of "logits", "log_probs" or "hidden" states.

    For the probabilities of a "score" only what concerns the targets and the weights.
    """
    if inputs == "logits":
        yield probabilities_as_logits(r, r.inputs, r.epsilon)
    if inputs == "log_probs":
        yield _not_log_probabilities(r)
    if r.labels is not None:
        yield from _labels(r)
    if r.sparse_classes is not None:
        yield _sparse_classes(r)
    if inputs == "hidden":
        yield not_finite(r, r.inputs, ~r.xp.isfinite(r.inputs), "hidden states")
    elif inputs != "score":
        yield from _logits(r, "logits" if inputs == "logits" else "log-probabilities")
    if r.probabilities is not None:
        yield from _probabilities(r)
    yield from _weights(r)
    if inputs == "logits":
        yield from _ranges(r)
    yield _ignored_rows(r)


def probabilities_as_logits(r: Counted, z: Any, epsilon: float) -> RuleMatch:
    xp, count = r.xp, z.shape[-1]
    rows = r.counted & xp.all(xp.isfinite(z), axis=-1)
    total = xp.sum(z, axis=-1)
    off = xp.max(xp.where(rows, xp.abs(total - 1), 0), initial=0)
    inside = xp.all(xp.all((z >= 0) & (z <= 1), axis=-1) | ~rows)
    # The chance of N rows of C uniforms, whose sum has the density 1 / (C-1)! at one (Irwin 1927, Hall 1927).
    log_chance = xp.sum(rows, dtype=z.dtype) * (xp.log(2 * xp.maximum(off, epsilon)) - math.lgamma(count))
    said = inside & (off <= TYPED) & (log_chance < math.log(CHANCE)) & (count > 1)
    return r.match(
        "probabilities_as_logits",
        "probabilities passed as logits",
        rows & said,
        "they sum to {mass:.4g}",
        "The loss takes the softmax, here for the second time: pass what went into the first one, or the log of the "
        "probabilities; or call nll_loss(log(p), labels) or cross_entropy(targets, p).",
        {"mass": total},
    )


def _not_log_probabilities(r: Rows) -> RuleMatch:
    """Rounded to `eps`, a log-probability of -h makes a relative error of `h eps` in its probability."""
    xp, log_p = r.xp, r.inputs
    p = xp.exp(xp.minimum(log_p, 80))
    total = xp.sum(p, axis=-1)
    rounding = xp.sum(xp.where(xp.isfinite(log_p), p * xp.abs(log_p), 0), axis=-1)
    bad = xp.abs(total - 1) > xp.maximum(NORMALIZED, 4 * r.epsilon * (1 + rounding))
    return r.match(
        "not_log_probabilities",
        "rows that are not log-probabilities",
        r.counted & bad & ~xp.any(xp.isnan(log_p), axis=-1),
        "their exponentials sum to {mass:.4g}",
        "This loss takes no softmax: pass log_softmax of logits, or the log of probabilities; or call "
        "softmax_cross_entropy(logits, labels).",
        {"mass": total},
    )


def _labels(r: Rows) -> Iterator[RuleMatch]:
    xp, labels, on = r.xp, r.labels, r.counted
    invalid = on & (r.classes == INVALID)
    fits = r.count <= jnp.iinfo(labels.dtype).max
    just_above = labels == np.array(r.count, labels.dtype) if fits else xp.zeros_like(invalid)
    one_based = xp.all(just_above | ~invalid) & xp.all((labels > 0) | ~on)
    example = f"label {{label}} of classes 0 to {r.count - 1}"
    yield r.match(
        "labels_out_of_range",
        "labels out of range",
        invalid & ~one_based,
        example,
        "The loss is nan there: pass it as `ignore_index` if it marks padding, else see how the labels are made.",
        {"label": labels},
    )
    yield r.match(
        "labels_one_based",
        "labels out of range, which seem to count from 1",
        invalid & one_based,
        example,
        "The loss is nan there, and every other label names the wrong class: subtract 1.",
        {"label": labels},
    )


def _sparse_classes(r: Rows) -> RuleMatch:
    invalid = r.sparse_classes == INVALID
    return r.match(
        "labels_out_of_range",
        "classes of sparse targets out of range",
        r.counted & r.xp.any(invalid, axis=-1),
        f"entry {{at}}, where classes are 0 to {r.count - 1}",
        "The loss is nan there: pass the class as `ignore_index` if it marks padding, else see how they are made.",
        {"at": r.xp.argmax(invalid, axis=-1)},
    )


def _logits(r: Rows, what: str) -> Iterator[RuleMatch]:
    xp, z = r.xp, r.inputs
    top, removed = xp.max(z, axis=-1), xp.isneginf(z)
    yield not_finite(r, z, xp.isnan(z) | xp.isposinf(z), what)
    same = (top == xp.min(z, axis=-1)) & (top <= MASK) & (r.count > 1)
    yield r.match(
        "fully_masked",
        "rows in which every class is masked",
        r.counted & (xp.isneginf(top) | same),
        "all {top}",
        "Such a row has no softmax (a uniform one, if the mask is finite): drop it with `where`.",
        {"top": top},
    )
    asked = r.target_classes
    if r.arguments.smoothing is not None:
        asked = asked | (r.arguments.smoothing > 0)
    if r.class_weights is not None:
        asked = asked & (r.class_weights != 0)[None, :]
    asked = asked & removed & ~xp.isneginf(top)[:, None]
    yield r.match(
        "infinite_loss",
        f"{what} of -inf in a class that the target counts on",
        r.counted & xp.any(asked, axis=-1),
        "class {at}",
        "The loss is +inf there: mask no class that can be right, and do not smooth over masked ones.",
        {"at": xp.argmax(asked, axis=-1)},
    )


def _probabilities(r: Rows) -> Iterator[RuleMatch]:
    xp, t = r.xp, r.probabilities
    bad, total = ~(t >= 0), xp.sum(t, axis=-1)
    yield r.match(
        "negative_targets",
        "target probabilities that are negative or nan",
        r.counted & xp.any(bad, axis=-1),
        "{value:.4g} at {at}",
        "Targets are probabilities: take the softmax of a teacher's logits.",
        r.first(bad, t),
    )
    allowed = max(NORMALIZED, 4 * r.target_epsilon)
    yield r.match(
        "not_normalized",
        "target probabilities that do not sum to one",
        r.counted & ~xp.any(bad, axis=-1) & ~(xp.abs(total - 1) <= allowed),
        "they sum to {mass:.4g}",
        "The loss does not divide by the sum, and its gradient is not softmax(z) - t: normalise first. For several "
        "classes that are each right or wrong, or a mask, use sigmoid_cross_entropy.",
        {"mass": total},
    )


def _weights(r: Rows) -> Iterator[RuleMatch]:
    xp = r.xp
    if r.weights is not None:
        yield from row_weights(r, r.weights)
    if r.class_weights is None:
        return
    c = r.class_weights[None, :]
    for kind, what, wrong, say in (
        (
            "bad_weights",
            "class weights that are negative or nan",
            ~(c >= 0),
            "A negative weight rewards mistakes, and one of nan makes the loss nan: class weights must be >= 0.",
        ),
        (
            "zero_class_weights",
            "class weights of zero for classes in use",
            c == 0,
            "Such a class is never learnt: give it a weight, or drop its rows with `where` if that is meant.",
        ),
    ):
        used = r.target_classes & wrong
        at = xp.argmax(used, axis=-1)
        yield r.match(kind, what, r.counted & xp.any(used, axis=-1), "class {at}", say, {"at": at})


def _ranges(r: Rows) -> Iterator[RuleMatch]:
    xp, z = r.xp, r.inputs
    top, asked, removed = xp.max(z, axis=-1), r.target_classes, xp.isneginf(z)
    usable = r.counted & xp.isfinite(top) & ~xp.any(xp.isnan(z), axis=-1)
    if r.classes is not None:
        usable = usable & (r.classes != INVALID)
    lowest = xp.min(xp.where(asked & ~removed, z, top[:, None]), axis=-1)
    decisive = xp.where(xp.abs(top) >= FLOAT16_LIMIT, top, lowest)
    yield r.match(
        "float16_overflow",
        "logits that float16 cannot hold",
        usable & (xp.abs(decisive) >= FLOAT16_LIMIT) & (top > MASK),
        "{value:.4g}, the largest float16 is 65504",
        "Keep them in float32 or bfloat16; logits of this size come from a missing scale or norm.",
        {"value": decisive},
    )
    log_total = xp.log(xp.sum(xp.exp(z - top[:, None]), axis=-1))
    shares = asked.astype(z.dtype) if r.probabilities is None else r.shares
    usual = xp.sum(xp.where(asked, shares * ((z - top[:, None]) - log_total[:, None]), 0), axis=-1)
    others = ~asked & (z > MASK)
    loss = xp.log1p(xp.sum(xp.where(others, xp.exp(z - lowest[:, None]), 0), axis=-1))
    # A loss that underflows is 0 by any formula; numbers below `tiny` are flushed to 0 by some back ends.
    rounded = (usual == 0) & (loss >= jnp.finfo(z.dtype).tiny)
    plain = True
    for option in (r.arguments.smoothing, r.arguments.z_loss):
        plain = plain if option is None else plain & (r.xp.asarray(option) == 0)
    yield r.match(
        "collapsed_loss",
        "losses that round to 0, although they are not",
        usable & rounded & xp.all((usable & (usual == 0) & xp.any(others, axis=-1)) | ~r.counted) & plain,
        "the loss is {loss:.1e}, and 0 as logsumexp(z) - z[y]",
        "With that formula nothing is learnt from any row; the losses of jaxent keep value and gradient. Smaller "
        "logits (weight decay, a soft cap, label smoothing) keep both for any loss.",
        {"loss": loss},
    )


def _ignored_rows(r: Rows) -> RuleMatch:
    xp, rows = r.xp, r.counted.shape[0]
    ignored = rows - xp.sum(r.counted)
    match = r.match(
        "ignored_rows",
        "rows that do not count",
        ~r.counted & (10 * ignored >= IGNORED_TENTHS * rows),
        "label {label}" if r.labels is not None else "by `where` or weight 0",
        "Little or nothing is learnt: look at `ignore_index`, `where` and `weights`, or pack the rows more densely.",
        {} if r.labels is None else {"label": r.labels},
    )
    return match._replace(total=rows)
