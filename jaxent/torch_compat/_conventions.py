"""The rules of PyTorch that are not this library's: reductions, result types, and where a result is nan."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._arguments import arrays, targets
from jaxent._arguments.targets import SoftmaxArguments, check_labels, rows_shape
from jaxent._errors import ArgumentValueError
from jaxent._math.label_loss import has_label
from jaxent._math.row_losses import RowTargets
from jaxent._mesh.class_axis import ClassAxis
from jaxent._typing import ArrayLike, DTypeLike

# ----------------------------------------------------------------------------------------------------------------------
# Reductions


def legacy_reduction(size_average: bool | None, reduce: bool | None, stacklevel: int) -> str:
    """What the deprecated `size_average` and `reduce` stand for, of which None counts as True.

    `stacklevel` counts from the caller of this function.
    """
    averaged, reduced = (flag is None or bool(flag) for flag in (size_average, reduce))
    reduction = ("mean" if averaged else "sum") if reduced else "none"
    warnings.warn(
        f"size_average and reduce are deprecated: pass reduction={reduction!r} instead",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
    return reduction


def check_reduction(
    reduction: str,
    size_average: bool | None = None,
    reduce: bool | None = None,
    *,
    allowed: tuple[str, ...] = ("mean", "sum", "none"),
) -> str:
    """One of `allowed`; the deprecated flags, if there are any, override `reduction`. Called by the public function."""
    if size_average is not None or reduce is not None:
        return legacy_reduction(size_average, reduce, stacklevel=4)
    if reduction == "elementwise_mean":
        message = "reduction='elementwise_mean' is deprecated: pass reduction='mean' instead"
        warnings.warn(message, DeprecationWarning, stacklevel=4)
        return "mean"
    if reduction not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ArgumentValueError(f"`reduction` must be one of {expected}, got {reduction!r}")
    return reduction


def reduce_rows(
    loss: Callable[..., Any],
    rows: RowTargets,
    lost: jax.Array | None,
    classes: ClassAxis,
    reduction: str,
    dtype: np.dtype,
) -> jax.Array:
    """`loss(reduction=...)`, a loss of this library, with PyTorch's mean: nan, with derivative 0, if no row counts, and
    otherwise a quotient by whatever the weights sum to.

    `lost` are the rows whose loss is nan in PyTorch, which leaves their derivative as it is; None is none.
    """
    if reduction == "none":
        return with_nan(loss(reduction="none"), lost).astype(dtype)
    summed = loss(reduction="sum_and_weight")
    total = with_nan(summed.total, None if lost is None else jnp.any(lost))
    if reduction == "mean":
        # PyTorch divides each part of a smoothed loss: 0 / 0 makes the sum nan even where the other part is x / 0.
        mean = total / jnp.where(jnp.all(rows.ignored), 1, summed.weight)
        return with_nan(mean, jnp.all(rows.total_weights(classes) == 0)).astype(dtype)
    return total.astype(dtype)


def reduce_entries(losses: jax.Array, reduction: str, dtype: np.dtype) -> jax.Array:
    """The mean divides by the number of entries, whatever they weigh."""
    if reduction == "none":
        return losses.astype(dtype)
    return (jnp.mean(losses) if reduction == "mean" else jnp.sum(losses)).astype(dtype)


def loss_of_no_classes(
    target: jax.Array,
    smoothing: jax.Array | None,
    classes: ClassAxis,
    ignore_index: int | None,
    reduction: str,
    dtype: np.dtype,
) -> jax.Array:
    """Where `C` is 0: a row of probabilities adds 0, and so does an ignored row, unless it is smoothed by 1 / C."""
    if jnp.issubdtype(target.dtype, jnp.integer):
        ignored = has_label(target, ignore_index)
        losses = jnp.where(ignored & (smoothing is None), 0.0, jnp.nan)
        total = jnp.sum(losses) if smoothing is None else jnp.full((), jnp.nan)
    else:
        losses = jnp.zeros(rows_shape(target.shape, classes.axis))
        total = jnp.sum(losses)
    return {"none": losses, "sum": total, "mean": jnp.full((), jnp.nan)}[reduction].astype(dtype)


def with_nan(losses: jax.Array, lost: jax.Array | None) -> jax.Array:
    return losses if lost is None else losses + jnp.where(lost, jnp.nan, 0).astype(losses.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def promoted_dtype(*arrays: jax.Array | None) -> np.dtype:
    """The common type of the arrays; one without dimensions does not widen those that have some."""
    present = [a for a in arrays if a is not None]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*([a.dtype for a in present if a.ndim] or [a.dtype for a in present]))


def class_loss_dtype(z: jax.Array, target: jax.Array, weight: jax.Array | None) -> np.dtype:
    """Class indices are looked up, and probabilities multiplied: their type counts."""
    return z.dtype if jnp.issubdtype(target.dtype, jnp.integer) else promoted_dtype(z, target, weight)


def check_target(target: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Class indices or class probabilities for logits of `shape`; PyTorch tells them apart by their shape, which for
    every valid target is what their type says.
    """
    target = arrays.as_array("target", target)
    if jnp.issubdtype(target.dtype, jnp.integer):
        return check_class_indices(target, shape, axis)
    target = arrays.floating("target", target)
    note = f"class probabilities are shaped like the logits, and class indices are integers{_where(shape, axis)}"
    arrays.check_shape("target", target, shape, note)
    return target


