"""The diagonal of the Gauss-Newton matrix of a linear layer, streamed, without the logits."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.reduction import MatrixReduction, check_matrix_reduction, quotient
from jaxent._arguments.targets import SoftmaxArguments
from jaxent._engine.linear_head import LinearCall, LogitTransform, check_linear_call, matrix_products, wide_rows
from jaxent._engine.row_sums import stream_row_sums
from jaxent._engine.streaming import Head, Logits, MatrixProducts
from jaxent._errors import public
from jaxent._math import softmax
from jaxent._math.row_losses import LossOptions, RowTargets, ignore_zero_weight_rows, target_mass
from jaxent._mesh.class_axis import ClassAxis, VocabAxis
from jaxent._mesh.types import mesh_of, partition_of, sum_to_type
from jaxent._serialization import exportable
from jaxent._typing import ArrayLike, DTypeLike


@exportable
class GGNDiagonal(NamedTuple):
    """The diagonal of the Gauss-Newton matrix, with the shapes of the arguments."""

    hidden: jax.Array
    """With respect to the hidden states."""
    kernel: jax.Array
    """With respect to the kernel."""
    bias: jax.Array
    """With respect to the bias, whether there is one or not."""


@public
def linear_ggn_diagonal(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike | None = None,
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
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> GGNDiagonal:
    r"""The diagonal of `linear_ggn_vector_product`'s matrix, streamed, in nats per squared unit of each argument.

    $$G^W_{jk} = \frac{1}{W} \sum_n h_{nj}^2\, c_{nk}^2 a_{nkk}, \qquad G^b_k = \frac{1}{W} \sum_n c_{nk}^2 a_{nkk},
    \qquad G^h_{nj} = \frac{1}{W} \sum_{kl} c_{nk} W_{jk}\, a_{nkl}\, c_{nl} W_{jl}$$

    with the `A_n` of `ggn_vector_product`, which is `diag(p_n) - p_n p_n^T` in the plain case, and the slopes `c` of
    soft cap and temperature. Exact, not an estimate: Schraudolph (2002), section 3. Without a soft cap it is the
    diagonal of `jax.hessian` of the loss. With respect to the hidden states it is the variance of the kernel's rows
    under `p_n`.

    **Arguments:** as in `linear_ggn_vector_product`; `targets` are only for the options that look at them; None counts
    every row once. `dtype` is that of the operands of the logits' product.

    **Returns:** a `GGNDiagonal`, float64 for float64 inputs, else float32; never negative unless `A_n` has negative
    directions (`z_loss` with a negative log-normaliser). No entry is a difference of nearly equal numbers where one
    class has nearly everything: at logits (0, -41), where `1 - p` rounds to 0, the diagonal is 1.6e-18. A row that is
    not counted adds exactly 0, whatever it holds; a label out of range, or a row with nan, +inf or only -inf, gives
    nan. It costs four matrix products of the size of the logits. Two are for the hidden states, and `jax.jit` drops
    them where that diagonal is not used. All but the product for the logits are in the dtype of the result.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> diagonal = linear_ggn_diagonal(jnp.array([[2.0, 0.0]]), jnp.zeros((2, 2)))
    >>> diagonal.kernel, diagonal.bias
    (Array([[1., 1.],
           [0., 0.]], dtype=float32), Array([0.25, 0.25], dtype=float32))
    """
    check_matrix_reduction(reduction)
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
        targets_required=False,
    )
    (wide,) = arrays.accumulated(call.head.kernel)
    products = matrix_products(precision, wide.dtype)
    return _linear_ggn_diagonal(call, row_fn=_ChunkDiagonal(call.classes, products))


@dataclasses.dataclass(frozen=True)
class _ChunkDiagonal:
    """The diagonals of a chunk's rows, as the engine takes them."""

    classes: ClassAxis
    products: MatrixProducts
    """Of wide operands."""

    def __call__(
        self,
        logits: Logits,
        per_row: tuple[RowTargets, jax.Array, jax.Array | None],
        shared: tuple[tuple[LogitTransform, LossOptions, jax.Array], jax.Array],
    ) -> tuple[Any, Any]:
        (rows, hidden, valid), ((transform, options, scale), kernel) = per_row, shared
        classes, products = self.classes, self.products
        hidden, kernel = arrays.accumulated(hidden, kernel)
        (raw,) = logits
        rows = ignore_zero_weight_rows(wide_rows(rows, raw), classes, raw)
        dropped = rows.ignored if valid is None else rows.ignored | ~valid[:, None]
        z, slope = jax.jvp(transform, (jnp.where(dropped, 0, raw),), (jnp.ones_like(raw),))
        row = softmax.normalizer(z, classes)
        p = softmax.probabilities(z, row, classes)
        centred, plain = target_mass(z, rows, options, classes), jnp.zeros_like(row.shift)
        if options.z_loss is not None:
            plain = plain + 2 * options.z_loss
            centred = centred + plain * (row.shift + row.log_total)
        weight = scale if rows.weights is None else scale * rows.weights
        centred, plain = (jnp.where(dropped, 0, weight * x) for x in (centred, plain))
        # `p (1 - p)` and `p^2` are the diagonals of the two parts of `A`.
        of_logits = centred * p * -jnp.expm1(softmax.log_probabilities(z, row, classes)) + plain * jnp.square(p)
        of_logits = jnp.where(dropped, 0, jnp.square(slope) * of_logits)
        by_kernel = products.by_kernel(jnp.square(jnp.where(dropped, 0, hidden)), of_logits)
        mean, variance = self._moments(z, p, slope, kernel)
        by_hidden = jnp.where(dropped, 0, centred * variance + plain * jnp.square(mean))
        return (by_kernel, jnp.sum(of_logits, axis=0)), by_hidden

    def _moments(self, z: jax.Array, p: jax.Array, slope: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance of `c_k W_jk` under `p`, `(rows, features)` each.

        Counted from the most likely class, whose own probability then does not enter: `E[x^2] - E[x]^2` has no digit
        left where the others have 1e-9.
        """
        classes, products = self.classes, self.products
        top = classes.min_index(z == classes.max(z))
        at_top = classes.is_class(top, z)
        others = jnp.where(at_top, 0, p)
        first, second = slope * others, jnp.square(slope) * others
        mass = classes.sum(others)
        first = classes.psum(products.by_hidden(first, kernel))
        second = classes.psum(products.by_hidden(second, jnp.square(kernel)))
        base = classes.take(slope, jnp.minimum(top, classes.size(z) - 1)) * self._columns(kernel, top)
        shifted = first - base * mass
        variance = second - 2 * base * first + jnp.square(base) * mass - jnp.square(shifted)
        return base + shifted, jnp.maximum(variance, 0)

    def _columns(self, kernel: jax.Array, top: jax.Array) -> jax.Array:
        """The kernel's column of a class for each row, `(rows, features)`."""
        local = jnp.squeeze(top, -1) - self.classes.offset(kernel)
        count = kernel.shape[1]
        columns = kernel.at[:, jnp.clip(local, 0, count - 1)].get(mode="promise_in_bounds").T
        return self.classes.psum(jnp.where(((local >= 0) & (local < count))[:, None], columns, 0))


@functools.partial(jax.jit, static_argnames=("row_fn",), inline=True)
def _linear_ggn_diagonal(call: LinearCall, *, row_fn: _ChunkDiagonal) -> GGNDiagonal:
    rows, options, counted = call.rows()
    head = call.head
    (wide,) = arrays.accumulated(head.kernel)
    weight = jnp.sum(rows.total_weights(ClassAxis())).astype(wide.dtype)
    divisor = weight if call.divisor is None else call.divisor.astype(wide.dtype)
    scale = quotient(1, divisor) if call.reduction == "mean" else jnp.ones((), wide.dtype)
    split = partition_of(head.kernel)
    specs = P() if mesh_of(head.kernel).empty else (P(*split), P(split[1]))

    def zeros(head: Head) -> tuple[jax.Array, jax.Array]:
        (kernel,) = arrays.accumulated(head.kernel)
        return jnp.zeros_like(kernel), jnp.zeros_like(kernel, shape=kernel.shape[1:])

    (by_kernel, by_bias), by_hidden = stream_row_sums(
        row_fn,
        zeros,
        head,
        rows,
        (call.transform, options, scale),
        call.chunking,
        call.products,
        counted,
        specs,
    )
    by_kernel, by_bias = (sum_to_type(x, head.kernel) for x in (by_kernel, by_bias))
    return GGNDiagonal(call.batch.unflatten(by_hidden), by_kernel, by_bias)
