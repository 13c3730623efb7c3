"""Losses on logits: each is a row loss and the shared reduction."""

import functools
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxent import _arrays, _labels, _reduction, _rows, _softmax, _targets
from jaxent._exports import exportable
from jaxent._options import BinaryOptions, LabelOptions, SoftmaxOptions
from jaxent._reduction import Reduction
from jaxent._sharding import ClassAxis, check_class_axis, check_vocab_axis, elementwise
from jaxent._targets import SoftmaxArguments
from jaxent.risk import WeightedSum


@overload
def softmax_cross_entropy(
    logits: ArrayLike, targets: ArrayLike, *, reduction: Literal["sum_and_weight"], **options: Unpack[SoftmaxOptions]
) -> WeightedSum: ...
@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[SoftmaxOptions],
) -> jax.Array: ...
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    vocab_axis: str | None = None,
) -> jax.Array | WeightedSum:
    r"""Cross-entropy between targets and the softmax of logits, in nats.

    $$\ell_n = w_n \Big[(1-\epsilon)\, c_{y_n} \mathrm{nll}_{n y_n} + \frac{\epsilon}{C} \sum_k c_k\, \mathrm{nll}_{nk}
    + \zeta\, \mathrm{lse}(z_n)^2\Big], \qquad \mathrm{nll}_{nk} = \mathrm{lse}(z_n) - z_{nk}$$

    for class indices; for class probabilities $t$ the first two terms are
    $\sum_k c_k ((1-\epsilon) t_{nk} + \epsilon / C)\, \mathrm{nll}_{nk}$. These are PyTorch's formulas
    (`torch.nn.CrossEntropyLoss`); smoothing is Szegedy et al. (2016), section 7, the z-loss that of PaLM, Chowdhery et
    al. (2022), section 5. The gradient in the plain case is `softmax(z) - onehot(y)`.

    **Arguments:**

    - `logits`: `(*batch, classes)`, floating; the classes lie at `axis`.
    - `targets`: `(*batch,)` class indices of any integer dtype, or class probabilities shaped like `logits`.
    - `where`: `(*batch,)` bool; False drops a row. `weights`: `(*batch,)`, row weights `w >= 0`; a negative one is nan.
    - `class_weights`: `(classes,)`, `c`.
    - `ignore_index`: rows with this label are dropped; None drops none. Only for class indices.
    - `label_smoothing`: `epsilon` in [0, 1]. `z_loss`: `zeta >= 0`; the class weights do not touch its term.
    - `reduction`: `"mean"` divides by `sum_n w_n c_{y_n}` (class indices) or `sum_n w_n` (probabilities); `"sum"`;
      `"none"` gives `(*batch,)`; `"sum_and_weight"` gives `WeightedSum(total, weight)`, whose sums over microbatches or
      devices have the exact mean.
    - `denominator`: replaces the divisor of `"mean"`.
    - `vocab_axis`: the mesh axis that splits the classes, inside `jax.shard_map`; labels count all classes, and
      `class_weights` and probabilities are split like the logits.

    **Returns:** float64 for float64 logits, else float32; the gradient comes back in the dtype of `logits`.

    At the edges: a dropped row adds exactly 0 to value and gradient, whatever it holds, and so does a row of weight 0.
    The mean of nothing is 0. A label out of range, and a row with nan, +inf or only -inf, gives nan in the value and in
    every entry of the row's gradient. A logit of -inf removes its class; as the label's it costs +inf. A loss keeps
    its relative accuracy however small it is.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or option.

    >>> logits = jnp.array([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    >>> softmax_cross_entropy(logits, jnp.array([2, -100])).round(4)
    Array(0.5514, dtype=float32)
    """
    arrays, static = check_softmax_call(
        "softmax_cross_entropy",
        logits,
        targets,
        axis=axis,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        vocab_axis=vocab_axis,
        where=where,
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return _softmax_cross_entropy(*arrays, **static)


def check_softmax_call(
    function: str,
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int,
    ignore_index: int | None,
    reduction: Reduction,
    denominator: ArrayLike | None,
    vocab_axis: str | None,
    **options: Any,
) -> tuple[tuple[jax.Array, SoftmaxArguments, jax.Array | None], dict[str, Any]]:
    """The checked arguments of a softmax loss, traced ones and static ones, for the loss and for its gradient."""
    z, axis = check_logits(function, "logits", logits, axis)
    _targets.check_vocab_axis(function, vocab_axis, targets, where=options["where"], weights=options["weights"])
    arguments = _targets.check_softmax_arguments(function, z.shape, axis, targets, **options)
    divisor = _reduction.check(function, reduction, denominator)
    _targets.check_class_axis(function, vocab_axis, {"logits": (z, axis)}, arguments)
    ignore_index = _targets.check_ignore_index(function, ignore_index)
    static = {"classes": ClassAxis(axis, vocab_axis), "ignore_index": ignore_index, "reduction": reduction}
    return (z, arguments, divisor), static


@functools.partial(jax.jit, static_argnames=("classes", "ignore_index", "reduction"), inline=True)
def _softmax_cross_entropy(
    logits: jax.Array,
    arguments: SoftmaxArguments,
    divisor: jax.Array | None,
    *,
    classes: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
) -> jax.Array | WeightedSum:
    def row_losses(logits: jax.Array, arguments: SoftmaxArguments) -> tuple[jax.Array, jax.Array]:
        (z,) = _arrays.accumulated(logits)
        rows, options = _targets.row_targets(arguments, z, classes, ignore_index)
        losses = _rows.softmax_loss(z, rows, options, classes)
        return jnp.squeeze(losses, classes.axis), rows.total_weights(classes)

    losses, weights = elementwise(row_losses, logits, arguments, without=classes.axis)
    return _reduction.reduce(losses, weights, reduction, divisor)


@overload
def nll_loss(
    log_probs: ArrayLike, labels: ArrayLike, *, reduction: Literal["sum_and_weight"], **options: Unpack[LabelOptions]
) -> WeightedSum: ...
@overload
def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[LabelOptions],
) -> jax.Array: ...
def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
) -> jax.Array | WeightedSum:
    r"""Negative log-likelihood of labels under log-probabilities, in the unit of the log-probabilities.

    $$\ell_n = -w_n\, c_{y_n} \log p_{n y_n}$$

    With `log_probs = jax.nn.log_softmax(logits)` this is `softmax_cross_entropy(logits, labels)`. The formula and the
    reductions are those of `torch.nn.NLLLoss`.

    **Arguments:** `log_probs`: `(*batch, classes)`, floating, the classes at `axis`. `labels`: `(*batch,)`, class
    indices of any integer dtype. The others as in `softmax_cross_entropy`.

    **Returns:** float64 for float64 inputs, else float32. Dropped rows add exactly 0; a label out of range gives nan in
    the value and in every entry of the row's gradient; a label with log-probability -inf costs +inf.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or option.

    >>> nll_loss(jnp.log(jnp.array([[0.3, 0.3, 0.4]])), jnp.array([2]))
    Array(0.9162907, dtype=float32)
    """
    name = "nll_loss"
    log_p, axis = check_logits(name, "log_probs", log_probs, axis)
    shape = _targets.rows_shape(log_p.shape, axis)
    where, weights = _targets.check_row_arguments(name, shape, where, weights)
    arguments = SoftmaxArguments(
        _targets.check_labels(name, "labels", labels, shape),
        where,
        weights,
        _targets.check_class_weights(name, class_weights, log_p.shape[axis]),
    )
    divisor = _reduction.check(name, reduction, denominator)
    _targets.check_class_axis(name, None, {"log_probs": (log_p, axis)}, arguments, "labels")
    ignore_index = _targets.check_ignore_index(name, ignore_index)
    return _nll_loss(log_p, arguments, divisor, classes=ClassAxis(axis), ignore_index=ignore_index, reduction=reduction)


