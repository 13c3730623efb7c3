"""The arguments of the linear losses: the linear layer, and what is done to its logits before their softmax."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.reduction import Reduction, WeightedSum, check_reduction, quotient
from jaxent._arguments.targets import (
    SoftmaxArguments,
    check_classes,
    check_ignore_index,
    check_softmax_arguments,
    row_targets,
)
from jaxent._engine.chunking import Chunking, chunking_of, default_chunk_rows
from jaxent._engine.devices import target_on
from jaxent._engine.row_results import stream_rows
from jaxent._engine.streaming import Counted, Head, Logits, MatrixProducts, RowFunction, stream_sum
from jaxent._math import safe
from jaxent._math.row_losses import LossOptions, RowTargets
from jaxent._mesh.apply import Batch
from jaxent._mesh.check import check_class_axis, check_linear_layer, check_vocab_axis
from jaxent._mesh.class_axis import ClassAxis, VocabAxis
from jaxent._mesh.types import automatic_devices, axes_that_split, local_shape, may_be_split_by_xla, mesh_of
from jaxent._typing import ArrayLike, DTypeLike


class LogitTransform(NamedTuple):
    """What is done to the logits of a linear layer before their softmax; None is nothing."""

    soft_cap: jax.Array | None
    temperature: jax.Array | None

    def __call__(self, z: jax.Array) -> jax.Array:
        """The logits of the softmax; a removed class stays removed, and +inf stays what no softmax has."""
        if self.soft_cap is None and self.temperature is None:
            return z
        infinite = jnp.isinf(z)
        finite = jnp.where(infinite, 0, z)
        if self.soft_cap is not None:
            finite = safe.soft_cap(finite, self.soft_cap.astype(z.dtype))
        if self.temperature is not None:
            finite = finite / self.temperature.astype(z.dtype)
        return jnp.where(infinite, lax.stop_gradient(z), finite)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearCall:
    """The checked arguments of a softmax loss of a linear layer, rows in one dimension, and what is static in them."""

    head: Head
    arguments: SoftmaxArguments
    transform: LogitTransform
    divisor: jax.Array | None
    batch: Batch = dataclasses.field(metadata={"static": True})
    classes: ClassAxis = dataclasses.field(metadata={"static": True})
    ignore_index: int | None = dataclasses.field(metadata={"static": True})
    reduction: Reduction = dataclasses.field(metadata={"static": True})
    chunking: Chunking = dataclasses.field(metadata={"static": True})
    products: MatrixProducts = dataclasses.field(metadata={"static": True})

    @property
    def logits(self) -> jax.ShapeDtypeStruct:
        """What they would be."""
        return logits_like(self.products, self.head)

    def rows(self) -> tuple[RowTargets, LossOptions, Counted]:
        rows, options = row_targets(self.arguments, self.logits, self.classes, self.ignore_index)
        rows, counted = counted_rows(rows, self.arguments, self.ignore_index, self.head.hidden)
        return rows, options, counted


def check_linear_call(
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    given: SoftmaxArguments,
    *,
    ignore_index: int | None,
    soft_cap: ArrayLike | None,
    temperature: ArrayLike,
    reduction: Reduction = "none",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None,
    dtype: DTypeLike | None,
    precision: Precision,
    vocab_axis: VocabAxis,
    blocks: int = 1,
    targets_name: str = "targets",
    targets_required: bool = True,
    hidden_whole: bool = True,
) -> LinearCall:
    """A softmax loss of a linear layer, or what is made of one; `blocks` of logits are held at a time.

    With `hidden_whole` hidden states must be typed as the same on all devices of `vocab_axis`. Gathered ones are not,
    as split ones are not, which have another shape than targets.
    """
    h, w, bias = check_head(hidden, kernel, bias)
    if vocab_axis is not None:
        whole = {"hidden": h} if hidden_whole else {}
        check_vocab_axis(vocab_axis, given.without_classes(targets_name) | whole)
    batch, classes = Batch.of(h), ClassAxis(-1, vocab_axis)
    shape = (*batch.shape, w.shape[1])
    arguments = check_softmax_arguments(given, shape, -1, targets_name, targets_required)
    check_class_axis(vocab_axis, {"kernel": (w, 1)}, arguments.without_classes(targets_name), arguments.class_weights)
    head = Head(batch.flatten(h, h), w, bias)
    products = matrix_products(precision, dtype, vocab_axis)
    return LinearCall(
        head,
        flat_rows(arguments, batch, h),
        check_logit_transform(soft_cap, temperature),
        check_reduction(reduction, denominator),
        batch,
        classes,
        check_ignore_index(ignore_index),
        reduction,
        chunking_for(chunk_rows, products, *[head] * blocks),
        products,
    )


def check_head(
    hidden: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None, suffix: str = ""
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Hidden states, kernel and bias of a linear layer."""
    h = arrays.floating(f"hidden{suffix}", hidden)
    w = arrays.floating(f"kernel{suffix}", kernel)
    if h.ndim == 0:
        raise arrays.shape_error(f"hidden{suffix}", "have shape (*batch, features)", h)
    if w.ndim != 2 or w.shape[0] != h.shape[-1]:
        expected = (
            f"have shape (features, classes) with {h.shape[-1]} features, as `hidden{suffix}` has; "
            "a (classes, features) embedding goes in as `embedding.T`"
        )
        if w.ndim == 2 and (axes := axes_that_split(w, h.shape[-1])):
            expected += f"; where {axes} splits its features, `jax.lax.all_gather(kernel{suffix}, {axes}, tiled=True)`"
        raise arrays.shape_error(f"kernel{suffix}", expected, w)
    if w.shape[1] == 0:
        check_classes(f"kernel{suffix}", w.shape, -1)
    if bias is not None:
        bias = arrays.floating(f"bias{suffix}", bias)
        arrays.check_shape(f"bias{suffix}", bias, (w.shape[1],), "one for each class")
    check_linear_layer(h, w, suffix)
    return h, w, bias


