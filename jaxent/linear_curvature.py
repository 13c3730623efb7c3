"""Gauss-Newton and Fisher products of a linear layer, streamed, without the logits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.reduction import MatrixReduction, check_matrix_reduction
from jaxent._arguments.targets import (
    SoftmaxArguments,
)
from jaxent._engine.linear_head import (
    LinearCall,
    LogitTransform,
    check_linear_call,
    stream_reduced,
    wide_rows,
)
from jaxent._engine.products import unit_of
from jaxent._engine.streaming import Head, Logits
from jaxent._errors import ArgumentValueError, public
from jaxent._math.quadratic_forms import Fisher, GaussNewton, QuadraticForm
from jaxent._math.row_losses import LossOptions, RowTargets
from jaxent._mesh.class_axis import (
    ClassAxis,
    VocabAxis,
)
from jaxent._typing import ArrayLike, DTypeLike


@public
def linear_ggn_vector_product(
    hidden: ArrayLike,
    kernel: ArrayLike,
    v: tuple[ArrayLike | None, ...],
    *,
    targets: ArrayLike | None = None,
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
) -> tuple[jax.Array | None, ...]:
    r"""`ggn_vector_product` of a linear layer with respect to hidden states, kernel and bias, streamed, in its unit.

    $$u_n = J_n v = v^h_n W + h_n V^W + v^b, \qquad
    G v = \frac{1}{W} \sum_n \big(A_n u_n W^\top,\; h_n^\top A_n u_n,\; A_n u_n\big)$$

    with the `A_n` of `ggn_vector_product`, for the logits of `linear_softmax_cross_entropy`; soft cap and temperature
    belong to the model and enter through their derivatives. Rows are processed in chunks: the memory does not grow with
    their number. A product for the kernel alone costs three matrix products of the size of the logits: each of `hidden`
    and `kernel` adds two to the one for the logits.

    **Arguments:**

    - `hidden`: `(*batch, features)`. `kernel`: `(features, classes)`. `bias`: `(classes,)`.
    - `v`: `(v_hidden, v_kernel)` or `(v_hidden, v_kernel, v_bias)`, shaped like what they are steps of. None stands for
      what is held fixed: `(None, v_kernel)` is the matrix of the kernel alone.
    - `targets` and the options as in `ggn_vector_product`; `soft_cap`, `temperature`, `chunk_rows`, `dtype`,
      `precision`, `vocab_axis` as in `linear_softmax_cross_entropy`.

    **Returns:** a tuple with the shapes and dtypes of `v`, None where it is None. A row that is not counted adds
    exactly 0, whatever it holds.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel = jnp.eye(2), jnp.zeros((2, 2))
    >>> linear_ggn_vector_product(hidden, kernel, (None, jnp.array([[1.0, 0.0], [0.0, 0.0]])))[1]
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _linear_product(
        GaussNewton,
        hidden,
        kernel,
        bias,
        v,
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
    )


