"""The distribution of the data itself."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxent._arguments import arrays
from jaxent._arguments.targets import check_row_arguments, nan_if_negative
from jaxent._errors import ArgumentValueError, public
from jaxent._math.label_loss import INVALID, encode_labels
from jaxent._math.two_float import two_float_histogram, two_float_sum
from jaxent._mesh.apply import with_auto_axes
from jaxent._mesh.types import mesh_of
from jaxent._typing import ArrayLike


@public
def empirical_distribution(
    labels: ArrayLike | tuple[ArrayLike, ...],
    num_classes: int | tuple[int, ...],
    *,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""The distribution of labels in the data, alone or of several labels together: relative frequencies.

    $$\hat P(k) = \frac{\sum_n w_n [y_n = k]}{\sum_n w_n}$$

    Cover & Thomas (2006), section 11.1 (the type of a sequence). Counts are exact integers, and weights add up without
    rounding, however many there are. For a table of counts `c`, write `c / c.sum()`.

    **Arguments:**

    - `labels`: class indices, any shape and integer dtype, all together one sample. With a tuple of `num_classes`, a
      tuple of as many arrays of one shape, for the joint distribution of their entries at the same place.
    - `num_classes`: a Python int, or a tuple of one for each array.
    - `weights`: shaped like the labels, each >= 0; None counts every label once.

    **Returns:** `(num_classes,)`, or the joint table with an axis for each array, in the default floating dtype, or
    with floating weights float64 for float64, else float32. A label out of range gives nan everywhere, unless its
    weight is 0; so does a negative or infinite weight. Without a label or weight there is no distribution: nan
    everywhere.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or `num_classes < 1`.

    >>> empirical_distribution(jnp.array([0, 2, 2, 1]), 3)
    Array([0.25, 0.25, 0.5 ], dtype=float32)
    >>> empirical_distribution((jnp.array([0, 1, 1, 1]), jnp.array([1, 0, 1, 0])), (2, 2))
    Array([[0.  , 0.25],
           [0.5 , 0.25]], dtype=float32)
    """
    if isinstance(num_classes, tuple):
        counts = tuple(_class_count(count) for count in num_classes)
        if not isinstance(labels, (tuple, list)) or len(labels) != len(counts) or not counts:
            expected = f"be a tuple of {len(counts)} arrays, as `num_classes` says"
            raise arrays.dtype_error("labels", expected, labels)
        variables = tuple(arrays.integer(f"labels[{i}]", y) for i, y in enumerate(labels))
        for i, y in enumerate(variables):
            arrays.check_shape(f"labels[{i}]", y, variables[0].shape, "that of `labels[0]`")
    elif isinstance(labels, tuple) and any(np.ndim(y) for y in labels):
        expected = f"be a tuple of {len(labels)} counts, one for each array of `labels`"
        raise arrays.dtype_error("num_classes", expected, num_classes)
    else:
        sample: Any = labels
        counts, variables = (_class_count(num_classes),), (arrays.integer("labels", sample),)
    if math.prod(counts) > np.iinfo(np.int32).max:
        raise ArgumentValueError(f"`num_classes` must have a product below 2**31, got {num_classes}")
    _, weights = check_row_arguments(variables[0].shape, None, weights)
    return _empirical_distribution(variables, nan_if_negative(weights), counts=counts)


def _class_count(count: Any) -> int:
    count = arrays.as_int("num_classes", count)
    if count < 1:
        raise ArgumentValueError(f"`num_classes` must be at least 1, got {count}")
    return count


@functools.partial(jax.jit, static_argnames=("counts",), inline=True)
def _empirical_distribution(
    variables: tuple[jax.Array, ...], weights: jax.Array | None, *, counts: tuple[int, ...]
) -> jax.Array:
    table = functools.partial(_table, counts=counts)
    return with_auto_axes(
        table, variables, weights, mesh=mesh_of(*jax.tree.leaves((variables, weights))), out_specs=P()
    )


def _table(variables: tuple[jax.Array, ...], weights: jax.Array | None, *, counts: tuple[int, ...]) -> jax.Array:
    cells = math.prod(counts)
    cell, invalid = jnp.zeros(variables[0].size, jnp.int32), jnp.zeros(variables[0].size, bool)
    for labels, count in zip(variables, counts, strict=True):
        codes = encode_labels(labels, count).reshape(-1)
        cell, invalid = cell * count + codes, invalid | (codes == INVALID)
    # An index out of range is dropped; a negative one would count from the end.
    cell = jnp.where(invalid, cells, cell)
    if weights is None:
        sums = jnp.zeros(cells, jnp.int32).at[cell].add(1, mode="drop")
        p = sums.astype(jnp.result_type(float)) / jnp.sum(sums).astype(jnp.result_type(float))
    else:
        (amounts,) = arrays.accumulated(weights.reshape(-1))
        invalid &= amounts != 0
        sums = two_float_histogram(cell, amounts, cells)
        total = two_float_sum(sums.hi).plus(two_float_sum(sums.lo))
        p = jnp.where((total.hi == 0) | ~jnp.isfinite(total.hi), jnp.nan, sums.over(total))
    return jnp.where(jnp.any(invalid), jnp.nan, p).reshape(counts)
