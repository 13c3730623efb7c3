"""Losses on logits: each is a row loss and the shared reduction."""

import functools
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._arguments.class_axes import flatten_softmax_arguments
from jaxent._arguments.options import BinaryOptions, LabelOptions, SoftmaxOptions
from jaxent._arguments.reduction import Reduction, WeightedSum, check_reduction, reduce_losses
from jaxent._arguments.targets import (
    SoftmaxArguments,
    SoftmaxCall,
    SparseTargets,
    check_row_arguments,
    check_softmax_call,
    row_targets,
)
from jaxent._errors import public
from jaxent._math.row_losses import (
    binary_nll,
    ignore_zero_weight_rows,
    label_loss_from_log_probs,
    softmax_loss,
    weighted,
)
from jaxent._mesh.apply import map_rows
from jaxent._mesh.class_axis import (
    VocabAxis,
)
from jaxent._typing import ArrayLike


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Literal["sum_and_weight"],
    **options: Unpack[SoftmaxOptions],
) -> WeightedSum: ...
@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[SoftmaxOptions],
) -> jax.Array: ...
@public
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    vocab_axis: VocabAxis = None,
) -> jax.Array | WeightedSum:
    r"""Cross-entropy between targets and the softmax of logits, in nats.

    $$\ell_n = w_n \Big[(1-\epsilon)\, c_{y_n} \mathrm{nll}_{n y_n} + \frac{\epsilon}{C} \sum_k c_k\, \mathrm{nll}_{nk}
    + \zeta\, \mathrm{lse}(z_n)^2\Big], \qquad \mathrm{nll}_{nk} = \mathrm{lse}(z_n) - z_{nk}$$

    for class indices; for class probabilities $t$ the first two terms are
    $\sum_k c_k ((1-\epsilon) t_{nk} + \epsilon / C)\, \mathrm{nll}_{nk}$. These are PyTorch's formulas
    (`torch.nn.CrossEntropyLoss`); smoothing is Szegedy et al. (2016), section 7, the z-loss that of PaLM, Chowdhery et
    al. (2022), section 5. The gradient in the plain case is `softmax(z) - onehot(y)`.

    **Arguments:**

    - `logits`: `(*batch, classes)`, floating; the classes lie at `axis`, or at all of a tuple of axes. Class indices
      then count the classes of these axes row by row, and `class_weights` have their shape.
    - `targets`: `(*batch,)` class indices of any integer dtype, or class probabilities shaped like `logits`, or
      `SparseTargets`.
    - `where`: `(*batch,)` bool; False drops a row. `weights`: `(*batch,)`, row weights `w` of either sign (advantages,
      unlikelihood). With weights that may sum to 0 pass `denominator`: a mean over weights of sum 0 is 0.
    - `class_weights`: `(classes,)`, `c`.
    - `ignore_index`: rows with this label are dropped; None drops none. Only for class indices.
    - `label_smoothing`: `epsilon` in [0, 1]. `z_loss`: `zeta >= 0`; the class weights do not touch its term.
    - `reduction`: `"mean"` divides by `sum_n w_n c_{y_n}` (class indices) or `sum_n w_n` (probabilities); `"sum"`;
      `"none"` gives `(*batch,)`; `"sum_and_weight"` gives `WeightedSum(total, weight)`, whose sums over microbatches or
      devices have the exact mean.
    - `denominator`: replaces the divisor of `"mean"`.
    - `vocab_axis`: the mesh axis that splits the classes, or a tuple of them, inside `jax.shard_map`; labels count all
      classes, and `class_weights` and probabilities are split like the logits.

    Numbers from the host (weights, divisors) pass through float64: none wraps, and one that float32 cannot hold is an
    error.

    **Returns:** float64 for float64 logits, else float32; the gradient comes back in the dtype of `logits`.

    At the edges: a dropped row adds exactly 0 to value and gradient, whatever it holds, and so does a row of weight 0.
    The mean of nothing is 0. A label out of range, and a row with nan, +inf or only -inf, gives nan in the value and in
    every entry of the row's gradient. A logit of -inf removes its class; if that is the label's class, the loss is
    +inf. A loss keeps its relative accuracy however small it is.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or option.

    >>> logits = jnp.array([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])
    >>> softmax_cross_entropy(logits, jnp.array([2, -100])).round(4)
    Array(0.5514, dtype=float32)
    """
    given = SoftmaxArguments(targets, where, weights, class_weights, label_smoothing, z_loss)
    if isinstance(axis, tuple):
        logits, given, _ = flatten_softmax_arguments(logits, given, axis, vocab_axis)
        axis = -1
    call = check_softmax_call(
        logits,
        given,
        axis=axis,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        vocab_axis=vocab_axis,
    )
    return _softmax_cross_entropy(call)


