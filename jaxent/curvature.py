"""Curvature of the softmax loss: its Hessian, and Gauss-Newton and Fisher products through any model."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._arguments.reduction import MatrixReduction, check_matrix_reduction, reduce_losses
from jaxent._arguments.targets import (
    SoftmaxArguments,
    SoftmaxCall,
    check_logits,
    check_softmax_call,
    row_targets,
)
from jaxent._errors import ArgumentValueError, public
from jaxent._math import softmax
from jaxent._math.quadratic_forms import Fisher, GaussNewton, QuadraticForm
from jaxent._mesh.apply import map_rows
from jaxent._mesh.class_axis import (
    ClassAxis,
    VocabAxis,
)
from jaxent._typing import ArrayLike

Pytree = Any


# ----------------------------------------------------------------------------------------------------------------------
# With respect to the logits


@public
def logit_hessian(logits: ArrayLike, *, axis: int = -1) -> jax.Array:
    r"""Second derivative of `-log p_y` w.r.t. the logits, in nats per squared unit of logit, whatever the label `y`.

    $$\frac{\partial^2 \ell}{\partial z_i \partial z_j} = p_i\, [i = j] - p_i p_j, \qquad p = \mathrm{softmax}(z)$$

    Bishop (2006), equation 4.110. It is the covariance of a one-hot draw from `p`, so it is symmetric and positive
    semi-definite, with the constant vector in its kernel. It is also the Fisher matrix of the logits.

    **Arguments:** `logits`: `(*batch, classes)`, floating; the classes lie at `axis`.

    **Returns:** `(*batch, classes, classes)`, the matrices on the last two axes wherever the classes were; float64 for
    float64 logits, else float32. `1 - p_i` on the diagonal is not a difference: at logits (0, -41), where `1 - p_0`
    rounds to 0, the diagonal is 1.6e-18. A logit of -inf has a row and a column of 0; a row of logits with nan, +inf or
    only -inf is nan throughout.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> logit_hessian(jnp.log(jnp.array([0.25, 0.75]))).round(4)
    Array([[ 0.1875, -0.1875],
           [-0.1875,  0.1875]], dtype=float32)
    """
    z, axis = check_logits("logits", logits, axis)
    return _logit_hessian(jnp.moveaxis(z, axis, -1))


@functools.partial(jax.jit, inline=True)
def _logit_hessian(logits: jax.Array) -> jax.Array:
    (z,) = arrays.accumulated(logits)
    row = softmax.normalizer(z, ClassAxis())
    p = softmax.probabilities(z, row, ClassAxis())
    diagonal = p * -jnp.expm1(softmax.log_probabilities(z, row, ClassAxis()))
    same = jnp.eye(z.shape[-1], dtype=bool).reshape((1,) * (z.ndim - 1) + (z.shape[-1],) * 2)
    return jnp.where(same, diagonal[..., None], -p[..., :, None] * p[..., None, :])


@public
def logit_hessian_product(logits: ArrayLike, v: ArrayLike, *, axis: int = -1) -> jax.Array:
    r"""`logit_hessian(logits) @ v` for each row, without the matrix, in nats per unit of logit.

    $$(H v)_i = p_i (v_i - \textstyle\sum_j p_j v_j), \qquad p = \mathrm{softmax}(z)$$

    **Arguments:** `logits`: `(*batch, classes)`, floating, the classes at `axis`; `v`: the same shape, floating.

    **Returns:** the shape of `logits`; float64 if one of the two is, else float32. Adding a constant to a row of `v`
    changes nothing, and `v` is counted from its entry at the largest logit, so that nothing large cancels: at logits
    (0, -41) the product with (1, 0) is (1.6e-18, -1.6e-18). Edges as in `logit_hessian`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> logit_hessian_product(jnp.log(jnp.array([0.25, 0.75])), jnp.array([1.0, 0.0])).round(4)
    Array([ 0.1875, -0.1875], dtype=float32)
    """
    z, axis = check_logits("logits", logits, axis)
    step = arrays.floating("v", v)
    arrays.check_shape("v", step, z.shape, "that of the logits")
    return _logit_hessian_product(z, step, classes=ClassAxis(axis))


@functools.partial(jax.jit, static_argnames=("classes",), inline=True)
def _logit_hessian_product(logits: jax.Array, v: jax.Array, *, classes: ClassAxis) -> jax.Array:
    z, step = arrays.accumulated(logits, v)
    return jax.jvp(lambda z: softmax.softmax(z, classes), (z,), (step,))[1]


# ----------------------------------------------------------------------------------------------------------------------
# Through any model


@public
def ggn_vector_product(
    logits_fn: Callable[[Any], jax.Array],
    params: Pytree,
    v: Pytree,
    *,
    targets: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    vocab_axis: VocabAxis = None,
) -> Pytree:
    r"""Gauss-Newton matrix of `softmax_cross_entropy(logits_fn(params), ...)` times a step, in nats per unit of it.

    $$G v = \frac{1}{W} \sum_n J_n^\top A_n J_n v, \qquad
    A_n = w_n S_n\, (\mathrm{diag}\, p_n - p_n p_n^\top), \qquad J_n = \frac{\partial z_n}{\partial \theta}$$

    The generalised Gauss-Newton matrix: Schraudolph (2002), section 3; Martens (2020), section 8. `A_n` is the Hessian
    of the row's loss w.r.t. its logits, and `W` the divisor of the loss: where the logits are linear in the parameters,
    `G` is `jax.hessian` of the loss. `G` is symmetric and positive semi-definite: `jax.scipy.sparse.linalg.cg` takes it
    as it is, plus some damping.

    **What is the Fisher matrix and what is not.** With targets that sum to one, given as labels, probabilities or
    smoothed, `S_n = 1` and `G` is the true Fisher matrix, the expectation of `g g^T` over labels drawn from the model;
    the targets do not enter. Row weights enter both in the same way. Class weights and targets that do not sum to one
    scale a row by the sum of its targets, `S_n`: `G` is then the Fisher matrix of rows so weighted. The z-loss is no
    likelihood: it adds `2 zeta w_n (p_n p_n^T + lse_n (diag p_n - p_n p_n^T))` to `A_n`, which is semi-definite as long
    as `S_n + 2 zeta lse_n >= 0`. The empirical Fisher matrix, with the labels of the data, is another matrix:
    `fisher_vector_product`.

    **Arguments:**

    - `logits_fn`: `logits_fn(params)` gives `(*batch, classes)`, floating, the classes at `axis`.
    - `params`: any pytree of floating arrays. `v`: the same structure and shapes; converted to the dtypes of `params`.
    - `targets`: labels or probabilities, for the options that look at them: ignored labels, class weights,
      probabilities that do not sum to one. None counts every row once.
    - The others as in `softmax_cross_entropy`; the reduction is `"mean"` or `"sum"`.

    **Returns:** the structure, shapes and dtypes of `v`. The logits and their Jacobian products are taken once, the
    curvature in at least float32. A row that is not counted adds 0; a label out of range, or a row with nan, +inf or
    only -inf, gives nan. Inside `jax.shard_map`, parameters that all devices share get the sum over the devices, as
    they do from `jax.grad`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong structure, shape or option.

    >>> inputs, kernel = jnp.eye(2), jnp.zeros((2, 2))
    >>> ggn_vector_product(lambda w: inputs @ w, kernel, jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _product(
        GaussNewton,
        logits_fn,
        params,
        v,
        SoftmaxArguments(targets, where, weights, class_weights, label_smoothing, z_loss),
        axis=axis,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        vocab_axis=vocab_axis,
    )


@public
def fisher_vector_product(
    logits_fn: Callable[[Any], jax.Array],
    params: Pytree,
    targets: ArrayLike,
    v: Pytree,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    vocab_axis: VocabAxis = None,
) -> Pytree:
    r"""Empirical Fisher matrix, the second moment of the rows' gradients, times a step, in nats^2 per unit of it.

    $$F v = \frac{1}{W} \sum_n w_n\, g_n (g_n^\top v), \qquad
    g_n = J_n^\top \frac{\partial \ell_n}{\partial z_n} = J_n^\top (p_n - y_n), \qquad W = \textstyle\sum_n w_n$$

    Martens (2020), section 11. It is not the Fisher matrix, whose labels come from the model and not from the data, and
    it need not be near it (Kunstner et al., 2019): it vanishes where every row is fitted. With `targets` drawn from the
    model (`jax.random.categorical(key, logits_fn(params))`) its expectation is the true Fisher matrix, which
    `ggn_vector_product` gives without drawing.

    **Arguments:**

    - `logits_fn`, `params`, `v`: as in `ggn_vector_product`.
    - `targets`: `(*batch,)` class indices, or probabilities `t` shaped like the logits. `g_n` is the gradient of the
      row's whole loss: smoothing and probabilities enter `y_n` before the product, which is not averaged over labels.
    - `weights`: how often a row counts. A weight of 2 is the row twice: `w_n` enters once, not squared. For class
      weights pass `weights=class_weights[labels]`.
    - The others as in `softmax_cross_entropy`; the reduction is `"mean"` or `"sum"`.

    **Returns:** the structure, shapes and dtypes of `v`; symmetric and positive semi-definite as a matrix. Rows that do
    not count add 0; a label out of range, or a row with nan, +inf or only -inf, gives nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong structure, shape or option.

    >>> inputs, kernel = jnp.eye(2), jnp.zeros((2, 2))
    >>> fisher_vector_product(lambda w: inputs @ w, kernel, jnp.array([0, 1]), jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _product(
        Fisher,
        logits_fn,
        params,
        v,
        SoftmaxArguments(targets, where, weights, None, label_smoothing, 0.0),
        axis=axis,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        vocab_axis=vocab_axis,
    )


def _product(
    form: Callable[[ClassAxis], QuadraticForm],
    logits_fn: Callable[[Any], jax.Array],
    params: Pytree,
    v: Pytree,
    arguments: SoftmaxArguments,
    *,
    axis: int,
    reduction: MatrixReduction,
    **options: Any,
) -> Pytree:
    check_matrix_reduction(reduction)
    params = _floating_leaves("params", params)
    v = _check_tangents(v, params)
    logits, push = jax.linearize(logits_fn, params)
    if not (isinstance(logits, jax.Array) and jnp.issubdtype(logits.dtype, jnp.floating)):
        raise arrays.dtype_error("logits_fn", "return floating logits", logits)
    call = check_softmax_call(
        logits,
        arguments,
        axis=axis,
        reduction=reduction,
        logits_name="logits_fn(params)",
        targets_required=form is Fisher,
        **options,
    )

    def half_form(v: Pytree) -> jax.Array:
        step = push(jax.tree.map(lambda x, p: x.astype(p.dtype), v, params))
        return _half_form(step, call, form=form(call.classes))

    return jax.grad(half_form)(v)


@functools.partial(jax.jit, static_argnames=("form",), inline=True)
def _half_form(step: jax.Array, call: SoftmaxCall, *, form: QuadraticForm) -> jax.Array:
    classes = call.classes

    def row_forms(logits: jax.Array, step: jax.Array, arguments: SoftmaxArguments) -> tuple[jax.Array, jax.Array]:
        z, step = arrays.accumulated(logits, step)
        rows, options = row_targets(arguments, z, classes, call.ignore_index)
        return jnp.squeeze(form(z, step, rows, options), classes.axis), rows.total_weights(classes)

    forms, weights = map_rows(row_forms, call.logits, step, call.arguments, without=classes.axis)
    total: Any = reduce_losses(forms, weights, call.reduction, call.divisor)
    return total


def _floating_leaves(argument: str, tree: Pytree) -> Pytree:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: arrays.floating(argument + jax.tree_util.keystr(path), x), tree
    )


def _check_tangents(v: Pytree, params: Pytree) -> Pytree:
    structure = jax.tree.structure(params)
    if jax.tree.structure(v) != structure:
        raise ArgumentValueError(f"`v` must have the structure of `params`, {structure}, got {jax.tree.structure(v)}")
    v = _floating_leaves("v", v)
    for (path, x), p in zip(jax.tree_util.tree_leaves_with_path(v), jax.tree.leaves(params), strict=True):
        arrays.check_shape("v" + jax.tree_util.keystr(path), x, p.shape, "that of the parameter")
    return v
