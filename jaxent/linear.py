"""Losses straight from hidden states: each is a row loss and the engine, and never holds the logits of all rows."""

import dataclasses
import functools
from typing import Any, Literal, Unpack, overload

import jax
import jax.extend
from jax import lax

from jaxent._arguments.options import LinearOptions, Precision
from jaxent._arguments.reduction import Reduction, WeightedSum
from jaxent._arguments.targets import (
    SoftmaxArguments,
    SparseTargets,
)
from jaxent._engine.linear_head import (
    LinearCall,
    LogitTransform,
    check_linear_call,
    stream_reduced,
    wide_rows,
)
from jaxent._engine.streaming import Logits
from jaxent._errors import public
from jaxent._math.row_losses import LossOptions, RowTargets, ignore_zero_weight_rows, softmax_loss
from jaxent._math.statistics import TokenStatistics, row_statistics
from jaxent._mesh.class_axis import (
    ClassAxis,
    VocabAxis,
)
from jaxent._typing import ArrayLike, DTypeLike


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
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> jax.Array | WeightedSum | tuple[jax.Array | WeightedSum, TokenStatistics]:
    r"""`softmax_cross_entropy` of the logits of a linear layer, without the logits, in nats.

    $$z_n = \mathrm{cap}(h_n W + b) / T, \qquad \mathrm{cap}(x) = s \tanh(x / s)$$

    and then the loss of `softmax_cross_entropy`. Rows are processed in chunks, so that the memory does not grow with
    their number, and value and gradient cost three matrix products, as many as dense code spends. Forward mode, Hessian
    products, `vmap`, `scan` and sharding work as through any function. Take a Hessian-vector product as
    `jax.jvp(jax.grad(loss), ...)`: reverse over reverse keeps the logits of all chunks. `vmap` over examples with a
    shared kernel holds a gradient of the kernel for each of them: pass the whole `(*batch, features)` instead. In a
    `scan` of losses, take the gradient inside the step, or wrap the loss in `jax.checkpoint`. The soft cap is that of
    Gemma 2 (2024), section 2.

    **Arguments:**

    - `hidden`: `(*batch, features)`, floating. `kernel`: `(features, classes)`; a `(classes, features)` embedding is
      passed as `embedding.T`, which the CPU back end transposes once per call. `bias`: `(classes,)`.
    - `targets`, `where`, `weights`, `class_weights`, `ignore_index`, `label_smoothing`, `z_loss`, `reduction`,
      `denominator`, `vocab_axis`: as in `softmax_cross_entropy`, for logits `(*batch, classes)`. With `vocab_axis`,
      `kernel` and `bias` hold this device's classes and `hidden` is the same on all devices of the axis.
    - `soft_cap`: `s > 0`; None for no cap. `temperature`: `T > 0`. Both may be learnt.
    - `with_statistics`: also return the `TokenStatistics` of the logits after soft cap and temperature, from the same
      pass: constants, which cost no extra product. `log_prob` and `rank` are None where targets are probabilities.
    - `chunk_rows`: rows at a time; None takes what `plan` says. `reduction="none"` computes the logits again in the
      backward pass: four products.
    - `dtype`: of the operands of the matrix products, at least 16 bits; None promotes `hidden` and `kernel`. With bf16
      the kernel is cast once per call, and every product, of whatever derivative, multiplies bf16 and adds in float32:
      the gradient with respect to a float32 kernel is never rounded to bf16.
    - `precision`: of the matrix products, as in `jax.lax.dot_general`. None means float32 accuracy for float32 operands
      (`"highest"`) unless `jax.default_matmul_precision` is set; pass `"tensorfloat32"` or `"default"` for the faster
      products of GPUs and TPUs.

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
    call = check_linear_call(
        hidden,
        kernel,
        bias,
        SoftmaxArguments(targets, where, weights, class_weights, label_smoothing, z_loss),
        ignore_index=ignore_index,
        soft_cap=soft_cap,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        chunk_rows=chunk_rows,
        dtype=dtype,
        precision=precision,
        vocab_axis=vocab_axis,
        hidden_whole=False,
    )
    losses, statistics = _linear_softmax_cross_entropy(call, with_statistics=with_statistics)
    return (losses, statistics) if with_statistics else losses


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
        rows = ignore_zero_weight_rows(wide_rows(rows, z), self.classes, z)
        losses = softmax_loss(z, rows, options, self.classes)[:, 0]
        if not self.with_statistics:
            return losses, None
        return losses, lax.stop_gradient(row_statistics(lax.stop_gradient(z), rows, self.classes, 0))


@functools.partial(jax.jit, static_argnames=("with_statistics",), inline=True)
def _linear_softmax_cross_entropy(
    call: LinearCall, *, with_statistics: bool
) -> tuple[jax.Array | WeightedSum, TokenStatistics | None]:
    rows, options, counted = call.rows()
    losses: Any
    losses, statistics = stream_reduced(
        SoftmaxRowLoss(call.classes, with_statistics),
        (call.head,),
        rows,
        (call.transform, options),
        counted,
        rows.total_weights(ClassAxis()),
        call.reduction,
        call.divisor,
        call.chunking,
        call.products,
    )
    losses = call.batch.unflatten(losses) if call.reduction == "none" else losses
    return losses, jax.tree.map(call.batch.unflatten, statistics)
