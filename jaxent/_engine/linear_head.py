"""The arguments of the linear losses: the linear layer, and what is done to its logits before their softmax."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.reduction import Reduction, WeightedSum
from jaxent._arguments.targets import SoftmaxArguments, check_classes
from jaxent._engine.chunking import Chunking, chunking_of
from jaxent._engine.streaming import Counted, Head, Logits, MatrixProducts, RowFunction, stream_rows, stream_sum
from jaxent._math.row_losses import RowTargets
from jaxent._mesh.apply import Batch
from jaxent._mesh.check import check_linear_layer
from jaxent._mesh.types import automatic_devices, local_shape, may_be_split_by_xla


class LogitTransform(NamedTuple):
    """What is done to the logits of a linear layer before their softmax; None is nothing."""

    soft_cap: jax.Array | None
    temperature: jax.Array | None

    def __call__(self, z: jax.Array) -> jax.Array:
        if self.soft_cap is not None:
            cap = self.soft_cap.astype(z.dtype)
            z = cap * jnp.tanh(z / cap)
        return z if self.temperature is None else z / self.temperature.astype(z.dtype)


def check_head(hidden: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None, suffix: str = "") -> tuple[Head, Batch]:
    """The head with its rows in one dimension, operands in one dtype, and the batch."""
    h = arrays.floating(f"hidden{suffix}", hidden)
    w = arrays.floating(f"kernel{suffix}", kernel)
    if h.ndim == 0:
        raise arrays.shape_error(f"hidden{suffix}", "have shape (*batch, features)", h)
    if w.ndim != 2 or w.shape[0] != h.shape[-1]:
        expected = (
            f"have shape (features, classes) with {h.shape[-1]} features, as `hidden{suffix}` has; "
            "a (classes, features) embedding goes in as `embedding.T`"
        )
        raise arrays.shape_error(f"kernel{suffix}", expected, w)
    check_classes(f"kernel{suffix}", w.shape, -1)
    if bias is not None:
        bias = arrays.floating(f"bias{suffix}", bias)
        arrays.check_shape(f"bias{suffix}", bias, (w.shape[1],), "one for each class")
    if h.dtype != w.dtype:
        h, w = arrays.accumulated(h, w)
    check_linear_layer(h, w, suffix)
    batch = Batch.of(h, h.ndim - 1)
    return Head(batch.flatten(h), w, bias), batch


def check_logit_transform(soft_cap: ArrayLike | None, temperature: ArrayLike) -> LogitTransform:
    if soft_cap is not None:
        soft_cap = arrays.scalar("soft_cap", soft_cap, low=0.0, open_low=True)
    return LogitTransform(soft_cap, arrays.scalar("temperature", temperature, low=0.0, open_low=True, neutral=1.0))


def check_row_argument(x: ArrayLike, batch: Batch) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape[: len(batch)] != batch:
        raise arrays.shape_error("row_args", f"have shapes that start with {batch}, the batch of `hidden`", x)
    return batch.flatten(x)


def flat_rows(arguments: SoftmaxArguments, batch: Batch) -> SoftmaxArguments:
    """The arguments with their batch axes as one."""
    flat: dict[str, Any] = {
        name: jax.tree.map(batch.flatten, x)
        for name, x in arguments._asdict().items()
        if name in ("targets", "where", "weights") and x is not None
    }
    return arguments._replace(**flat)


def chunking_for(chunk_rows: int | None, *heads: Head) -> Chunking:
    """How the rows of a device are cut; the logits of all heads are held at a time."""
    rows, _ = local_shape(heads[0].hidden)
    classes = max(1, sum(local_shape(head.kernel)[1] for head in heads))
    devices = max(automatic_devices(x) for head in heads for x in (head.hidden, head.kernel))
    features = max(local_shape(head.hidden)[1] for head in heads)
    strided = any(may_be_split_by_xla(head.hidden) for head in heads)
    return chunking_of(rows, features, classes, chunk_rows, devices, strided)


def logits_like(*heads: Head) -> jax.ShapeDtypeStruct:
    """What the logits would be; with several heads, in a dtype that holds those of each."""
    shape = (heads[0].hidden.shape[0], heads[0].kernel.shape[1])
    return jax.ShapeDtypeStruct(shape, arrays.accumulation_dtype(*(head.kernel for head in heads)))


def matrix_products(precision: Precision, head: Head) -> MatrixProducts:
    """float32 inputs keep float32 accuracy unless the caller, or `jax.default_matmul_precision`, says otherwise."""
    config: Any = jax.config  # its options are not typed
    if precision is None and head.kernel.dtype == np.float32 and config.jax_default_matmul_precision is None:
        precision = jax.lax.Precision.HIGHEST
    return MatrixProducts(precision)


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
    dtype = logits_like(*heads).dtype
    weight = jnp.sum(total_weights).astype(dtype)
    if reduction == "mean":
        # The rows are divided before the products, not the gradients after them: those are as large as the kernel.
        scale = WeightedSum(jnp.ones_like(weight), weight if divisor is None else divisor.astype(dtype)).mean()
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
    return rows._replace(ignored=ignored), Counted(None if all_count else ~ignored[:, 0], weights)


def finite_rows(hidden: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(hidden), axis=-1)