@functools.partial(jax.jit, static_argnames=("classes", "ignore_index", "reduction"), inline=True)
def _nll_loss(
    log_probs: jax.Array,
    arguments: SoftmaxArguments,
    divisor: jax.Array | None,
    *,
    classes: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
) -> jax.Array | WeightedSum:
    def row_losses(log_probs: jax.Array, arguments: SoftmaxArguments) -> tuple[jax.Array, jax.Array]:
        (log_p,) = _arrays.accumulated(log_probs)
        rows, _ = _targets.row_targets(arguments, log_p, classes, ignore_index)
        losses = _rows.picked_nll(log_p, rows, classes)
        return jnp.squeeze(losses, classes.axis), rows.total_weights(classes)

    losses, weights = elementwise(row_losses, log_probs, arguments, without=classes.axis)
    return _reduction.reduce(losses, weights, reduction, divisor)


@overload
def sigmoid_cross_entropy(
    logits: ArrayLike, targets: ArrayLike, *, reduction: Literal["sum_and_weight"], **options: Unpack[BinaryOptions]
) -> WeightedSum: ...
@overload
def sigmoid_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[BinaryOptions],
) -> jax.Array: ...
def sigmoid_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
) -> jax.Array | WeightedSum:
    r"""Binary cross-entropy between targets and the logistic function of logits, in nats.

    $$\ell = w\,[\,c\, t\, \mathrm{softplus}(-z) + (1 - t)\, \mathrm{softplus}(z)\,]$$

    Equal to `torch.nn.BCEWithLogitsLoss`, but for the mean, which divides by the sum of the weights `w`. The gradient
    is `sigmoid(z) - t` in the plain case.

    **Arguments:**

    - `logits`: any shape, floating.
    - `targets`: the same shape; probabilities of the positive class, or bool or integer 0 and 1.
    - `where`, `weights`: the same shape; what to drop, and weights `w >= 0`.
    - `pos_weight`: `c`, broadcast against the logits from the last axis.
    - `reduction`, `denominator`: as in `softmax_cross_entropy`.

    **Returns:** float64 for float64 logits, else float32. Dropped entries add exactly 0; nan in `logits` gives nan; an
    infinite logit costs 0 or +inf, as its target says.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> sigmoid_cross_entropy(jnp.array([0.0]), jnp.array([1.0]))
    Array(0.6931472, dtype=float32)
    """
    name = "sigmoid_cross_entropy"
    z = _arrays.floating(name, "logits", logits)
    t = _arrays.probability_or_flag(name, "targets", targets)
    _arrays.check_shape(name, "targets", t, z.shape, "one for each logit")
    where, weights = _targets.check_row_arguments(name, z.shape, where, weights)
    if pos_weight is not None:
        pos_weight = _arrays.real(name, "pos_weight", pos_weight)
        _arrays.check_broadcast(name, "pos_weight", pos_weight, z.shape, "the logits")
    divisor = _reduction.check(name, reduction, denominator)
    return _sigmoid_cross_entropy(z, t, where, weights, pos_weight, divisor, reduction=reduction)


