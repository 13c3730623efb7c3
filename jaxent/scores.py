"""Scores of forecasts: probabilities against what came."""

import functools
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._arguments.class_axes import flatten_classes
from jaxent._arguments.distributions import Axes, Axis, check_class_axes, probabilities
from jaxent._arguments.options import ScoreOptions
from jaxent._arguments.reduction import Reduction, WeightedSum, check_reduction, reduce_losses
from jaxent._arguments.targets import (
    SparseTargets,
    check_ignore_index,
    check_labels,
    check_row_arguments,
    check_sparse_targets,
    sparse_row,
)
from jaxent._errors import public
from jaxent._math.label_loss import INVALID, encode_labels, has_label
from jaxent._math.row_losses import weighted
from jaxent._mesh.apply import map_rows
from jaxent._mesh.class_axis import ClassAxis, row_sum
from jaxent._typing import ArrayLike


@overload
def brier_score(
    probabilities: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Literal["sum_and_weight"],
    **options: Unpack[ScoreOptions],
) -> WeightedSum: ...
@overload
def brier_score(
    probabilities: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[ScoreOptions],
) -> jax.Array: ...
@public
def brier_score(
    probabilities: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
) -> jax.Array | WeightedSum:
    r"""Brier score of forecasts, a pure number from 0 (certain and right) to 2 (certain and wrong).

    $$\mathrm{BS} = \frac{1}{\sum_n w_n} \sum_n w_n \sum_k (p_{nk} - t_{nk})^2$$

    Brier (1950), equation 2, with $t$ one-hot for class indices. With two classes it is twice
    `sklearn.metrics.brier_score_loss`.

    **Arguments:**

    - `probabilities`: `(*batch, classes)`, floating; the classes lie at `axis`, or at all of a tuple of axes.
    - `targets`: `(*batch,)` class indices of any integer dtype, class probabilities shaped like `probabilities`, or
      `SparseTargets`. With several class axes an index counts the classes row by row.
    - `where`: `(*batch,)` bool; False drops a row. `weights`: `(*batch,)`, row weights. `ignore_index`: drops the rows
      with this label; None drops none.
    - `reduction`: `"mean"`, `"sum"`, `"none"` or `"sum_and_weight"`, as in `softmax_cross_entropy`.

    **Returns:** float64 for float64 probabilities, else float32. A dropped row adds exactly 0, whatever it holds. A
    label out of range, and a negative or nan probability, gives nan. The mean of nothing is 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or reduction.

    >>> brier_score(jnp.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]), jnp.array([0, 1]))
    Array(0.1875, dtype=float32)
    """
    p = _probabilities("probabilities", probabilities)
    axes = arrays.canonical_axes(axis, max(p.ndim, 1))
    check_class_axes("probabilities", p, axes)
    rows = tuple(n for i, n in enumerate(p.shape) if i - p.ndim not in axes)
    sparse = isinstance(targets, SparseTargets)
    kind: Any = None if sparse else arrays.as_array("targets", targets).dtype
    if isinstance(targets, SparseTargets):
        t: Any = check_sparse_targets(targets, rows)
    elif jnp.issubdtype(kind, jnp.floating):
        t = arrays.floating("targets", targets)
        arrays.check_shape("targets", t, p.shape, "class probabilities are shaped like the forecasts")
    else:
        t = check_labels("targets", targets, rows)
    where, weights = check_row_arguments(rows, where, weights)
    check_reduction(reduction, None)
    ignore_index = check_ignore_index(ignore_index)
    return _brier_score(p, t, where, weights, axes=axes, ignore_index=ignore_index, reduction=reduction)


_probabilities = probabilities  # which is also the name of an argument


@functools.partial(jax.jit, static_argnames=("axes", "ignore_index", "reduction"), inline=True)
def _brier_score(
    p: jax.Array,
    t: jax.Array | SparseTargets,
    where: jax.Array | None,
    weights: jax.Array | None,
    *,
    axes: Axes,
    ignore_index: int | None,
    reduction: Reduction,
) -> jax.Array | WeightedSum:
    p = flatten_classes(p, axes)
    if isinstance(t, jax.Array) and jnp.issubdtype(t.dtype, jnp.floating):
        t = flatten_classes(t, axes)
    weighted_losses = functools.partial(_weighted_losses, ignore_index)
    losses, counted = map_rows(weighted_losses, p, t, where, weights, without=-1)
    return reduce_losses(losses, counted, reduction, None)


def _weighted_losses(
    ignore_index: int | None,
    p: jax.Array,
    t: jax.Array | SparseTargets,
    where: jax.Array | None,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    (p,) = arrays.accumulated(p)
    bad = ~jnp.all(p >= 0, axis=-1)
    ignored = jnp.zeros_like(bad)
    if isinstance(t, SparseTargets):
        row, none = sparse_row(t, ClassAxis(), p.shape[-1], p.dtype, None, ignore_index)
        ignored |= jnp.squeeze(none, -1)
        bad |= jnp.any(jnp.isnan(row.shares), axis=-1)
        t = ClassAxis().spread(row.shares, row.labels, p)
    elif jnp.issubdtype(t.dtype, jnp.integer):
        labels = encode_labels(t, p.shape[-1])
        ignored |= has_label(t, ignore_index)
        bad |= labels == INVALID
        t = ClassAxis().is_class(labels[..., None], p).astype(p.dtype)
    else:
        t = t.astype(p.dtype)
        bad |= jnp.any(jnp.isnan(t), axis=-1)
    counted = jnp.ones(p.shape[:-1], p.dtype) if weights is None else weights.astype(p.dtype)
    dropped = ignored | (bad & (counted == 0))
    if where is not None:
        dropped |= ~where
    gaps = jnp.where(dropped[..., None], 0, p - t)
    losses = jnp.where(bad & ~dropped, jnp.nan, row_sum(gaps * gaps, -1, keepdims=False))
    counted = jnp.where(dropped, 0, counted)
    return weighted(counted, losses), counted