def check_logit_transform(soft_cap: ArrayLike | None, temperature: ArrayLike) -> LogitTransform:
    if soft_cap is not None:
        soft_cap = arrays.scalar("soft_cap", soft_cap, low=0.0, open_low=True)
    return LogitTransform(soft_cap, arrays.scalar("temperature", temperature, low=0.0, open_low=True, neutral=1.0))


def check_row_argument(x: ArrayLike, batch: Batch, like: jax.Array) -> jax.Array:
    x = arrays.of_any_dtype("row_args", x)
    if x.shape[: len(batch.shape)] != batch.shape:
        raise arrays.shape_error("row_args", f"have shapes that start with {batch.shape}, the batch of `hidden`", x)
    return batch.flatten(x, like)


def flat_rows(arguments: SoftmaxArguments, batch: Batch, like: jax.Array) -> SoftmaxArguments:
    """The arguments with their batch axes as one."""
    rows = {"targets": arguments.targets, "where": arguments.where, "weights": arguments.weights}
    return arguments._replace(**{name: jax.tree.map(lambda x: batch.flatten(x, like), x) for name, x in rows.items()})


def chunking_for(chunk_rows: int | None, products: MatrixProducts, *heads: Head) -> Chunking:
    """How the rows of a device are cut; the logits of all heads are held at a time."""
    operands = [x for head in heads for x in (head.hidden, head.kernel)]
    shapes, mesh = [x.shape for x in operands], mesh_of(*operands)
    # An array that only `jit` knows to be split has no mesh in its type.
    devices, strided = 1, jax.device_count() > 1
    if not mesh.empty:
        shapes, devices = [local_shape(x) for x in operands], max([automatic_devices(x) for x in operands])
        strided = any(may_be_split_by_xla(head.hidden) for head in heads)
    rows, features = shapes[0][0], max([shape[1] for shape in shapes[::2]])
    classes = max(1, sum([shape[1] for shape in shapes[1::2]]))
    default = default_chunk_rows(target_on(mesh), features, classes, products.operand_dtype(heads[0]))
    return chunking_of(rows, chunk_rows, default, devices, strided)


