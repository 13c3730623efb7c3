"""How large the gradients of single rows are, and what their spread says about the batch size."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.targets import (
    SoftmaxArguments,
    check_row_arguments,
    nan_if_negative,
)
from jaxent._engine.chunking import Chunking
from jaxent._engine.linear_head import (
    LinearCall,
    LogitTransform,
    check_linear_call,
    chunking_for,
    wide_rows,
)
from jaxent._engine.products import Operand, dtype_of
from jaxent._engine.row_results import stream_rows
from jaxent._engine.streaming import Counted, Head, Logits, MatrixProducts
from jaxent._errors import ArgumentValueError, public
from jaxent._math import norms
from jaxent._math.norms import RowSpace
from jaxent._math.row_losses import LossOptions, RowTargets, ignore_zero_weight_rows, softmax_loss_gradient
from jaxent._mesh.apply import Batch, whole_along_others, with_auto_axes
from jaxent._mesh.class_axis import (
    ClassAxis,
    VocabAxis,
    row_sum,
)
from jaxent._mesh.types import may_be_split_by_xla, mesh_of
from jaxent._serialization import exportable
from jaxent._typing import ArrayLike, DTypeLike

Per = Literal["row", "sequence"]


@exportable
class GradientNorms(NamedTuple):
    """Euclidean norms of the gradients of each row's loss, or of each sequence's: `(*batch,)` each."""

    residual: jax.Array
    """With respect to the logits, after soft cap and temperature: `|p - y|` without options, the EL2N score."""
    hidden: jax.Array
    """With respect to the row's hidden state."""
    kernel: jax.Array
    """With respect to the kernel: the Frobenius norm."""
    bias: jax.Array
    """With respect to the logits before soft cap and temperature, which is that of a bias, if there is one."""
    survived: jax.Array
    """That of the part of `bias`'s gradient in the kernel's row space; the rest does not reach the hidden state."""


@public
def linear_gradient_norms(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike,
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
    chunk_rows: int | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
    per: Per = "row",
) -> GradientNorms:
    r"""Norms of the gradients of every single row of `linear_softmax_cross_entropy`, in nats per unit of the argument.

    $$\Big|\frac{\partial \ell_n}{\partial z_n}\Big| = |p_n - y_n|, \quad
    \Big|\frac{\partial \ell_n}{\partial h_n}\Big| = |d_n W^\top|, \quad
    \Big|\frac{\partial \ell_n}{\partial W}\Big| = |d_n|\,|h_n|, \quad
    \Big|\frac{\partial \ell_n}{\partial b}\Big| = |d_n|, \quad |d_n \Pi_W|$$

    where `d_n` is the gradient with respect to the logits before soft cap and temperature, `p_n - y_n` if there are
    none. The first is the EL2N score of Paul et al. (2021), definition 2.2; the third, the norm of an outer product, is
    due to Goodfellow (2015). Equal to the norms of `jax.vmap(jax.grad(...))` of the row losses, which would hold a
    kernel for each row; here rows are processed in chunks, for two matrix products. The last, `survived`, is the part
    of `d_n` in the row space of the kernel, onto which `Pi_W` projects: all that reaches the hidden state. Its ratio to
    `bias` is the share of the gradient that gets through the head (Godey & Artzi, 2026, arXiv:2603.10145). It needs
    `W W^T`, `features / rows` of a product, and `jax.jit` drops it where it is not used.

    **Per sequence.** With `per="sequence"` a loss is the sum of the rows along the last batch axis, and the norms are
    those of its gradients with respect to all of its logits, all of its hidden states, the kernel and the bias:

    $$\Big|\sum_t h_t d_t^\top\Big|^2 = \sum_{ts} \langle h_t, h_s \rangle \langle d_t, d_s \rangle, \qquad
    \Big|\sum_t d_t\Big|, \qquad \sqrt{\textstyle\sum_t |d_t W^\top|^2}$$

    the "ghost norms" of Li et al. (2022), section 4, by which gradients are clipped per example. The first is taken
    from the sum on the left, a block of it at a time, with a triangular factor in place of the hidden states where a
    sequence has fewer tokens than features: inner products would leave half of the digits where the terms nearly
    cancel. It costs a further `min(tokens, features) / features` of a product. A chunk holds whole sequences.

    **Arguments:** those of `linear_softmax_cross_entropy` except for the reduction: the loss of a row is that of
    `reduction="none"`, with its weights, and is not divided by anything. `per`: `"row"` or `"sequence"`.

    **Returns:** `GradientNorms`, each `(*batch,)`, for sequences without the last batch axis; float64 for float64
    inputs, else float32. Rows are scaled before they are squared, and before the product with the kernel: a norm keeps
    its relative accuracy down to the smallest normal number, where `sqrt(sum(x**2))` gives 0 below 1e-23. The norm of
    an ignored row, and of a sequence of such rows, is exactly 0, whatever it holds, and so is its derivative; a label
    out of range, or a row with nan, +inf or only -inf, gives nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> norms = linear_gradient_norms(jnp.full((2, 4), 0.5), jnp.eye(4, 2), jnp.array([1, 0]))
    >>> norms.residual, norms.kernel
    (Array([0.70710677, 0.70710677], dtype=float32), Array([0.70710677, 0.70710677], dtype=float32))
    >>> linear_gradient_norms(jnp.full((2, 4), 0.5), jnp.eye(4, 2), jnp.array([1, 0]), per="sequence").kernel
    Array(0., dtype=float32)
    """
    call = check_linear_call(
        hidden,
        kernel,
        bias,
        SoftmaxArguments(targets, where, weights, class_weights, label_smoothing, z_loss),
        ignore_index=ignore_index,
        soft_cap=soft_cap,
        temperature=temperature,
        chunk_rows=chunk_rows,
        dtype=dtype,
        precision=precision,
        vocab_axis=vocab_axis,
    )
    if per not in ("row", "sequence"):
        raise ArgumentValueError(f"`per` must be 'row' or 'sequence', got {per!r}")
    if per == "sequence":
        if not call.batch.shape:
            expected = "have shape (*batch, tokens, features) with per='sequence'"
            raise arrays.shape_error("hidden", expected, jnp.asarray(hidden))
        if call.batch.split[-1]:
            raise ArgumentValueError(
                f"`hidden` must hold whole sequences on each device with per='sequence', got its tokens split over "
                f"{', '.join(call.batch.split[-1])}"
            )
    return _linear_gradient_norms(call, per=per)


