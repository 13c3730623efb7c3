"""The functions of `torch_compat` on logits, log-probabilities and probabilities."""

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxent import losses
from jaxent._arguments import arrays
from jaxent._arguments.targets import check_ignore_index
from jaxent._errors import ArgumentValueError, public
from jaxent._math.softmax import log_softmax as log_softmax_of_rows
from jaxent._math.softmax import softmax as softmax_of_rows
from jaxent._mesh.class_axis import ClassAxis
from jaxent._typing import ArrayLike, DTypeLike
from jaxent.torch_compat._conventions import (
    cast,
    check_class_indices,
    check_class_weight,
    check_reduction,
    check_target,
    class_axis,
    class_loss_dtype,
    loss_of_no_classes,
    lost_rows,
    reduce_rows,
    row_targets,
)

# ----------------------------------------------------------------------------------------------------------------------
# Softmax


@public
def softmax(
    input: ArrayLike, dim: int | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> jax.Array:
    r"""Softmax along `dim`, as `torch.nn.functional.softmax`: probabilities.

    $$p_k = \exp(z_k) / \sum_j \exp(z_j)$$

    **Arguments:** `input`: any shape, floating, or any type if `dtype` is given, to which it is cast first. `dim`: the
    axis; None, which is deprecated, takes 0 of 0, 1 or 3 dimensions and 1 otherwise.

    **Returns:** the shape of `input`, in its type or `dtype`. A row with nan, +inf or only -inf is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong `dim`.

    >>> softmax(jnp.array([[0.0, 0.0]]), dim=1)
    Array([[0.5, 0.5]], dtype=float32)
    """
    return _along_dim("softmax", softmax_of_rows, input, dim, _stacklevel, dtype)


@public
def log_softmax(
    input: ArrayLike, dim: int | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> jax.Array:
    r"""Logarithm of the softmax along `dim`, as `torch.nn.functional.log_softmax`: log-probabilities, in nats.

    $$\log p_k = z_k - \log \sum_j \exp(z_j)$$

    **Arguments:** as `softmax`.

    **Returns:** the shape of `input`, in its type or `dtype`. A row with nan, +inf or only -inf is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong `dim`.

    >>> log_softmax(jnp.array([[0.0, 0.0]]), dim=1)
    Array([[-0.6931472, -0.6931472]], dtype=float32)
    """
    return _along_dim("log_softmax", log_softmax_of_rows, input, dim, _stacklevel, dtype)


def _along_dim(
    name: str,
    rows_function: Callable[[jax.Array, ClassAxis], jax.Array],
    input: ArrayLike,
    dim: int | None,
    stacklevel: int,
    dtype: DTypeLike | None,
) -> jax.Array:
    x = cast(input, dtype)
    if dim is None:
        message = f"Implicit dimension choice for {name} has been deprecated: pass dim=X"
        warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)  # `public` is one more
        dim = 0 if x.ndim in (0, 1, 3) else 1
    axis = arrays.canonical_axis(dim, max(x.ndim, 1), "dim")
    return _softmax_rows(x, rows_function=rows_function, classes=ClassAxis(axis)) if x.size else x


@functools.partial(jax.jit, static_argnames=("rows_function", "classes"), inline=True)
def _softmax_rows(
    x: jax.Array, *, rows_function: Callable[[jax.Array, ClassAxis], jax.Array], classes: ClassAxis
) -> jax.Array:
    (z,) = arrays.accumulated(x if x.ndim else x[None])
    return rows_function(z, classes).reshape(x.shape).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Losses of classes


@public
def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int | None = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    r"""Cross-entropy between targets and the softmax of logits, as `torch.nn.functional.cross_entropy`, in nats.

    $$\ell_n = (1-\epsilon)\, c_{y_n} \mathrm{nll}_{n y_n} + \frac{\epsilon}{C} \sum_k c_k\, \mathrm{nll}_{nk}, \qquad
    \mathrm{nll}_{nk} = \mathrm{lse}(z_n) - z_{nk}$$

    for labels; for probabilities $t$ it is $\sum_k c_k ((1-\epsilon) t_{nk} + \epsilon / C)\, \mathrm{nll}_{nk}$.

    **Arguments:**

    - `input`: logits `(C,)`, `(N, C)` or `(N, C, d_1, ..., d_K)`, floating.
    - `target`: class indices `()`, `(N,)` or `(N, d_1, ..., d_K)`, or class probabilities shaped like `input`.
    - `weight`: `(C,)`, class weights. `ignore_index`: rows with this label are dropped, None drops none; not for
      probabilities.
    - `reduction`: `"mean"` divides by the weights of the labels that are not ignored, or, for probabilities, by the
      number of rows; `"sum"`; `"none"`. `size_average`, `reduce`: deprecated, and override it.
    - `label_smoothing`: in [0, 1].

    **Returns:** the type of `input`, or for probabilities the common type of `input`, `target` and `weight`. A label
    out of range gives nan; a mean over nothing is nan, its derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> cross_entropy(jnp.array([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]), jnp.array([2, -100]))
    Array(0.5514447, dtype=float32)
    """
    reduction = check_reduction(reduction, size_average, reduce)
    z = _class_scores(input)
    axis = class_axis(z)
    target = check_target(target, z.shape, axis)
    ignore_index = check_ignore_index(ignore_index)
    if jnp.issubdtype(target.dtype, jnp.floating) and ignore_index is not None and ignore_index >= 0:
        raise ArgumentValueError(f"`ignore_index` goes with class indices, got {ignore_index} and probabilities")
    return _cross_entropy(
        z,
        target,
        check_class_weight(weight, z.shape[axis]),
        arrays.scalar("label_smoothing", label_smoothing, low=0.0, high=1.0, neutral=0.0),
        ignore_index=ignore_index,
        reduction=reduction,
    )


def _class_scores(input: ArrayLike) -> jax.Array:
    z = arrays.floating("input", input)
    if z.ndim == 0:
        raise arrays.shape_error("input", "have shape (C,), (N, C) or (N, C, d_1, ..., d_K)", z)
    return z


@functools.partial(jax.jit, static_argnames=("ignore_index", "reduction"), inline=True)
def _cross_entropy(
    z: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    smoothing: jax.Array | None,
    *,
    ignore_index: int | None,
    reduction: str,
) -> jax.Array:
    classes = ClassAxis(class_axis(z))
    dtype = class_loss_dtype(z, target, weight)
    if classes.size(z) == 0:
        return loss_of_no_classes(target, smoothing, classes, ignore_index, reduction, dtype)
    loss = functools.partial(
        losses.softmax_cross_entropy,
        z,
        target,
        axis=classes.axis,
        class_weights=weight,
        ignore_index=ignore_index,
        label_smoothing=0.0 if smoothing is None else smoothing,
    )
    (wide,) = arrays.accumulated(z)
    rows = row_targets(wide, target, weight, classes, ignore_index)
    lost = lost_rows(wide, rows, weight, smoothing, classes)
    return reduce_rows(loss, rows, lost, classes, reduction, dtype)


@public
def nll_loss(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int | None = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    r"""Negative log-likelihood of labels, as `torch.nn.functional.nll_loss`, in the unit of the log-probabilities.

    $$\ell_n = -c_{y_n} \log p_{n y_n}$$

    **Arguments:** `input`: log-probabilities `(C,)`, `(N, C)` or `(N, C, d_1, ..., d_K)`, floating. `target`: class
    indices. The others as in `cross_entropy`.

    **Returns:** the type of `input`. A label out of range gives nan; a mean over nothing is nan, its derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> nll_loss(jnp.log(jnp.array([[0.3, 0.3, 0.4]])), jnp.array([2]))
    Array(0.9162907, dtype=float32)
    """
    reduction = check_reduction(reduction, size_average, reduce)
    log_p = _class_scores(input)
    axis = class_axis(log_p)
    labels = check_class_indices(target, log_p.shape, axis)
    weight = check_class_weight(weight, log_p.shape[axis])
    ignore_index = check_ignore_index(ignore_index)
    return _nll_loss(log_p, labels, weight, ignore_index=ignore_index, reduction=reduction)


@functools.partial(jax.jit, static_argnames=("ignore_index", "reduction"), inline=True)
def _nll_loss(
    log_p: jax.Array, labels: jax.Array, weight: jax.Array | None, *, ignore_index: int | None, reduction: str
) -> jax.Array:
    classes = ClassAxis(class_axis(log_p))
    if classes.size(log_p) == 0:
        return loss_of_no_classes(labels, None, classes, ignore_index, reduction, log_p.dtype)
    loss = functools.partial(
        losses.nll_loss, log_p, labels, axis=classes.axis, class_weights=weight, ignore_index=ignore_index
    )
    (wide,) = arrays.accumulated(log_p)
    rows = row_targets(wide, labels, weight, classes, ignore_index)
    lost = lost_rows(wide, rows, weight, None, classes)
    return reduce_rows(loss, rows, lost, classes, reduction, log_p.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Losses of entries