@functools.partial(jax.jit, static_argnames=("reduction",), inline=True)
def _sigmoid_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    where: jax.Array | None,
    weights: jax.Array | None,
    pos_weight: jax.Array | None,
    divisor: jax.Array | None,
    *,
    reduction: Reduction,
) -> jax.Array | WeightedSum:
    def losses_and_weights(
        logits: jax.Array,
        targets: jax.Array,
        where: jax.Array | None,
        weights: jax.Array | None,
        pos_weight: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        (z,) = _arrays.accumulated(logits)
        counted = jnp.ones(z.shape, z.dtype) if weights is None else weights.astype(z.dtype)
        dropped = jnp.zeros(z.shape, bool) if where is None else ~where
        dropped |= (counted == 0) & jnp.isnan(z)
        counted = jnp.where(dropped, 0, counted)
        z = jnp.where(dropped, 0, z)
        targets = jnp.where(dropped, 0, targets.astype(z.dtype))
        if pos_weight is not None:
            pos_weight = jnp.broadcast_to(pos_weight.astype(z.dtype), z.shape)
        return _rows.weighted(counted, _rows.binary_nll(z, targets, pos_weight)), counted

    losses, counted = elementwise(losses_and_weights, logits, targets, where, weights, pos_weight)
    return _reduction.reduce(losses, counted, reduction, divisor)


@exportable
class TokenStatistics(NamedTuple):
    """What one pass over the logits tells about each row, in nats; None is what was not asked for."""

    log_prob: jax.Array | None
    """`log p_y`, differentiable; nan for a label out of range."""
    log_normalizer: jax.Array
    """`logsumexp(z)`, differentiable."""
    entropy: jax.Array
    """`-sum_k p_k log p_k`, differentiable."""
    argmax: jax.Array
    """The first class with the highest logit, int32; -1 for a row without a softmax."""
    rank: jax.Array | None
    """How many classes score strictly higher than the label, int32; -1 for a label out of range."""
    top_log_probs: jax.Array | None
    """The `top_k` highest log-probabilities, in falling order, on a new last axis."""
    top_classes: jax.Array | None
    """Their classes, int32."""


def token_statistics(
    logits: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    axis: int = -1,
    top_k: int = 0,
    vocab_axis: str | None = None,
) -> TokenStatistics:
    r"""Per-row log-probability, log-normaliser, entropy, argmax, rank and top classes, in nats.

    $$\log p_y = z_y - \mathrm{lse}(z), \quad H = -\sum_k p_k \log p_k, \quad
    \mathrm{rank} = |\{k : z_k > z_y\}|$$

    **Arguments:**

    - `logits`: `(*batch, classes)`, floating, the classes at `axis`.
    - `labels`: `(*batch,)`, integer; without them `log_prob` and `rank` are None.
    - `top_k`: how many of the best classes to return; 0 for none.
    - `vocab_axis`: the mesh axis that splits the classes, inside `jax.shard_map`.

    **Returns:** `TokenStatistics` with leaves of shape `(*batch,)`, and `(*batch, top_k)` for the top classes.
    A label out of range has log-probability nan and rank -1; a row with nan, +inf or only -inf has nan everywhere, and
    -1 for its classes.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or `top_k`.

    >>> stats = token_statistics(jnp.log(jnp.array([0.3, 0.3, 0.4])), jnp.array(0))
    >>> int(stats.argmax), int(stats.rank)
    (2, 1)
    """
    name = "token_statistics"
    z, axis = check_logits(name, "logits", logits, axis)
    check_vocab_axis(name, vocab_axis, {"labels": labels})
    if labels is not None:
        labels = _targets.check_labels(name, "labels", labels, _targets.rows_shape(z.shape, axis))
    check_class_axis(name, vocab_axis, {"logits": (z, axis)}, {"labels": labels})
    classes = ClassAxis(axis, vocab_axis)
    return _token_statistics(z, labels, classes=classes, top_k=check_top_k(name, top_k, classes.size(z)))


def check_top_k(function: str, top_k: int, count: int) -> int:
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise _arrays.dtype_error(function, "top_k", "be an int", top_k)
    if not 0 <= top_k <= count:
        raise ValueError(f"jaxent.{function}: `top_k` must lie in [0, {count}], the number of classes, got {top_k}")
    return top_k


@functools.partial(jax.jit, static_argnames=("classes", "top_k"), inline=True)
def _token_statistics(
    logits: jax.Array, labels: jax.Array | None, *, classes: ClassAxis, top_k: int
) -> TokenStatistics:
    def rows(logits: jax.Array, labels: jax.Array | None) -> TokenStatistics:
        (z,) = _arrays.accumulated(logits)
        codes = None
        if labels is not None:
            codes = _labels.label_codes(jnp.expand_dims(labels, classes.axis), classes.size(z), None, None)
        return row_statistics(z, codes, classes, top_k)

    return elementwise(rows, logits, labels, without=classes.axis)


def row_statistics(z: jax.Array, codes: jax.Array | None, classes: ClassAxis, top_k: int) -> TokenStatistics:
    """`TokenStatistics` of rows whose labels are codes."""
    row = _softmax.normalizer(z, classes)
    usable = jnp.isfinite(row.rest)
    log_prob = rank = top_log_probs = top_classes = None

    def per_row(x: jax.Array) -> jax.Array:
        return jnp.squeeze(x, classes.axis)

    if codes is not None:
        log_prob = per_row(-_labels.label_nll(z, codes, classes)[0])
        label_logit = lax.stop_gradient(classes.take(z, codes))
        higher = classes.sum((lax.stop_gradient(z) > label_logit).astype(jnp.int32))
        rank = per_row(jnp.where(usable & (codes >= 0), higher, -1))
    settled = lax.optimization_barrier(lax.stop_gradient(z))  # compared with its own maximum, not with one rounded anew
    argmax = per_row(jnp.where(usable, classes.min_index(settled == classes.max(settled)), -1))
    if top_k:
        top_z, top_classes = classes.top(z, top_k)
        first = jnp.moveaxis(row.shift, classes.axis, -1), jnp.moveaxis(row.log_total, classes.axis, -1)
        top_log_probs = (top_z - first[0]) - first[1]
        top_classes = jnp.where(jnp.moveaxis(usable, classes.axis, -1), top_classes, -1)
    return TokenStatistics(
        log_prob,
        per_row(row.shift + row.log_total),
        per_row(_softmax.entropy(z, classes)),
        argmax,
        rank,
        top_log_probs,
        top_classes,
    )


def check_logits(function: str, argument: str, logits: ArrayLike, axis: int) -> tuple[jax.Array, int]:
    z = _arrays.floating(function, argument, logits)
    if z.ndim == 0:
        raise _arrays.shape_error(function, argument, "have a class axis", z)
    axis = _arrays.canonical_axis(function, axis, z.ndim)
    _targets.check_classes(function, argument, z.shape, axis)
    return z, axis