@dataclasses.dataclass(frozen=True)
class _ChunkNorms:
    """The norms of a chunk's rows, or of its sequences, as the engine takes them."""

    classes: ClassAxis
    products: MatrixProducts
    by_sequence: bool
    factored: bool
    """Whether a sequence's hidden states are replaced by a triangular factor, which is smaller."""

    def __call__(self, logits: Logits, per_row: tuple[RowTargets, jax.Array], shared: "_Shared") -> GradientNorms:
        (rows, hidden), ((transform, options, space), (kernel,)) = per_row, shared
        sequences = hidden.shape[:-1]
        if self.by_sequence:
            rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        classes, features = self.classes, ClassAxis()
        (raw,) = logits
        rows = ignore_zero_weight_rows(wide_rows(rows, raw), classes, raw)
        z, pull = jax.vjp(transform, jnp.where(rows.ignored, 0, raw))
        dz = softmax_loss_gradient(z, rows, options, classes)
        (d_raw,) = pull(dz)
        # In units of the row's largest entry: in float16 a gradient of 1e-8 would be 0 before the product.
        unit, size = norms.in_units(d_raw, classes)
        d_hidden = classes.psum(self.products.by_hidden(self.products.by_logits(unit, kernel), kernel))
        by_bias = norms.norm_in_units(unit, classes)
        survived = size * jnp.minimum(space.norms(d_hidden), by_bias)
        each = norms.norm(dz, classes), size * norms.norm(d_hidden, features), survived
        residual, by_hidden, survived = (jnp.where(rows.ignored, 0, x) for x in each)
        (state,) = arrays.accumulated(hidden)
        if not self.by_sequence:
            by_bias = jnp.where(rows.ignored, 0, size * by_bias)
            by_kernel = jnp.where(rows.ignored, 0, by_bias * norms.norm(state, features))
            return GradientNorms(*(x[:, 0] for x in (residual, by_hidden, by_kernel, by_bias, survived)))
        residual, by_hidden, survived, size = (x.reshape(sequences) for x in (residual, by_hidden, survived, size))
        state = jnp.where(rows.ignored.reshape(*sequences, 1), 0, state)
        unit = unit.reshape(*sequences, unit.shape[-1])
        by_kernel, by_bias = self._of_sums(state, unit, dtype_of(kernel), size)
        residual, by_hidden, survived = (norms.norm(x, features)[:, 0] for x in (residual, by_hidden, survived))
        return GradientNorms(residual, by_hidden, by_kernel, by_bias, survived)

    def _of_sums(
        self, state: jax.Array, unit: jax.Array, dtype: np.dtype, size: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`|sum_t h_t d_t^T|` and `|sum_t d_t|` of sequences, for `d_t = size_t unit_t`."""
        largest = norms.power_of_two(jnp.max(size, axis=1, initial=0))
        share = size / largest[:, None]
        by_bias = norms.norm(row_sum(unit * share[:, :, None], 1, keepdims=False), self.classes)[:, 0]
        # The sizes are multiplied into the hidden states, in units of the largest product: a large gradient may meet a
        # small hidden state, and vice versa.
        longest = norms.power_of_two(jnp.max(jnp.abs(state), axis=(1, 2), initial=0))
        state = state / longest[:, None, None]
        reach = share * jnp.max(jnp.abs(lax.stop_gradient(state)), axis=-1, initial=0)
        together = norms.power_of_two(jnp.max(reach, axis=1, initial=0))
        state = state * (share / together[:, None])[:, :, None]
        if self.factored:
            state = norms.triangular_factor(state)
        squares = norms.squared_product_norms(
            state.astype(dtype), unit.astype(dtype), self.classes, self.products.precision_of(dtype), size.dtype
        )
        return largest * longest * (together * norms.root(squares)), largest * by_bias


_Shared = tuple[tuple[LogitTransform, LossOptions, RowSpace], list[jax.Array | Operand]]


@functools.partial(jax.jit, static_argnames=("per",), inline=True)
def _linear_gradient_norms(call: LinearCall, *, per: Per) -> GradientNorms:
    rows, options, counted = call.rows()
    head, batch, chunking = call.head, call.batch, call.chunking
    row_fn = differentiable = _ChunkNorms(call.classes, call.products, per == "sequence", False)
    if per == "sequence" and batch.shape[-1] == 0:
        (hidden,) = arrays.accumulated(batch.unflatten(head.hidden))
        return GradientNorms(*[jnp.sum(hidden, axis=(-2, -1))] * len(GradientNorms._fields))
    if per == "sequence":
        batch, chunking, head, rows, counted = _by_sequence(call, rows, counted)
        tokens, features = head.hidden.shape[1:]
        # There is no triangular factor where a sequence's features are split over devices.
        factored = isinstance(tokens, int) and tokens < features and not may_be_split_by_xla(head.hidden)
        row_fn = dataclasses.replace(row_fn, factored=factored)
    found = stream_rows(
        row_fn,
        (head,),
        (rows, head.hidden),
        (call.transform, options, _row_space(call)),
        chunking,
        call.products,
        counted,
        with_kernels=True,
        differentiable=differentiable,
    )
    return jax.tree.map(batch.unflatten, found)


def _row_space(call: LinearCall) -> RowSpace:
    def of(kernel: jax.Array) -> RowSpace:
        layer = call.products.prepared(call.head._replace(kernel=kernel))
        return RowSpace.of(call.classes.psum(call.products.by_hidden(layer.kernel, layer.kernel)))

    kernel = whole_along_others(call.head.kernel, 0, ())  # once, not in each product and solve
    return with_auto_axes(of, kernel, mesh=mesh_of(kernel), out_specs=P())


def _by_sequence(
    call: LinearCall, rows: RowTargets, counted: Counted
) -> tuple[Batch, Chunking, Head, RowTargets, Counted]:
    """The same with whole sequences as rows: `(sequences, tokens, ...)`."""
    batch = Batch(call.batch.shape[:-1], call.batch.mesh, call.batch.split[:-1])
    like = call.batch.unflatten(call.head.hidden)

    def grouped(x: jax.Array) -> jax.Array:
        return batch.flatten(call.batch.unflatten(x), like)

    head = call.head._replace(hidden=grouped(call.head.hidden))
    rows = jax.tree.map(grouped, rows)
    kept, weights = jax.tree.map(grouped, counted)
    counted = Counted(
        None if kept is None else jnp.any(kept, axis=1),
        None if weights is None else jnp.max(jnp.abs(weights), axis=1, initial=0),
    )
    tokens = head.hidden.shape[1]
    at_once = max(1, call.chunking.chunk_rows // max(1, tokens)) if isinstance(tokens, int) else 1
    return batch, chunking_for(at_once, call.products, head), head, rows, counted


@exportable
class GradientNoise(NamedTuple):
    """Estimates from one batch; `trace` and `squared_norm` are unbiased, their quotient is not."""

    scale: jax.Array
    """`trace / squared_norm`: the simple noise scale, in examples."""
    trace: jax.Array
    """The trace of the covariance of a single example's gradient."""
    squared_norm: jax.Array
    """The squared norm of the true gradient, the mean over all data."""


@public
def gradient_noise_scale(
    norms: ArrayLike, mean_norm: ArrayLike, *, where: ArrayLike | None = None, weights: ArrayLike | None = None
) -> GradientNoise:
    r"""The simple gradient noise scale, in examples, from the gradient norms of single examples and of their mean.

    $$\mathcal{B} = \frac{\mathrm{tr}\,\Sigma}{|G|^2}, \qquad
    \mathrm{tr}\,\Sigma \approx \frac{\overline{|g|^2} - |\bar g|^2}{1 - 1/B}, \qquad
    |G|^2 \approx \frac{|\bar g|^2 - \overline{|g|^2} / B}{1 - 1/B}$$

    McCandlish et al. (2018), equation 2.9 and appendix A.1 with `B_small = 1` and `B_big = B`: the batch size up to
    which more examples per step save steps in nearly the same proportion. Both estimators are unbiased for independent
    examples, and `squared_norm` may therefore come out negative where noise dominates: average `trace` and
    `squared_norm` over many batches before dividing them, as the paper does.

    **Arguments:**

    - `norms`: any shape, the norms `|g_n|` of the examples' gradients, such as `linear_gradient_norms(...).kernel`;
      over several arrays of parameters, the root of the sum of their squares.
    - `mean_norm`: a scalar, the norm of the mean gradient: that of the mean loss, over the same examples.
    - `where`, `weights`: like `norms`; what to leave out, such as ignored rows, and the weights of the mean, `B` being
      `(sum w)^2 / sum w^2`. The norms are those of the examples without their weights.

    **Returns:** `GradientNoise` of three scalars, float64 for float64 inputs, else float32; nan for fewer than two
    examples. The scale does not underflow with the norms. What is left out may be nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape.

    >>> noise = gradient_noise_scale(jnp.array([3.0, 3.0]), 2.5)
    >>> [round(float(x), 4) for x in (noise.trace, noise.squared_norm, noise.scale)]
    [5.5, 3.5, 1.5714]
    """
    singles = arrays.real("norms", norms)
    mean = arrays.real("mean_norm", mean_norm)
    arrays.check_shape("mean_norm", mean, (), "a scalar")
    where, weights = check_row_arguments(singles.shape, where, weights)
    return _gradient_noise_scale(singles, mean, where, nan_if_negative(weights))


@functools.partial(jax.jit, inline=True)
def _gradient_noise_scale(
    norms: jax.Array, mean_norm: jax.Array, where: jax.Array | None, weights: jax.Array | None
) -> GradientNoise:
    norms, mean_norm = arrays.accumulated(norms, mean_norm)
    w = jnp.ones_like(norms) if weights is None else weights.astype(norms.dtype)
    w = w if where is None else jnp.where(where, w, 0)
    norms = jnp.where(w == 0, 0, norms)
    largest = jnp.max(jnp.abs(norms), initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    total = jnp.sum(w)
    small = jnp.sum(w * jnp.square(norms / unit)) / total
    big = jnp.square(mean_norm / unit)
    share = jnp.sum(jnp.square(w)) / jnp.square(total)
    rest = jnp.where(share < 1, 1 - share, jnp.nan)
    trace, squared_norm = (small - big) / rest, (big - share * small) / rest
    return GradientNoise(trace / squared_norm, trace * jnp.square(unit), squared_norm * jnp.square(unit))
