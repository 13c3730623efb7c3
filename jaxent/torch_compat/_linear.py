"""The linear cross-entropy of `torch_compat`, and its options."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxent import linear, losses
from jaxent._arguments import arrays
from jaxent._arguments.reduction import WeightedSum
from jaxent._arguments.targets import check_ignore_index
from jaxent._engine.linear_head import chunking_for, matrix_products
from jaxent._engine.row_results import stream_rows
from jaxent._engine.streaming import Counted, Head, Logits, stream_sum
from jaxent._errors import ArgumentValueError, named, public
from jaxent._math.row_losses import RowTargets
from jaxent._mesh.class_axis import ClassAxis
from jaxent._typing import ArrayLike
from jaxent.torch_compat._conventions import (
    check_class_weight,
    check_reduction,
    check_target,
    class_loss_dtype,
    loss_of_no_classes,
    lost_rows,
    reduce_rows,
    row_targets,
)

_OPTIONS = "torch_compat.LinearCrossEntropyOptions"


@dataclasses.dataclass(frozen=True)
class LinearCrossEntropyOptions:
    """How `linear_cross_entropy` is cut into chunks of rows; fields and defaults of `torch.nn`'s class.

    `batch_chunk_size` is the number of rows at a time. `chunking_method`: `"auto"` takes what `jaxent.plan` says,
    `"aspect_ratio"` and `"aspect_ratio:N"` are PyTorch's formulas, and None is `batch_chunk_size`, or one chunk.
    `allow_retain_graph`, `acc_policy` and `acc_dtype` have nothing to choose here: every derivative can be taken, and
    sums are float32 or wider.

    **Raises:** `ValueError` for a wrong chunk size, method or policy.

    >>> LinearCrossEntropyOptions(batch_chunk_size=1024).chunk_rows(8192, 4096, 128256)
    1024
    """

    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: str = "auto"
    acc_dtype: Any = None

    @named(_OPTIONS)
    def __post_init__(self) -> None:
        size, method = self.batch_chunk_size, self.chunking_method
        if size is not None and arrays.as_int("batch_chunk_size", size, "be an int or None") < 1:
            raise ArgumentValueError(f"`batch_chunk_size` must be a positive int or None, got {size!r}")
        if method is not None and method != "auto" and _aspect_factor(method) is None:
            expected = "'auto', 'aspect_ratio', 'aspect_ratio:N' or None"
            raise ArgumentValueError(f"`chunking_method` must be {expected}, got {method!r}")
        if self.acc_policy not in ("auto", "accurate", "balanced", "compact"):
            expected = "'auto', 'accurate', 'balanced' or 'compact'"
            raise ArgumentValueError(f"`acc_policy` must be {expected}, got {self.acc_policy!r}")

    @named(_OPTIONS)
    def chunk_rows(self, rows: int, in_features: int, num_classes: int) -> int | None:
        """The `chunk_rows` of `jaxent.linear_softmax_cross_entropy`."""
        size = None if self.batch_chunk_size is None else max(1, min(self.batch_chunk_size, rows))
        if self.chunking_method is None:
            return size or max(1, rows)
        factor = _aspect_factor(self.chunking_method)
        if factor is None:
            return size
        share = -(-rows // max(1, -(-num_classes // max(1, in_features))))
        by_method = max(1, min((1 << max(0, share - 1).bit_length()) // factor, rows))
        if size is not None and size != by_method:
            expected = f"agree: {self.chunking_method!r} gives {by_method} rows"
            raise ArgumentValueError(f"`batch_chunk_size` and `chunking_method` must {expected}, not {size}")
        return by_method


def _aspect_factor(method: str) -> int | None:
    """`N` of `"aspect_ratio:N"`, 1 of `"aspect_ratio"`, None of anything else."""
    name, colon, factor = method.partition(":")
    factor = factor if colon else "1"
    return int(factor) if name == "aspect_ratio" and factor.isdecimal() and int(factor) > 0 else None


@public
def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    options: Any = None,
) -> jax.Array:
    r"""`cross_entropy` of the logits of a linear layer, without the logits, as `torch.nn.functional`'s, in nats.

    $$z_n = W h_n + b$$

    The engine is that of `jaxent.linear_softmax_cross_entropy`: chunks of rows, three matrix products for value and
    gradient, every option, and derivatives of any order, with `options` and without.

    **Arguments:**

    - `input`: `(D,)` or `(N, D)`. `linear_weight`: `(C, D)`, or, for rows, `(C, d_1, ..., d_K, D)`: a linear layer for
      each of the `d_1 x ... x d_K` places. `linear_bias`: `linear_weight.shape[:-1]`.
    - `target`, `weight`, `reduction`, `label_smoothing`: as in `cross_entropy` for logits `(C,)`, `(N, C)` or
      `(N, C, d_1, ..., d_K)`. `ignore_index`: None is -100.
    - `options`: a `LinearCrossEntropyOptions`; None leaves the chunks to `jaxent.plan`.

    **Returns:** as `cross_entropy`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, linear_weight = jnp.ones((2, 3)), jnp.zeros((5, 3))
    >>> linear_cross_entropy(hidden, linear_weight, jnp.array([0, 4]))
    Array(1.609438, dtype=float32)
    """
    h = arrays.floating("input", input)
    w = arrays.floating("linear_weight", linear_weight)
    if h.ndim not in (1, 2):
        raise arrays.shape_error("input", "have shape (D,) or (N, D)", h)
    if w.ndim < 2 or w.shape[-1] != h.shape[-1] or (w.ndim > 2 and h.ndim == 1):
        expected = f"have shape (C, {h.shape[-1]}), or, for an input of rows, (C, d_1, ..., d_K, {h.shape[-1]})"
        raise arrays.shape_error("linear_weight", expected, w)
    if linear_bias is not None:
        linear_bias = arrays.floating("linear_bias", linear_bias)
        arrays.check_shape("linear_bias", linear_bias, w.shape[:-1], "one for each row of `linear_weight`")
    target = check_target(target, (*h.shape[:-1], *w.shape[:-1]), 1 - w.ndim)
    ignore_index = check_ignore_index(ignore_index)
    if jnp.issubdtype(target.dtype, jnp.floating) and ignore_index is not None:
        raise ArgumentValueError(f"`ignore_index` goes with class indices, got {ignore_index} and probabilities")
    chunking = LinearCrossEntropyOptions() if options is None else options
    if not isinstance(chunking, LinearCrossEntropyOptions):  # PyTorch's own
        chunking = LinearCrossEntropyOptions(
            batch_chunk_size=chunking.batch_chunk_size, chunking_method=chunking.chunking_method
        )
    return _linear_cross_entropy(
        h,
        w,
        linear_bias,
        target,
        check_class_weight(weight, w.shape[0]),
        arrays.scalar("label_smoothing", label_smoothing, low=0.0, high=1.0, neutral=0.0),
        reduction=check_reduction(reduction),
        ignore_index=-100 if ignore_index is None else ignore_index,
        chunk_rows=chunking.chunk_rows(math.prod(h.shape[:-1]), w.shape[-1], math.prod(w.shape[:-1])),
    )


@functools.partial(jax.jit, static_argnames=("reduction", "ignore_index", "chunk_rows"), inline=True)
def _linear_cross_entropy(
    h: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    target: jax.Array,
    weight: jax.Array | None,
    smoothing: jax.Array | None,
    *,
    reduction: str,
    ignore_index: int,
    chunk_rows: int | None,
) -> jax.Array:
    classes, dtype = ClassAxis(1 - w.ndim), arrays.accumulation_dtype(h, w)
    result = class_loss_dtype(h, target, weight)
    if w.shape[0] == 0:
        return loss_of_no_classes(target, smoothing, classes, ignore_index, reduction, result)
    logits = jax.ShapeDtypeStruct((*h.shape[:-1], *w.shape[:-1]), dtype)
    rows = row_targets(logits, target, weight, classes, ignore_index)
    lost = None
    if bias is not None:
        # A logit is taken to be -inf only where the bias is.
        z = bias.reshape((1,) * (h.ndim - 1) + bias.shape).astype(dtype)
        lost = lost_rows(z, rows, weight, smoothing, classes)
    options = {
        "class_weights": weight,
        "ignore_index": ignore_index,
        "label_smoothing": 0.0 if smoothing is None else smoothing,
    }
    if w.ndim == 2:
        loss = functools.partial(
            linear.linear_softmax_cross_entropy, h, w.T, target, bias=bias, chunk_rows=chunk_rows, **options
        )
    else:
        loss = functools.partial(
            _loss_of_places, h, w, bias, target, rows, (weight, smoothing), ignore_index, chunk_rows
        )
    return reduce_rows(loss, rows, lost, classes, reduction, result)


def _loss_of_places(
    h: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    target: jax.Array,
    rows: RowTargets,
    shared: tuple[jax.Array | None, jax.Array | None],
    ignore_index: int,
    chunk_rows: int | None,
    reduction: str,
) -> Any:
    """The classes of all places are the columns of one product, and a row's loss is the sum over its places."""
    count, places, features = w.shape[0], math.prod(w.shape[1:-1]), w.shape[-1]
    counted = Counted()
    if rows.probabilities is None:
        counted = Counted(~jnp.all(rows.ignored.reshape(h.shape[0], places), axis=1))
    head = Head(
        h,
        w.reshape(count * places, features).T,
        None if bias is None else bias.reshape(count * places),
    )
    # In the dtype of the sums: a gradient with respect to bf16 probabilities would be rounded before it is divided by
    # the weight.
    target = target if rows.probabilities is None else rows.probabilities
    target = target.reshape(*target.shape[: target.ndim + 2 - w.ndim], places)
    products = matrix_products(None)
    chunking = chunking_for(chunk_rows, products, head)
    row_fn = PlacesRowLoss(count, places, ignore_index, reduction != "none")
    stream = stream_rows if reduction == "none" else stream_sum
    losses, _ = stream(row_fn, (head,), target, shared, chunking, products, counted)
    if reduction == "none":
        return losses.reshape(h.shape[0], *w.shape[1:-1])
    return WeightedSum(losses, jnp.sum(rows.total_weights(ClassAxis(1 - w.ndim))).astype(losses.dtype))


@dataclasses.dataclass(frozen=True)
class PlacesRowLoss:
    """The losses of rows `(rows, places)`, or their sums `(rows,)`, as the engine takes them: with no `aux`."""

    count: int
    places: int
    ignore_index: int
    summed: bool

    def __call__(
        self, logits: Logits, target: jax.Array, shared: tuple[jax.Array | None, jax.Array | None]
    ) -> tuple[jax.Array, None]:
        weight, smoothing = shared
        rows: Any = losses.softmax_cross_entropy(
            logits[0].reshape(logits[0].shape[0], self.count, self.places),
            target,
            axis=1,
            class_weights=weight,
            ignore_index=self.ignore_index,
            label_smoothing=0.0 if smoothing is None else smoothing,
            reduction="none",
        )
        return (jnp.sum(rows, axis=1) if self.summed else rows), None