@public
def linear_fisher_vector_product(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike,
    v: tuple[ArrayLike | None, ...],
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> tuple[jax.Array | None, ...]:
    r"""`fisher_vector_product` of a linear layer with respect to hidden states, kernel and bias, streamed, in its unit.

    $$F v = \frac{1}{W} \sum_n w_n\, g_n \langle g_n, v \rangle, \qquad
    \langle g_n, v \rangle = (p_n - y_n)^\top (v^h_n W + h_n V^W + v^b)$$

    **Arguments:** `hidden`, `kernel`, `bias`, `v`, `soft_cap`, `temperature`, `chunk_rows`, `dtype`, `precision` and
    `vocab_axis` as in `linear_ggn_vector_product`; `targets` and the other options as in `fisher_vector_product`.

    **Returns:** a tuple with the shapes and dtypes of `v`, None where it is None. A row that is not counted adds
    exactly 0, whatever it holds. Costs what `linear_ggn_vector_product` costs.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel, v = jnp.eye(2), jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    >>> linear_fisher_vector_product(hidden, kernel, jnp.array([0, 1]), (None, v))[1]
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _linear_product(
        Fisher,
        hidden,
        kernel,
        bias,
        v,
        SoftmaxArguments(targets, where, weights, None, label_smoothing, 0.0),
        ignore_index=ignore_index,
        soft_cap=soft_cap,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        chunk_rows=chunk_rows,
        dtype=dtype,
        precision=precision,
        vocab_axis=vocab_axis,
    )


def _linear_product(
    form: Callable[[ClassAxis], QuadraticForm],
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    v: tuple[ArrayLike | None, ...],
    arguments: SoftmaxArguments,
    *,
    reduction: MatrixReduction,
    **options: Any,
) -> tuple[jax.Array | None, ...]:
    check_matrix_reduction(reduction)
    steps = _check_steps(v, (hidden, kernel, bias))
    call = check_linear_call(
        hidden,
        kernel,
        bias,
        arguments,
        reduction=reduction,
        blocks=2,  # the logits, and their step or its derivative
        targets_required=form is Fisher,
        **options,
    )
    by_hidden, *by_layer = steps
    if by_hidden is not None:
        by_hidden = call.batch.flatten(by_hidden, by_hidden)
    return _linear_curvature(call, (by_hidden, *by_layer), row_fn=_StreamedForm(form(call.classes)))[: len(v)]


@dataclasses.dataclass(frozen=True)
class _StreamedForm:
    """A form as the engine takes it: the first block holds the logits, the others add up to their step."""

    form: QuadraticForm

    def __call__(
        self,
        logits: Logits,
        rows: RowTargets,
        shared: tuple[LogitTransform, LossOptions, jax.Array | None, tuple[jax.Array | None, ...]],
    ) -> tuple[jax.Array, None]:
        transform, options, by_bias, units = shared
        raw, *steps = logits
        steps = [u if unit is None else unit * u for u, unit in zip(steps, units, strict=True)]
        if by_bias is not None:
            steps.append(jnp.broadcast_to(by_bias[None, :], raw.shape))
        step = functools.reduce(jnp.add, steps)
        z, step = jax.jvp(transform, (raw,), (step,))
        return self.form(z, step, wide_rows(rows, z), options)[:, 0], None


@functools.partial(jax.jit, static_argnames=("row_fn",), inline=True)
def _linear_curvature(
    call: LinearCall, steps: tuple[jax.Array | None, ...], *, row_fn: _StreamedForm
) -> tuple[jax.Array | None, ...]:
    head = call.head
    rows, options, counted = call.rows()
    weights = rows.total_weights(ClassAxis())

    # Steps are rounded only as operands of the products. float16 holds neither a step of 1e-8 nor one of 1e5: steps are
    # divided by a unit, which then multiplies their part of the logits.
    products = dataclasses.replace(call.products, dtype=call.products.operand_dtype(head))
    wide = call.logits.dtype

    def in_units(step: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        step = step.astype(wide)
        if products.dtype != np.float16:
            return step, None
        unit = unit_of(step)
        return step / unit, unit

    def half_form(steps: tuple[jax.Array | None, ...]) -> jax.Array:
        by_hidden, by_kernel, by_bias = steps
        heads, units = [head], []
        if by_kernel is not None:
            by_kernel, unit = in_units(by_kernel)
            heads.append(Head(head.hidden, by_kernel, None))
            units.append(unit)
        if by_hidden is not None:
            by_hidden, unit = in_units(by_hidden)
            heads.append(Head(by_hidden, head.kernel, None))
            units.append(unit)
        by_bias = None if by_bias is None else by_bias.astype(wide)
        total: Any
        total, _ = stream_reduced(
            row_fn,
            tuple(heads),
            rows,
            (call.transform, options, by_bias, tuple(units)),
            counted,
            weights,
            call.reduction,
            call.divisor,
            call.chunking,
            products,
        )
        return total

    by_hidden, *by_layer = steps if all(x is None for x in steps) else jax.grad(half_form)(steps)
    return (None if by_hidden is None else call.batch.unflatten(by_hidden), *by_layer)


def _check_steps(
    v: Any, operands: tuple[ArrayLike | None, ...]
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """The steps of hidden states, kernel and bias; None is held fixed."""
    if not isinstance(v, tuple) or len(v) not in (2, 3):
        raise arrays.dtype_error("v", "be a tuple (v_hidden, v_kernel) or (v_hidden, v_kernel, v_bias)", v)
    steps = []
    for name, step, operand in zip(("hidden", "kernel", "bias"), (*v, None)[:3], operands, strict=True):
        if step is not None:
            step = arrays.floating(f"v_{name}", step)
            if operand is None:
                raise ArgumentValueError(f"`v_{name}` must be None, since there is no `{name}`")
            arrays.check_shape(f"v_{name}", step, jnp.shape(operand), f"that of `{name}`")
        steps.append(step)
    return steps[0], steps[1], steps[2]
