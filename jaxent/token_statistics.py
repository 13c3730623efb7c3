"""What one pass over the classes tells about each row, from logits or straight from hidden states."""

import functools

import jax
from jax.typing import ArrayLike

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.targets import (
    SoftmaxArguments,
    check_ignore_index,
    check_labels,
    check_logits,
    check_row_arguments,
    check_top_k,
    row_targets,
    rows_shape,
)
from jaxent._engine.chunking import Chunking
from jaxent._engine.linear_head import (
    LogitTransform,
    check_head,
    check_logit_transform,
    chunking_for,
    counted_rows,
    logits_like,
    matrix_products,
)
from jaxent._engine.streaming import Head, Logits, MatrixProducts, stream_rows
from jaxent._errors import public
from jaxent._math.row_losses import RowTargets
from jaxent._math.statistics import TokenStatistics, row_statistics
from jaxent._mesh.apply import map_rows
from jaxent._mesh.check import check_class_axis, check_vocab_axis
from jaxent._mesh.class_axis import ClassAxis


@public
def token_statistics(
    logits: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = -100,
    top_k: int = 0,
    vocab_axis: str | None = None,
) -> TokenStatistics:
    r"""Per-row log-probability, log-normaliser, entropy, argmax, rank and top classes, in nats.

    $$\log p_y = z_y - \mathrm{lse}(z), \quad H = -\sum_k p_k \log p_k, \quad
    \mathrm{rank} = |\{k : z_k > z_y\}|$$

    **Arguments:**

    - `logits`: `(*batch, classes)`, floating, the classes at `axis`.
    - `labels`: `(*batch,)`, integer; without them `log_prob` and `rank` are None.
    - `where`: `(*batch,)`, bool; `ignore_index`: a label. Which rows are dropped: the statistics of a dropped row are 0
      in floating and -1 in integer fields, and its gradient is exactly 0.
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
    z, axis = check_logits("logits", logits, axis)
    check_vocab_axis(vocab_axis, {"labels": labels, "where": where})
    if labels is not None:
        labels = check_labels("labels", labels, rows_shape(z.shape, axis))
    where, _ = check_row_arguments(rows_shape(z.shape, axis), where, None)
    check_class_axis(vocab_axis, {"logits": (z, axis)}, {"labels": labels, "where": where})
    classes = ClassAxis(axis, vocab_axis)
    return _token_statistics(
        z,
        SoftmaxArguments(labels, where),
        classes=classes,
        ignore_index=check_ignore_index(ignore_index),
        top_k=check_top_k(top_k, classes.size(z)),
    )


@functools.partial(jax.jit, static_argnames=("classes", "ignore_index", "top_k"), inline=True)
def _token_statistics(
    logits: jax.Array, arguments: SoftmaxArguments, *, classes: ClassAxis, ignore_index: int | None, top_k: int
) -> TokenStatistics:
    def statistics(logits: jax.Array, arguments: SoftmaxArguments) -> TokenStatistics:
        (z,) = arrays.accumulated(logits)
        rows, _ = row_targets(arguments, z, classes, ignore_index)
        return row_statistics(z, rows, classes, top_k)

    return map_rows(statistics, logits, arguments, without=classes.axis)


@public
def linear_token_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    ignore_index: int | None = -100,
    top_k: int = 0,
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> TokenStatistics:
    r"""`token_statistics` of the logits of a linear layer, without the logits, in nats.

    $$z_n = \mathrm{cap}(h_n W + b) / T, \qquad \mathrm{cap}(x) = s \tanh(x / s)$$

    **Arguments:** `hidden` `(*batch, features)`, `kernel` `(features, classes)`, `bias`, `soft_cap`, `temperature`,
    `chunk_rows`, `precision` as in `linear_softmax_cross_entropy`; `labels` `(*batch,)`, `where`, `ignore_index`,
    `top_k` and `vocab_axis` as in `token_statistics`. Dropped rows cost nothing.

    **Returns:** `TokenStatistics` with leaves `(*batch,)`, and `(*batch, top_k)` for the top classes. Log-probability,
    log-normaliser and entropy are differentiable; their gradient costs four matrix products.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> stats = linear_token_statistics(jnp.ones((2, 3)), jnp.zeros((3, 4)), jnp.array([0, 3]))
    >>> stats.entropy
    Array([1.3862944, 1.3862944], dtype=float32)
    """
    head, batch = check_head(hidden, kernel, bias)
    rows = {"hidden": head.hidden} if labels is None else {"labels": labels}
    check_vocab_axis(vocab_axis, {**rows, "where": where})
    if labels is not None:
        labels = check_labels("labels", labels, batch)
    where, _ = check_row_arguments(batch, where, None)
    check_class_axis(vocab_axis, {"kernel": (head.kernel, 1)}, {"labels": labels, "where": where})
    classes = ClassAxis(-1, vocab_axis)
    statistics = _linear_token_statistics(
        head,
        SoftmaxArguments(*(None if x is None else batch.flatten(x) for x in (labels, where))),
        check_logit_transform(soft_cap, temperature),
        classes=classes,
        ignore_index=check_ignore_index(ignore_index),
        top_k=check_top_k(top_k, classes.size(head.kernel)),
        chunking=chunking_for(chunk_rows, head),
        products=matrix_products(precision, head),
    )
    return jax.tree.map(batch.unflatten, statistics)


@functools.partial(jax.jit, static_argnames=("classes", "ignore_index", "top_k", "chunking", "products"), inline=True)
def _linear_token_statistics(
    head: Head,
    arguments: SoftmaxArguments,
    transform: LogitTransform,
    *,
    classes: ClassAxis,
    ignore_index: int | None,
    top_k: int,
    chunking: Chunking,
    products: MatrixProducts,
) -> TokenStatistics:
    rows, _ = row_targets(arguments, logits_like(head), classes, ignore_index)
    rows, counted = counted_rows(rows, arguments, ignore_index)

    def row_fn(logits: Logits, rows: RowTargets, transform: LogitTransform) -> TokenStatistics:
        return row_statistics(transform(logits[0]), rows, classes, top_k)

    return stream_rows(row_fn, (head,), rows, transform, chunking, products, counted)
