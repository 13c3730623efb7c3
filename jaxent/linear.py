"""Losses straight from hidden states: each is a row loss and the engine, and never holds the logits of all rows."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import jax
import jax.extend
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxent._arguments import arrays
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
    check_row_argument,
    chunking_for,
    counted_rows,
    flat_rows,
    logits_like,
    matrix_products,
    stream_reduced,
)
from jaxent._engine.streaming import Counted, Head, Logits, MatrixProducts, stream_sum
from jaxent._errors import public
from jaxent._math.row_losses import LossOptions, RowTargets, ignore_zero_weight_rows, softmax_loss
from jaxent._mesh.class_axis import ClassAxis


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Literal["sum_and_weight"],
    **options: Unpack[LinearOptions],
) -> WeightedSum: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike | SparseTargets,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
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
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> jax.Array | WeightedSum:
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
    - `chunk_rows`: rows at a time; None takes what `plan` says. `"none"` computes the logits again on the way back:
      four products.
    - `precision`: of the matrix products, as in `jax.lax.dot_general`. None means float32 accuracy for float32 inputs
      (`"highest"`) unless `jax.default_matmul_precision` is set; pass `"tensorfloat32"` or `"default"` for the faster
      products of GPUs and TPUs. bf16 inputs are multiplied as bf16 and added in float32.

    **Returns:** as `softmax_cross_entropy`; gradients come back in the dtypes of the inputs. A dropped row adds
    exactly 0 to every gradient, even if its `hidden` is nan. A label out of range gives nan in its row of the gradient
    by `hidden`, and in all of the gradients by `kernel` and `bias`.

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
    losses = _linear_softmax_cross_entropy(
        head,
        flat_rows(arguments, batch),
        check_logit_transform(soft_cap, temperature),
        divisor,
        classes=ClassAxis(-1, vocab_axis),
        ignore_index=check_ignore_index(ignore_index),
        reduction=reduction,
        chunking=chunking_for(chunk_rows, head),
        products=matrix_products(precision, head),
    )
    return batch.unflatten(losses) if reduction == "none" else losses


@dataclasses.dataclass(frozen=True)
class SoftmaxRowLoss:
    """The row losses of `softmax_cross_entropy` as the engine takes them; equal where the classes are."""

    classes: ClassAxis

    def __call__(
        self, logits: Logits, rows: RowTargets, shared: tuple[LogitTransform, LossOptions]
    ) -> tuple[jax.Array, None]:
        transform, options = shared
        z = transform(logits[0])
        rows = ignore_zero_weight_rows(rows, self.classes, z)
        return softmax_loss(z, rows, options, self.classes)[:, 0], None


@functools.partial(
    jax.jit, static_argnames=("classes", "ignore_index", "reduction", "chunking", "products"), inline=True
)
def _linear_softmax_cross_entropy(
    head: Head,
    arguments: SoftmaxArguments,
    transform: LogitTransform,
    divisor: jax.Array | None,
    *,
    classes: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
    chunking: Chunking,
    products: MatrixProducts,
) -> jax.Array | WeightedSum:
    logits = logits_like(head)
    rows, options = row_targets(arguments, logits, classes, ignore_index)
    rows, counted = counted_rows(rows, arguments, ignore_index, head.hidden)
    return stream_reduced(
        SoftmaxRowLoss(classes),
        (head,),
        rows,
        (transform, options),
        counted,
        rows.total_weights(ClassAxis()),
        reduction,
        divisor,
        chunking,
        products,
    )[0]


@public
def linear_loss(
    row_loss: Callable[..., jax.Array],
    hidden: ArrayLike,
    kernel: ArrayLike,
    *row_args: Any,
    bias: ArrayLike | None = None,
    params: Any = None,
    chunk_rows: int | None = None,
    precision: Precision = None,
) -> jax.Array:
    r"""The sum of your own row losses of `hidden @ kernel + bias`, streamed, in their unit.

    $$L = \sum_n \ell(h_n W + b,\, a_n,\, \theta)$$

    Value and gradient cost three matrix products, and every transformation goes through.

    **Arguments:**

    - `row_loss`: `row_loss(logits, *row_args, params)` for one block of rows: `logits` is `(rows, classes)` in at least
      float32, each row argument has the block's rows first, and the result is `(rows,)`. Any differentiable JAX
      function whose rows do not see each other. Without `params` it is called without them.
    - `hidden`: `(*batch, features)`; `kernel`: `(features, classes)`; `bias`: `(classes,)`.
    - `row_args`: pytrees of arrays `(*batch, ...)`; their batch axes arrive as one. `params`: any pytree of arrays that
      all rows share. The loss is differentiable by both.
    - `chunk_rows`, `precision`: as in `linear_softmax_cross_entropy`.

    **Returns:** the sum, a scalar in at least float32.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, also that of what `row_loss` returns.

    A focal loss (Lin et al., 2017, equation 4), its focus learnt through `params`:

    >>> def focal(logits, labels, gamma):
    ...     log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    ...     return -((1 - jnp.exp(log_p)) ** gamma) * log_p
    >>> hidden, kernel, labels = jnp.eye(3), 2.0 * jnp.eye(3), jnp.arange(3)
    >>> linear_loss(focal, hidden, kernel, labels, params=jnp.array(2.0))
    Array(0.03260801, dtype=float32)

    A contrastive loss in both directions (CLIP, Radford et al., 2021, figure 3) needs no row loss of its own:

    >>> def clip(images, texts, temperature):
    ...     pairs = jnp.arange(len(images))
    ...     by_image = linear_softmax_cross_entropy(images, texts.T, pairs, temperature=temperature)
    ...     by_text = linear_softmax_cross_entropy(texts, images.T, pairs, temperature=temperature)
    ...     return (by_image + by_text) / 2
    >>> clip(jnp.eye(3), jnp.eye(3), jnp.array(0.5))
    Array(0.23954478, dtype=float32)
    """
    head, batch = check_head(hidden, kernel, bias)
    row_args = jax.tree.map(lambda x: check_row_argument(x, batch), row_args)
    params = jax.tree.map(jnp.asarray, params)
    chunking = chunking_for(chunk_rows, head)
    row_fn = UserRowLoss(row_loss, _takes_params(row_loss, len(row_args), params))
    block = jax.tree.map(lambda x: jax.ShapeDtypeStruct((chunking.chunk_rows, *x.shape[1:]), x.dtype), row_args)
    logits = jax.ShapeDtypeStruct((chunking.chunk_rows, head.kernel.shape[1]), logits_like(head).dtype)
    closed = jax.make_jaxpr(row_fn)((logits,), block, params)
    if closed.consts:
        # A custom derivative rule cannot see what `row_loss` closes over; as parameters, its values can be traced too.
        row_fn, params = ClosedRowLoss(closed), (closed.consts, params)
    return stream_sum(row_fn, (head,), row_args, params, chunking, matrix_products(precision, head), Counted())[0]


@dataclasses.dataclass(frozen=True)
class UserRowLoss:
    """A user's row loss as the engine calls it, with its result checked."""

    row_loss: Callable[..., jax.Array]
    takes_params: bool

    def __call__(self, logits: Logits, row_args: tuple[Any, ...], params: Any) -> jax.Array:
        losses = self.row_loss(logits[0], *row_args, *([params] if self.takes_params else []))
        rows = logits[0].shape[0]
        if getattr(losses, "shape", None) != (rows,):
            expected = f"return one loss for each row of its block, shape ({rows},)"
            raise arrays.shape_error("row_loss", expected, losses)
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise arrays.dtype_error("row_loss", "return floating losses", losses)
        return losses.astype(logits[0].dtype), None


@dataclasses.dataclass(frozen=True, eq=False)
class ClosedRowLoss:
    """A row loss with the values that it closed over made arguments."""

    closed: jax.extend.core.ClosedJaxpr

    def __call__(self, logits: Logits, row_args: Any, params: Any) -> jax.Array:
        consts, params = params
        function = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(self.closed.jaxpr, consts))
        return function(*jax.tree.leaves((logits, row_args, params)))[0], None


def _takes_params(row_loss: Callable[..., jax.Array], num_row_args: int, params: Any) -> bool:
    """Whether to pass `params`: always if there are any, else if `row_loss` has a place for them."""
    if params is not None:
        return True
    try:
        inspect.signature(row_loss).bind(*[None] * (1 + num_row_args))
    except TypeError:
        return True
    except ValueError:  # a callable without a signature
        pass
    return False
