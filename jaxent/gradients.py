"""Gradients of the losses in closed form."""

import functools

import jax
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._arguments.class_axes import flatten_softmax_arguments, spread_classes
from jaxent._arguments.reduction import Reduction, quotient
from jaxent._arguments.targets import (
    SoftmaxArguments,
    SoftmaxCall,
    SparseTargets,
    check_softmax_call,
    row_targets,
)
from jaxent._errors import public
from jaxent._math.row_losses import ignore_zero_weight_rows, softmax_loss_gradient
from jaxent._mesh.apply import map_rows
from jaxent._mesh.class_axis import (
    VocabAxis,
)
from jaxent._typing import ArrayLike


@public
def softmax_cross_entropy_gradient(
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
) -> jax.Array:
    r"""Derivative of `softmax_cross_entropy` with respect to its logits, in closed form, in nats per unit of logit.

    $$\frac{\partial \ell_n}{\partial z_{nk}} = w_n \Big[(1-\epsilon)\, c_{y_n} (p_{nk} - [k = y_n])
    + \frac{\epsilon}{C} (p_{nk} \textstyle\sum_j c_j - c_k) + 2 \zeta\, \mathrm{lse}(z_n)\, p_{nk}\Big],
    \qquad p_n = \mathrm{softmax}(z_n)$$

    for class indices, which is `softmax(z) - onehot(y)` without options. For class probabilities $t$ the first two
    terms are $p_{nk} \sum_j s_j - s_k$ with $s_k = c_k ((1-\epsilon) t_{nk} + \epsilon / C)$. Equal to
    `jax.grad(softmax_cross_entropy)`; the plain case is Bishop (2006), equation 4.109.

    **Arguments:** those of `softmax_cross_entropy`.

    - `reduction`: `"mean"` divides the formula by the loss's divisor, and gives 0 when nothing is counted; `"sum"` is
      the formula, and so are `"sum_and_weight"`, whose total is that sum, and `"none"`, where each row has its own
      loss's derivative: the loss of a row depends on the logits of no other.

    **Returns:** the shape and the dtype of `logits`; computed in float64 for float64 logits, else in float32.

    At the edges: dropped rows are exactly 0, whatever they hold. A row with a label out of range, or with nan, +inf or
    only -inf, is nan throughout. A logit of -inf has derivative 0, or -1 at the label. The entry at the label is
    `-(1 - p_y)`, with its relative accuracy: at logits (0, -20, -25) it is -2.0750e-9, where `p_y - 1` would be 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or option.

    >>> logits = jnp.log(jnp.array([0.25, 0.25, 0.5]))
    >>> softmax_cross_entropy_gradient(logits, jnp.array(2)).round(4)
    Array([ 0.25,  0.25, -0.5 ], dtype=float32)
    """
    given = SoftmaxArguments(targets, where, weights, class_weights, label_smoothing, z_loss)
    axes, sizes = (), ()
    if isinstance(axis, tuple):
        sizes = jnp.shape(logits)
        logits, given, axes = flatten_softmax_arguments(logits, given, axis, vocab_axis)
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
    gradient = _softmax_cross_entropy_gradient(call)
    return spread_classes(gradient, axes, tuple(sizes[a] for a in axes)) if axes else gradient


@functools.partial(jax.jit, inline=True)
def _softmax_cross_entropy_gradient(call: SoftmaxCall) -> jax.Array:
    classes = call.classes

    def derivative(logits: jax.Array, arguments: SoftmaxArguments, divisor: jax.Array | None) -> jax.Array:
        (z,) = arrays.accumulated(logits)
        rows, options = row_targets(arguments, z, classes, call.ignore_index)
        rows = ignore_zero_weight_rows(rows, classes, z)
        gradient = softmax_loss_gradient(z, rows, options, classes)
        if call.reduction == "mean":
            weight = (jnp.sum(rows.total_weights(classes)) if divisor is None else divisor).astype(z.dtype)
            gradient *= quotient(1, weight)
        return gradient.astype(logits.dtype)

    return map_rows(derivative, call.logits, call.arguments, call.divisor)
