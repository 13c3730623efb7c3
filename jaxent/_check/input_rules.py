"""What can be wrong with the inputs of a loss over classes, from the same lines with NumPy and with `jax.numpy`.

A `RuleMatch` says in which rows, and what to say of the first one.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.targets import SoftmaxArguments, rows_shape
from jaxent._math.label_loss import INVALID, encode_labels, has_label

# Heuristics: how seldom uniform logits may look like probabilities before it is said that they are some; by how much
# typed or rounded ones miss the sum of one; by how much targets may; how many tenths of the rows are worth a word when
# they do not count (masked language models leave out 85% on purpose); below what no logit lies, only a mask.
CHANCE = 1e-4
TYPED = 0.02
NORMALIZED = 1e-3
IGNORED_TENTHS = 9
MASK = -1e8
# The least number that becomes an infinite float16: half a unit above the largest, 65504.
FLOAT16_LIMIT = 65520.0


class RuleMatch(NamedTuple):
    """Rows in which something is wrong; `example` is a format for the `values` of the first of them."""

    kind: str
    what: str
    rows: Any
    total: Any
    example: str
    values: dict[str, Any]
    advice: str


class Rows:
    """The arguments of one call as arrays of `xp`, which is `numpy` or `jax.numpy`; batch axes are one.

    `inputs` are logits `(rows, classes)`, or the hidden states `(rows, features)` of a linear loss.
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
        by_label = jnp.issubdtype(targets.dtype, jnp.integer)
        self.labels: Any = xp.asarray(targets).reshape(-1) if by_label else None
        self.classes: Any = xp.asarray(encode_labels(targets, count)).reshape(-1) if by_label else None
        self.probabilities: Any = None if by_label else self._last(targets, axis)
        self.target_epsilon = 0.0 if by_label else float(jnp.finfo(targets.dtype).eps)
        self.weights = None if arguments.weights is None else xp.asarray(arguments.weights).reshape(-1)
        self.class_weights = None if arguments.class_weights is None else xp.asarray(arguments.class_weights)
        self.counted = xp.ones(self.inputs.shape[0], bool)
        if by_label:
            self.counted = ~xp.asarray(has_label(targets, ignore_index)).reshape(-1)
        if arguments.where is not None:
            self.counted = self.counted & xp.asarray(arguments.where).reshape(-1)
        if self.weights is not None:
            self.counted = self.counted & (self.weights != 0)

    def _last(self, x: jax.Array, axis: int) -> Any:
        rows = math.prod(rows_shape(x.shape, axis))
        wide = self.xp.asarray(x).astype(arrays.accumulation_dtype(x))
        return self.xp.moveaxis(wide, axis, -1).reshape(rows, x.shape[axis])

    def suspect(
        self, kind: str, what: str, rows: Any, example: str, advice: str, values: dict[str, Any] | None = None
    ) -> RuleMatch:
        return RuleMatch(kind, what, rows, self.xp.sum(self.counted), example, values or {}, advice)

    def at(self, x: Any, index: Any) -> Any:
        """One entry of each row."""
        return self.xp.take_along_axis(x, index[:, None], axis=-1)[:, 0]

    @functools.cached_property
    def target_classes(self) -> Any:
        """`(rows, classes)`: the target counts on this class."""
        if self.probabilities is not None:
            return self.probabilities > 0
        return self.xp.arange(self.count, dtype=np.int32)[None, :] == self.classes[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong


def suspicions(r: Rows, linear: bool) -> Iterator[RuleMatch]:
    """Everything that `diagnose` names, in its order; a linear loss has no logits to look at."""
    if not linear:
        yield _probabilities_as_logits(r)
    if r.labels is not None:
        yield from _labels(r)
    if linear:
        yield _not_finite(r, ~r.xp.isfinite(r.inputs), "hidden states")
    else:
        yield from _logits(r)
    if r.probabilities is not None:
        yield from _probabilities(r)
    yield from _weights(r)
    if not linear:
        yield from _ranges(r)
    yield _ignored_rows(r)


def _probabilities_as_logits(r: Rows) -> RuleMatch:
    xp, z = r.xp, r.inputs
    rows = r.counted & xp.all(xp.isfinite(z), axis=-1)
    total = xp.sum(z, axis=-1)
    off = xp.max(xp.where(rows, xp.abs(total - 1), 0), initial=0)
    inside = xp.all(xp.all((z >= 0) & (z <= 1), axis=-1) | ~rows)
    # The chance of N rows of C uniforms, whose sum has the density 1 / (C-1)! at one (Irwin 1927, Hall 1927).
    log_chance = xp.sum(rows, dtype=z.dtype) * (xp.log(2 * xp.maximum(off, r.epsilon)) - math.lgamma(r.count))
    said = inside & (off <= TYPED) & (log_chance < math.log(CHANCE)) & (r.count > 1)
    return r.suspect(
        "probabilities_as_logits",
        "probabilities passed as logits",
        rows & said,
        "they sum to {mass:.4g}",
        "The loss takes the softmax, here for the second time: pass what went into the first one, or the log of the "
        "probabilities; or call nll_loss(log(p), labels) or cross_entropy(targets, p).",
        {"mass": total},
    )


def _labels(r: Rows) -> Iterator[RuleMatch]:
    xp, labels, on = r.xp, r.labels, r.counted
    invalid = on & (r.classes == INVALID)
    fits = r.count <= jnp.iinfo(labels.dtype).max
    just_above = labels == np.array(r.count, labels.dtype) if fits else xp.zeros_like(invalid)
    one_based = xp.all(just_above | ~invalid) & xp.all((labels > 0) | ~on)
    example = f"label {{label}} of classes 0 to {r.count - 1}"
    yield r.suspect(
        "labels_out_of_range",
        "labels out of range",
        invalid & ~one_based,
        example,
        "The loss is nan there: pass it as `ignore_index` if it marks padding, else see how the labels are made.",
        {"label": labels},
    )
    yield r.suspect(
        "labels_one_based",
        "labels out of range, which seem to count from 1",
        invalid & one_based,
        example,
        "The loss is nan there, and every other label names the wrong class: subtract 1.",
        {"label": labels},
    )


def _not_finite(r: Rows, bad: Any, what: str) -> RuleMatch:
    at = r.xp.argmax(bad, axis=-1)
    return r.suspect(
        "not_finite",
        f"{what} with nan or inf",
        r.counted & r.xp.any(bad, axis=-1),
        "{value} at {at}",
        "Loss and gradient are nan there: look for where it starts (jax.debug_nans), or leave padding out by `where`.",
        {"value": r.at(r.inputs, at), "at": at},
    )


def _logits(r: Rows) -> Iterator[RuleMatch]:
    xp, z = r.xp, r.inputs
    top, removed = xp.max(z, axis=-1), xp.isneginf(z)
    yield _not_finite(r, xp.isnan(z) | xp.isposinf(z), "logits")
    same = (top == xp.min(z, axis=-1)) & (top <= MASK) & (r.count > 1)
    yield r.suspect(
        "fully_masked",
        "rows in which every class is masked",
        r.counted & (xp.isneginf(top) | same),
        "all {top}",
        "Such a row has no softmax (a uniform one, if the mask is finite): leave it out by `where`.",
        {"top": top},
    )
    asked = r.target_classes
    if r.arguments.smoothing is not None:
        asked = asked | (r.arguments.smoothing > 0)
    if r.class_weights is not None:
        asked = asked & (r.class_weights != 0)[None, :]
    asked = asked & removed & ~xp.isneginf(top)[:, None]
    yield r.suspect(
        "infinite_loss",
        "logits of -inf in a class that the target counts on",
        r.counted & xp.any(asked, axis=-1),
        "class {at}",
        "The loss is +inf there: mask no class that can be right, and do not smooth over masked ones.",
        {"at": xp.argmax(asked, axis=-1)},
    )


def _probabilities(r: Rows) -> Iterator[RuleMatch]:
    xp, t = r.xp, r.probabilities
    bad, total = ~(t >= 0), xp.sum(t, axis=-1)
    at = xp.argmax(bad, axis=-1)
    yield r.suspect(
        "negative_targets",
        "target probabilities that are negative or nan",
        r.counted & xp.any(bad, axis=-1),
        "{value:.4g} at {at}",
        "Targets are probabilities: take the softmax of a teacher's logits.",
        {"value": r.at(t, at), "at": at},
    )
    allowed = max(NORMALIZED, 4 * r.target_epsilon)
    yield r.suspect(
        "not_normalized",
        "target probabilities that do not sum to one",
        r.counted & ~xp.any(bad, axis=-1) & ~(xp.abs(total - 1) <= allowed),
        "they sum to {mass:.4g}",
        "The loss does not divide by the sum, and its gradient is not softmax(z) - t: divide before.",
        {"mass": total},
    )


def _weights(r: Rows) -> Iterator[RuleMatch]:
    xp = r.xp
    advice = "A negative weight rewards mistakes, and one of nan makes the loss nan: weights are >= 0."
    if r.weights is not None:
        bad = r.counted & xp.isnan(r.weights)
        yield r.suspect("bad_weights", "row weights that are negative or nan", bad, "not >= 0", advice)
    if r.class_weights is None:
        return
    c = r.class_weights[None, :]
    for kind, what, wrong, say in (
        ("bad_weights", "class weights that are negative or nan", ~(c >= 0), advice),
        (
            "zero_class_weights",
            "class weights of zero for classes in use",
            c == 0,
            "Such a class is never learnt: give it a weight, or leave its rows out by `where` if that is meant.",
        ),
    ):
        used = r.target_classes & wrong
        at = xp.argmax(used, axis=-1)
        yield r.suspect(kind, what, r.counted & xp.any(used, axis=-1), "class {at}", say, {"at": at})


def _ranges(r: Rows) -> Iterator[RuleMatch]:
    xp, z = r.xp, r.inputs
    top, asked, removed = xp.max(z, axis=-1), r.target_classes, xp.isneginf(z)
    usable = r.counted & xp.isfinite(top) & ~xp.any(xp.isnan(z), axis=-1)
    if r.classes is not None:
        usable = usable & (r.classes != INVALID)
    lowest = xp.min(xp.where(asked & ~removed, z, top[:, None]), axis=-1)
    decisive = xp.where(xp.abs(top) >= FLOAT16_LIMIT, top, lowest)
    yield r.suspect(
        "float16_overflow",
        "logits that float16 cannot hold",
        usable & (xp.abs(decisive) >= FLOAT16_LIMIT) & (top > MASK),
        "{value:.4g}, the largest float16 is 65504",
        "Keep them in float32 or bfloat16; logits of this size come from a missing scale or norm.",
        {"value": decisive},
    )
    log_total = xp.log(xp.sum(xp.exp(z - top[:, None]), axis=-1))
    shares = asked.astype(z.dtype) if r.probabilities is None else r.probabilities
    usual = xp.sum(xp.where(asked, shares * ((z - top[:, None]) - log_total[:, None]), 0), axis=-1)
    others = ~asked & (z > MASK)
    collapsed = usable & (usual == 0) & xp.any(others, axis=-1)
    plain = True
    for option in (r.arguments.smoothing, r.arguments.z_loss):
        plain = plain if option is None else plain & (r.xp.asarray(option) == 0)
    rest = xp.sum(xp.where(others, xp.exp(z - lowest[:, None]), 0), axis=-1)
    yield r.suspect(
        "collapsed_loss",
        "losses that round to 0, although they are not",
        collapsed & xp.all(collapsed | ~r.counted) & plain,
        "the loss is {loss:.1e}, and 0 as logsumexp(z) - z[y]",
        "With such a formula nothing is learnt from any row; the losses of jaxent keep value and gradient. Smaller "
        "logits (weight decay, a soft cap, label smoothing) keep both for everyone.",
        {"loss": xp.log1p(rest)},
    )


def _ignored_rows(r: Rows) -> RuleMatch:
    xp, rows = r.xp, r.counted.shape[0]
    ignored = rows - xp.sum(r.counted)
    suspicion = r.suspect(
        "ignored_rows",
        "rows that do not count",
        ~r.counted & (10 * ignored >= IGNORED_TENTHS * rows),
        "label {label}" if r.labels is not None else "by `where` or weight 0",
        "Little or nothing is learnt: look at `ignore_index`, `where` and `weights`, or pack the rows more densely.",
        {} if r.labels is None else {"label": r.labels},
    )
    return suspicion._replace(total=rows)