def logits_like(products: MatrixProducts, *heads: Head) -> jax.ShapeDtypeStruct:
    """What the logits would be; with several heads, in a dtype that holds those of each."""
    shape = (heads[0].hidden.shape[0], heads[0].kernel.shape[1])
    return jax.ShapeDtypeStruct(shape, arrays.accumulation_dtype(*map(products.operand_dtype, heads)))


def matrix_products(
    precision: Precision, dtype: DTypeLike | None = None, vocab_axis: VocabAxis = None
) -> MatrixProducts:
    """float32 operands keep float32 accuracy unless the caller, or `jax.default_matmul_precision`, says otherwise."""
    config: Any = jax.config  # its options are not typed
    exact = precision is None and config.jax_default_matmul_precision is None
    operands = None if dtype is None else arrays.floating_dtype("dtype", dtype)
    return MatrixProducts(precision, jax.lax.Precision.HIGHEST if exact else precision, operands, vocab_axis)


@dataclasses.dataclass(frozen=True)
class ScaledRowLoss:
    """Row losses times a number that all rows share."""

    row_fn: RowFunction

    def __call__(self, logits: Logits, rows: Any, shared: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        inner, scale = shared
        losses, aux = self.row_fn(logits, rows, inner)
        return losses * scale, aux


def stream_reduced(
    row_fn: RowFunction,
    heads: tuple[Head, ...],
    rows: Any,
    shared: Any,
    counted: Counted,
    total_weights: jax.Array,
    reduction: Reduction,
    divisor: jax.Array | None,
    chunking: Chunking,
    products: MatrixProducts,
) -> tuple[jax.Array | WeightedSum, Any]:
    """The reduction of streamed row losses, and what goes with them: `row_fn` returns both.

    `total_weights` are what the rows count in a mean.
    """
    if reduction == "none":
        return stream_rows(row_fn, heads, rows, shared, chunking, products, counted)
    dtype = logits_like(products, *heads).dtype
    weight = jnp.sum(total_weights).astype(dtype)
    if reduction == "mean":
        # The rows are divided before the products, not the gradients after them: those are as large as the kernel.
        scale = quotient(1, weight if divisor is None else divisor.astype(dtype))
        return stream_sum(ScaledRowLoss(row_fn), heads, rows, (shared, scale), chunking, products, counted)
    total, aux = stream_sum(row_fn, heads, rows, shared, chunking, products, counted)
    return (WeightedSum(total, weight) if reduction == "sum_and_weight" else total), aux


def counted_rows(
    rows: RowTargets, arguments: SoftmaxArguments, ignore_index: int | None, *hidden: jax.Array
) -> tuple[RowTargets, Counted]:
    """Which rows count. One of weight 0 does not if its hidden states are not finite, else it has a loss."""
    ignored = rows.ignored
    if rows.weights is not None:
        for h in hidden:
            ignored |= (rows.weights == 0) & ~finite_rows(h)[:, None]
    by_label = ignore_index is not None and (rows.labels is not None or rows.sparse is not None)
    all_count = not by_label and arguments.where is None and rows.weights is None
    weights = None if rows.weights is None else rows.weights[:, 0]
    if rows.probabilities is not None:
        rows = rows._replace(probabilities=arguments.targets)  # in their own dtype: converted a block at a time
    return rows._replace(ignored=ignored), Counted(None if all_count else ~ignored[:, 0], weights)


def finite_rows(hidden: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(hidden), axis=-1)


def wide_rows(rows: RowTargets, z: jax.Array) -> RowTargets:
    """The targets of a block of rows in the dtype of its logits."""
    probabilities = rows.probabilities
    return rows if probabilities is None else rows._replace(probabilities=probabilities.astype(z.dtype))
