"""How large the gradients of single rows are, and what their spread says about the batch size."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.targets import (
    SoftmaxArguments,
    check_row_arguments,
    nan_if_negative,
)
from jaxent._engine.linear_head import (
    LinearCall,
    LogitTransform,
    check_linear_call,
    wide_rows,
)
from jaxent._engine.row_results import stream_rows
from jaxent._engine.streaming import Logits
from jaxent._errors import public
from jaxent._math.row_losses import LossOptions, RowTargets, ignore_zero_weight_rows, softmax_loss_gradient
from jaxent._mesh.class_axis import (
    ClassAxis,
    VocabAxis,
)
from jaxent._serialization import exportable
from jaxent._typing import ArrayLike


@exportable
class GradientNorms(NamedTuple):
    """The Euclidean norms of the gradients of each row's loss, `(*batch,)` each."""

    residual: jax.Array
    """By the logits, after soft cap and temperature: `|p - y|` without options, the EL2N score."""
    hidden: jax.Array
    """By the row's hidden state."""
    kernel: jax.Array
    """By the kernel, the Frobenius norm."""
    bias: jax.Array
    """By the bias, whether there is one or not: by the logits before soft cap and temperature."""


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
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> GradientNorms:
    r"""Norms of the gradients of every single row of `linear_softmax_cross_entropy`, in nats per unit of the argument.

    $$\Big|\frac{\partial \ell_n}{\partial z_n}\Big| = |p_n - y_n|, \quad
    \Big|\frac{\partial \ell_n}{\partial h_n}\Big| = |d_n W^\top|, \quad
    \Big|\frac{\partial \ell_n}{\partial W}\Big| = |d_n|\,|h_n|, \quad
    \Big|\frac{\partial \ell_n}{\partial b}\Big| = |d_n|$$

    where `d_n` is the gradient with respect to the logits before soft cap and temperature, `p_n - y_n` if there are
    none. The first is the EL2N score of Paul et al. (2021), definition 2.2; the third, the norm of an outer product, is
    due to Goodfellow (2015). Equal to the norms of `jax.vmap(jax.grad(...))` of the row losses, which would hold a
    kernel for each row; here rows are processed in chunks, for two matrix products.

    **Arguments:** those of `linear_softmax_cross_entropy` but for the reduction: the loss of a row is that of
    `reduction="none"`, with its weights, and is not divided by anything.

    **Returns:** `GradientNorms`, each `(*batch,)`, float64 for float64 inputs, else float32. Rows are scaled before
    they are squared, and before the product with the kernel: a norm keeps its relative accuracy down to the smallest
    normal number, where `sqrt(sum(x**2))` gives 0 below 1e-23. The norm of an ignored row is exactly 0, whatever it
    holds, and so is its derivative; a label out of range, or a row with nan, +inf or only -inf, gives nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> norms = linear_gradient_norms(jnp.full((1, 4), 0.5), jnp.zeros((4, 2)), jnp.array([1]))
    >>> norms.residual, norms.kernel
    (Array([0.70710677], dtype=float32), Array([0.70710677], dtype=float32))
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
        precision=precision,
        vocab_axis=vocab_axis,
    )
    return _linear_gradient_norms(call)


@functools.partial(jax.jit, inline=True)
def _linear_gradient_norms(call: LinearCall) -> GradientNorms:
    rows, options, counted = call.rows()
    head, classes, products = call.head, call.classes, call.products
    dtype = head.kernel.dtype

    def row_fn(
        logits: Logits, per_row: tuple[RowTargets, jax.Array], shared: tuple[tuple[LogitTransform, LossOptions], Any]
    ) -> GradientNorms:
        (rows, hidden), ((transform, options), (kernel,)) = per_row, shared
        z, pull = jax.vjp(transform, logits[0])
        rows = ignore_zero_weight_rows(wide_rows(rows, z), classes, z)
        dz = softmax_loss_gradient(z, rows, options, classes)
        (d_raw,) = pull(dz)
        # In units of the row's largest entry: in float16 a gradient of 1e-8 would be 0 before the product.
        unit, size = _in_units(d_raw, classes)
        d_hidden = classes.psum(products.by_hidden(unit.astype(dtype), kernel.astype(dtype)))
        by_bias = size * _norm_in_units(unit, classes)
        features = ClassAxis()
        (state,) = arrays.accumulated(hidden)
        norms = GradientNorms(
            _norm(dz, classes), size * _norm(d_hidden, features), by_bias * _norm(state, features), by_bias
        )
        return jax.tree.map(lambda x: jnp.where(rows.ignored, 0, x)[:, 0], norms)

    norms = stream_rows(
        row_fn,
        (head,),
        (rows, head.hidden),
        (call.transform, options),
        call.chunking,
        products,
        counted,
        with_kernels=True,
    )
    return jax.tree.map(call.batch.unflatten, norms)


def _in_units(x: jax.Array, axis: ClassAxis) -> tuple[jax.Array, jax.Array]:
    """The rows, divided by their largest entry, and that entry, a constant; 1 where there is nothing to divide by."""
    largest = axis.max(jnp.abs(x))
    size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return x / size, size


def _norm(x: jax.Array, axis: ClassAxis) -> jax.Array:
    """The Euclidean norm of each row, with derivative 0 where it is 0."""
    unit, size = _in_units(x, axis)
    return size * _norm_in_units(unit, axis)


def _norm_in_units(unit: jax.Array, axis: ClassAxis) -> jax.Array:
    squares = axis.sum(jnp.square(unit))
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


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
    which more examples a step buy nearly proportionally fewer steps. Both estimators are unbiased for independent
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
