"""The distribution of the data itself."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxent._arguments import arrays
from jaxent._arguments.targets import check_row_arguments, nan_if_negative
from jaxent._errors import ArgumentValueError, public
from jaxent._math.label_loss import INVALID, encode_labels


@public
def empirical_distribution(labels: ArrayLike, num_classes: int, *, weights: ArrayLike | None = None) -> jax.Array:
    r"""The distribution of labels in the data: relative frequencies.

    $$\hat P(k) = \frac{\sum_n w_n [y_n = k]}{\sum_n w_n}$$

    Cover & Thomas (2006), section 11.1 (the type of a sequence). Counts are exact integers; weights add up in float32.

    **Arguments:** `labels`: class indices, any shape and integer dtype, all of one sample. `num_classes`: a Python int.
    `weights`: shaped like `labels`, each >= 0; None counts every label once.

    **Returns:** `(num_classes,)`, the default floating dtype, or with floating weights float64 for float64, else
    float32. A label out of range gives nan everywhere, unless its weight is 0; so does a negative weight. Without a
    label or weight there is no distribution: nan everywhere.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or `num_classes < 1`.

    >>> empirical_distribution(jnp.array([0, 2, 2, 1]), 3)
    Array([0.25, 0.25, 0.5 ], dtype=float32)
    """
    labels = arrays.integer("labels", labels)
    num_classes = arrays.as_int("num_classes", num_classes)
    if num_classes < 1:
        raise ArgumentValueError(f"`num_classes` must be at least 1, got {num_classes}")
    _, weights = check_row_arguments(labels.shape, None, weights)
    return _empirical_distribution(labels, nan_if_negative(weights), count=num_classes)


@functools.partial(jax.jit, static_argnames=("count",), inline=True)
def _empirical_distribution(labels: jax.Array, weights: jax.Array | None, *, count: int) -> jax.Array:
    labels = encode_labels(labels, count).reshape(-1)
    if weights is None:
        dtype, amounts = jnp.result_type(float), jnp.ones(labels.shape, jnp.int32)
    else:
        (amounts,) = arrays.accumulated(weights.reshape(-1))
        dtype = amounts.dtype
    invalid = jnp.any((labels == INVALID) & (amounts != 0))
    # An index out of range is dropped; a negative one would count from the end.
    index = jnp.where(labels == INVALID, count, labels)
    sums = jnp.zeros(count, amounts.dtype).at[index].add(amounts, mode="drop")
    return jnp.where(invalid, jnp.nan, sums.astype(dtype) / jnp.sum(sums).astype(dtype))