@functools.partial(jax.jit, inline=True)
def _softmax_cross_entropy(call: SoftmaxCall) -> jax.Array | WeightedSum:
    classes = call.classes

    def row_losses(logits: jax.Array, arguments: SoftmaxArguments) -> tuple[jax.Array, jax.Array]:
        (z,) = arrays.accumulated(logits)
        rows, options = row_targets(arguments, z, classes, call.ignore_index)
        losses = softmax_loss(z, ignore_zero_weight_rows(rows, classes, z), options, classes)
        return jnp.squeeze(losses, classes.axis), rows.total_weights(classes)

    losses, weights = map_rows(row_losses, call.logits, call.arguments, without=classes.axis)
    return reduce_losses(losses, weights, call.reduction, call.divisor)


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
@public
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
    call = check_softmax_call(
        log_probs,
        SoftmaxArguments(labels, where, weights, class_weights, 0.0, 0.0),
        axis=axis,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        logits_name="log_probs",
        targets_name="labels",
    )
    return _nll_loss(call)


@functools.partial(jax.jit, inline=True)
def _nll_loss(call: SoftmaxCall) -> jax.Array | WeightedSum:
    classes = call.classes

    def row_losses(log_probs: jax.Array, arguments: SoftmaxArguments) -> tuple[jax.Array, jax.Array]:
        (log_p,) = arrays.accumulated(log_probs)
        rows, _ = row_targets(arguments, log_p, classes, call.ignore_index)
        losses = label_loss_from_log_probs(log_p, rows, classes)
        return jnp.squeeze(losses, classes.axis), rows.total_weights(classes)

    losses, weights = map_rows(row_losses, call.logits, call.arguments, without=classes.axis)
    return reduce_losses(losses, weights, call.reduction, call.divisor)


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
@public
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

    Equal to `torch.nn.BCEWithLogitsLoss` except for the mean, which divides by the sum of the weights `w`. The gradient
    is `sigmoid(z) - t` in the plain case.

    **Arguments:**

    - `logits`: any shape, floating.
    - `targets`: the same shape; probabilities of the positive class, or bool or integer 0 and 1. Outside [0, 1]
      the loss is nan.
    - `where`, `weights`: the same shape; what to drop, and weights `w` of either sign.
    - `pos_weight`: `c`, broadcast against the logits from the last axis.
    - `reduction`, `denominator`: as in `softmax_cross_entropy`.

    **Returns:** float64 for float64 logits, else float32. Dropped entries add exactly 0; nan in `logits` gives nan; an
    infinite logit costs 0 or +inf, depending on its target.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> sigmoid_cross_entropy(jnp.array([0.0]), jnp.array([1.0]))
    Array(0.6931472, dtype=float32)
    """
    z = arrays.floating("logits", logits)
    t = arrays.real("targets", targets)
    arrays.check_shape("targets", t, z.shape, "one for each logit")
    where, weights = check_row_arguments(z.shape, where, weights)
    if pos_weight is not None:
        pos_weight = arrays.real("pos_weight", pos_weight)
        arrays.check_broadcast("pos_weight", pos_weight, z.shape, "the logits")
    divisor = check_reduction(reduction, denominator)
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
        (z,) = arrays.accumulated(logits)
        counted = jnp.ones(z.shape, z.dtype) if weights is None else weights.astype(z.dtype)
        dropped = jnp.zeros(z.shape, bool) if where is None else ~where
        targets = targets.astype(z.dtype)
        is_probability = (targets >= 0) & (targets <= 1)
        dropped |= (counted == 0) & (jnp.isnan(z) | ~is_probability)
        counted = jnp.where(dropped, 0, counted)
        z = jnp.where(dropped, 0, z)
        targets = jnp.where(dropped, 0, jnp.where(is_probability, targets, jnp.nan))
        if pos_weight is not None:
            pos_weight = jnp.broadcast_to(pos_weight.astype(z.dtype), z.shape)
        return weighted(counted, binary_nll(z, targets, pos_weight)), counted

    losses, counted = map_rows(losses_and_weights, logits, targets, where, weights, pos_weight)
    return reduce_losses(losses, counted, reduction, divisor)