def check_class_indices(target: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    target = arrays.as_array("target", target)
    note = f"one class index for each row{_where(shape, axis)}"
    if len(shape) > 2 and target.shape == shape[:-1]:
        note += "; if they lie on the last one, pass jnp.moveaxis(input, -1, 1)"
    return check_labels("target", target, rows_shape(shape, axis), note)


def _where(shape: tuple[int, ...], axis: int) -> str:
    return f"; the {shape[axis]} classes lie on axis {len(shape) + axis} of shape {shape}, as in PyTorch"


def check_class_weight(weight: ArrayLike | None, count: int) -> jax.Array | None:
    if weight is None:
        return None
    weight = arrays.real("weight", weight)
    arrays.check_shape("weight", weight, (count,), "one weight for each class")
    return weight


def check_entry_weight(argument: str, weight: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    if weight is None:
        return None
    weight = arrays.real(argument, weight)
    arrays.check_broadcast(argument, weight, shape, "`input`")
    return weight


def class_axis(z: jax.Array) -> int:
    """1 of `(N, C, ...)`, 0 of `(C,)`, counted from the end."""
    return (0 if z.ndim == 1 else 1) - z.ndim


def cast(x: ArrayLike, dtype: DTypeLike | None) -> jax.Array:
    """`x` in `dtype`, which must be floating, as `x` must without one."""
    if dtype is None:
        return arrays.floating("input", x)
    try:
        name = np.dtype(dtype).name
    except TypeError:
        raise arrays.dtype_error("dtype", "be a floating dtype", dtype) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise arrays.dtype_error("dtype", "be a floating dtype", name)
    return arrays.real("input", x).astype(jax.dtypes.canonicalize_dtype(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Where PyTorch multiplies 0 and infinity


def row_targets(
    z: jax.Array | jax.ShapeDtypeStruct,
    target: jax.Array,
    weight: jax.Array | None,
    classes: ClassAxis,
    ignore_index: int | None,
) -> RowTargets:
    return targets.row_targets(SoftmaxArguments(target, class_weights=weight), z, classes, ignore_index)[0]


def lost_rows(
    z: jax.Array, rows: RowTargets, weight: jax.Array | None, smoothing: jax.Array | None, classes: ClassAxis
) -> jax.Array | None:
    """The rows in which a class with log-probability -inf has a share of 0 in the loss; None if no row can be one.

    `z` are logits or log-probabilities; one row may stand for all.
    """
    smoothing = None if smoothing is None else smoothing.astype(z.dtype)
    weight = (
        None if weight is None else weight.reshape([-1 if i - z.ndim == classes.axis else 1 for i in range(z.ndim)])
    )
    if rows.probabilities is not None:
        shares = rows.probabilities
        if smoothing is not None:
            shares = (1 - smoothing) * shares + smoothing / classes.size(z)
        no_share = shares == 0 if weight is None else (shares == 0) | (weight == 0)
        return _any(jnp.isinf(z) & no_share, classes)
    if weight is None and smoothing is None:
        return None
    assert rows.labels is not None
    shares = jnp.ones_like(rows.labels, z.dtype) if rows.label_weights is None else rows.label_weights
    if smoothing is not None:
        shares = (1 - smoothing) * shares
    counted = jnp.squeeze(~rows.ignored, classes.axis)
    lost = counted & jnp.squeeze(jnp.isinf(classes.take(z, rows.labels)) & (shares == 0), classes.axis)
    if weight is None or smoothing is None:
        return lost
    return lost | (_any(jnp.isinf(z) & (weight == 0), classes) & counted)


def _any(mask: jax.Array, classes: ClassAxis) -> jax.Array:
    return jnp.any(mask, axis=classes.axis)


def lost_logits(z: jax.Array, t: jax.Array, pos_weight: jax.Array | None) -> jax.Array:
    """The infinite logits at which `(1 - t) z - (1 + (c - 1) t) log sigmoid(z)` is nan."""
    slope = 1 if pos_weight is None else 1 + (pos_weight - 1) * t
    return jnp.isinf(z) & jnp.isnan((1 - t) * z - slope * jnp.minimum(z, 0))


@jax.custom_jvp
def clamped_binary_nll(x: jax.Array, t: jax.Array) -> jax.Array:
    """`-t log x - (1 - t) log(1 - x)` with logarithms of at least -100; nan for an operand outside [0, 1].

    The derivatives are PyTorch's: with respect to `x` with a divisor of at least 1e-12, with respect to `t` without the
    bound on the logarithms.
    """
    inside = (x >= 0) & (x <= 1) & (t >= 0) & (t <= 1)
    value = (t - 1) * jnp.maximum(jnp.log1p(-x), -100) - t * jnp.maximum(jnp.log(x), -100)
    return value + jnp.where(inside, 0, jnp.nan).astype(x.dtype)


# A float32 constant in PyTorch, also for float64.
_LEAST_VARIANCE = float(np.float32(1e-12))


@clamped_binary_nll.defjvp
def _clamped_binary_nll_jvp(primals, tangents):
    (x, t), (dx, dt) = primals, tangents
    value = clamped_binary_nll(x, t)
    by_x = (x - t) / jnp.maximum((1 - x) * x, _LEAST_VARIANCE)
    # At the ends the derivative with respect to `t` is infinite; as in `safe.pole`, so that a tangent of 0 stays 0.
    end = (x == 0) | (x == 1)
    between = jnp.where(end, 0.5, x)
    by_t = jnp.log1p(-between) - jnp.log(between)
    big = jnp.where(end, (1 - 2 * x) * float(jnp.finfo(x.dtype).max), 0)
    # `0 * value` is nan where the value is.
    return value, (by_x + 0 * lax.stop_gradient(value)) * dx + by_t * dt + (dt * big) * jnp.abs(big)
