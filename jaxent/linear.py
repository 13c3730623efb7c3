"""Losses straight from hidden states: each is a row loss and the engine, and never holds the logits of all rows."""

import dataclasses
import functools
from typing import Any, Literal, Unpack, overload

import jax
import jax.extend
from jax import lax
from jax.typing import ArrayLike

from jaxent._arguments.options import LinearOptions, Precision
from jaxent._arguments.reduction import Reduction, WeightedSum, check_reduction
from jaxent._arguments.targets import (
    SoftmaxArguments,
    SparseTargets,
    check_class_axis_of_rows,
    check_ignore_index,
    check_softmax_arguments,
    check_vocab_axis_of_rows,
    row_targets,
)
from jaxent._engine.chunking import Chunking
from jaxent._engine.linear_head import (
    LogitTransform,
    check_head,
    check_logit_transform,
    chunking_for,
    counted_rows,
    flat_rows,
    logits_like,
    matrix_products,
    stream_reduced,
)
from jaxent._engine.streaming import Head, Logits, MatrixProducts
from jaxent._errors import public
from jaxent._math.row_losses import LossOptions, RowTargets, ignore_zero_weight_rows, softmax_loss
from jaxent._math.statistics import TokenStatistics, row_statistics
from jaxent._mesh.class_axis import ClassAxis


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Literal["sum_and_weight"],
    with_statistics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> WeightedSum: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Reduction = "mean",
    with_statistics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Any, TokenStatistics]: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    with_statistics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> jax.Array: ...
@public
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    with_statistics: bool = False,
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> jax.Array | WeightedSum | tuple[jax.Array | WeightedSum, TokenStatistics]:
    r"""`softmax_cross_entropy` of the logits of a linear layer, without the logits, in nats.

    $$z_n = \mathrm{cap}(h_n W + b) / T, \qquad \mathrm{cap}(x) = s \tanh(x / s)$$

    and then the loss of `softmax_cross_entropy`. Rows are taken a chunk at a time, so that the memory does not grow
    with their number, and value and gradient cost three matrix products, as many as dense code spends. Forward mode,
    Hessian products, `vmap`, `scan` and sharding work as through any function. Take a Hessian-vector product as
    `jax.jvp(jax.grad(loss), ...)`: reverse over reverse keeps the logits of all chunks. The soft cap is that of Gemma 2
    (2024), section 2.

    **Arguments:**

    - `hidden`: `(*batch, features)`, floating. `kernel`: `(features, classes)`; a `(classes, features)` embedding is
      passed as `embedding.T`, which the CPU back end turns once a call. `bias`: `(classes,)`.
    - `targets`, `where`, `weights`, `class_weights`, `ignore_index`, `label_smoothing`, `z_loss`, `reduction`,
      `denominator`, `vocab_axis`: as in `softmax_cross_entropy`, for logits `(*batch, classes)`. With `vocab_axis`,
      `kernel` and `bias` hold this device's classes and `hidden` is the same on all devices of the axis.
    - `soft_cap`: `s > 0`; None for no cap. `temperature`: `T > 0`. Both may be learnt.
    - `with_statistics`: also return the `TokenStatistics` of the logits after soft cap and temperature, from the same
      pass: constants, at no product more. `log_prob` and `rank` are None where targets are probabilities.
    - `chunk_rows`: rows at a time; None takes what `plan` says. `"none"` computes the logits again on the way back:
      four products.
    - `precision`: of the matrix products, as in `jax.lax.dot_general`. None means float32 accuracy for float32 inputs
      (`"highest"`) unless `jax.default_matmul_precision` is set; pass `"tensorfloat32"` or `"default"` for the faster
      products of GPUs and TPUs. bf16 inputs are multiplied as bf16 and added in float32.

    **Returns:** as `softmax_cross_entropy`, and with `with_statistics` a pair of that and the statistics, `(*batch,)`
    each, which are 0 in floating and -1 in integer fields of dropped rows. Gradients come back in the dtypes of the
    inputs. A dropped row costs nothing and adds exactly 0 to every gradient, even if its `hidden` is nan. A label out
    of range gives nan in its row of the gradient with respect to `hidden`, and in all of the gradients with respect to
    `kernel` and `bias`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel = jnp.ones((2, 3)), jnp.zeros((3, 5))
    >>> linear_softmax_cross_entropy(hidden, kernel, jnp.array([0, 4]))
    Array(1.609438, dtype=float32)
    """
    head, batch = check_head(hidden, kernel, bias)
    logits_shape = (*batch, head.kernel.shape[1])
    # Hidden states that were gathered over the axis are typed as differing along it, as split ones are. Split ones have
    # another shape than targets.
    check_vocab_axis_of_rows(vocab_axis, targets, where=where, weights=weights)
    arguments = check_softmax_arguments(
        logits_shape,
        -1,
        targets,
        where=where,
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    divisor = check_reduction(reduction, denominator)
    check_class_axis_of_rows(vocab_axis, {"kernel": (head.kernel, 1)}, arguments)
    losses, statistics = _linear_softmax_cross_entropy(
        head,
        flat_rows(arguments, batch),
        check_logit_transform(soft_cap, temperature),
        divisor,
        row_fn=SoftmaxRowLoss(ClassAxis(-1, vocab_axis), with_statistics),
        ignore_index=check_ignore_index(ignore_index),
        reduction=reduction,
        chunking=chunking_for(chunk_rows, head),
        products=matrix_products(precision, head),
    )
    losses = batch.unflatten(losses) if reduction == "none" else losses
    return (losses, jax.tree.map(batch.unflatten, statistics)) if with_statistics else losses


@dataclasses.dataclass(frozen=True)
class SoftmaxRowLoss:
    """The row losses of `softmax_cross_entropy` as the engine takes them, with or without the rows' statistics."""

    classes: ClassAxis
    with_statistics: bool = False

    def __call__(
        self, logits: Logits, rows: RowTargets, shared: tuple[LogitTransform, LossOptions]
    ) -> tuple[jax.Array, TokenStatistics | None]:
        transform, options = shared
        z = transform(logits[0])
        rows = ignore_zero_weight_rows(rows, self.classes, z)
        losses = softmax_loss(z, rows, options, self.classes)[:, 0]
        if not self.with_statistics:
            return losses, None
        return losses, lax.stop_gradient(row_statistics(lax.stop_gradient(z), rows, self.classes, 0))


@functools.partial(
    jax.jit, static_argnames=("row_fn", "ignore_index", "reduction", "chunking", "products"), inline=True
)
def _linear_softmax_cross_entropy(
    head: Head,
    arguments: SoftmaxArguments,
    transform: LogitTransform,
    divisor: jax.Array | None,
    *,
    row_fn: SoftmaxRowLoss,
    ignore_index: int | None,
    reduction: Reduction,
    chunking: Chunking,
    products: MatrixProducts,
) -> tuple[jax.Array | WeightedSum, TokenStatistics | None]:
    rows, options = row_targets(arguments, logits_like(head), row_fn.classes, ignore_index)
    rows, counted = counted_rows(rows, arguments, ignore_index, head.hidden)
    return stream_reduced(
        row_fn,
        (head,),
        rows,
        (transform, options),
        counted,
        rows.total_weights(ClassAxis()),
        reduction,
        divisor,
        chunking,
        products,
    )
