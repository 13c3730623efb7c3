"""The other half of the engine: a pytree with one entry per row, of `hidden @ kernel + bias`, in four products.

A cotangent of the entries is not known while the logits are there. A chunk's logits are computed again on the way back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._arguments import arrays
from jaxent._engine.chunking import Chunking, merge, partition
from jaxent._engine.row_blocks import by_row_blocks
from jaxent._engine.streaming import (
    Counted,
    Head,
    Logits,
    MatrixProducts,
    Pytree,
    RowFunction,
    is_differentiated,
    on_own_rows,
    vary_over_row_axes,
)
from jaxent._mesh.types import pcast_like


def stream_rows(
    row_fn: RowFunction,
    heads: tuple[Head, ...],
    row_args: Pytree,
    params: Pytree,
    chunking: Chunking,
    products: MatrixProducts,
    counted: Counted,
    *,
    with_kernels: bool = False,
    differentiable: RowFunction | None = None,
) -> Pytree:
    """`row_fn(logits, row_args, params)` of all rows; `row_fn` returns a pytree of `(chunk_rows, ...)` arrays.

    With `with_kernels` it has a matrix product of its own: it gets whole chunks, and `(params, kernels)` for `params`.
    Derivatives are those of `differentiable`, an equal function, if there is one.

    Hidden states of `(sequences, tokens, features)` make rows of whole sequences: results have one entry for each, and
    the logits, `(sequences * tokens, classes)`, one for each token.

    What rows share goes in twice if it is narrower than its sums: as it is, and as a wide array that has its
    derivative. The scan adds the chunks' shares of a constant's cotangent in the constant's dtype, and devices theirs:
    a bf16 sum stops growing, as 512 additions of 1/1024 give 0.25.
    """
    shared = ([(head.kernel, head.bias) for head in heads], params)
    wide = jax.tree.map(_wide, shared)
    layers, narrow = jax.tree.map(lambda x, y: x if y is None else lax.stop_gradient(x), shared, wide)

    def part(heads: tuple[Head, ...], rows: Pytree, shared: Pytree) -> Pytree:
        return None, _each_row(
            (row_fn, differentiable or row_fn), with_kernels, chunking, products, heads, rows[0], *shared, rows[1]
        )

    heads = tuple(Head(head.hidden, *layer) for head, layer in zip(heads, layers, strict=True))
    return on_own_rows(part, heads, (row_args, counted), (narrow, wide))[1]


def _wide(x: jax.Array) -> jax.Array | None:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return _zeros_with_derivative(x) if floating and x.dtype != arrays.accumulation_dtype(x) else None


@jax.custom_jvp
def _zeros_with_derivative(x: jax.Array) -> jax.Array:
    """Zeros in the accumulation dtype, with the derivative of `x`."""
    return jnp.zeros_like(x, dtype=arrays.accumulation_dtype(x))


@_zeros_with_derivative.defjvp
def _zeros_with_derivative_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    zeros = _zeros_with_derivative(x)
    return zeros, dx.astype(zeros.dtype)


@jax.custom_jvp
def _narrow(x: jax.Array, wide: jax.Array) -> jax.Array:
    """`x` with the derivative of `wide`."""
    del wide
    return x


@_narrow.defjvp
def _narrow_jvp(primals, tangents):
    return _narrow(*primals), tangents[1].astype(primals[0].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _each_row(row_fns, with_kernels, chunking, products, heads, row_args, params, wide, counted) -> Pytree:
    row_fn, _ = row_fns

    def by_blocks(logits: Logits, args: Pytree, params: Pytree) -> Pytree:
        return by_row_blocks(lambda logits, args: (None, None, row_fn(logits, args, params)), logits, args)[2]

    row_step = row_fn if with_kernels else by_blocks
    step, hidden = _row_step(row_step, with_kernels, products, heads, params, None)
    return chunking.loop(step, None, (hidden, row_args), counted.mask(by_weight=True))[1]


def _each_row_jvp(row_fns, with_kernels, chunking, products, primals, tangents):
    _, row_fn = row_fns
    moving = jax.tree.map(is_differentiated, tangents)
    free, fixed = partition(primals, moving)

    def rows(free: Pytree) -> Pytree:
        heads, row_args, params, wide, counted = merge(free, fixed)
        step, hidden = _row_step(row_fn, with_kernels, products, heads, params, wide)
        moving_rows = ([head.hidden for head in moving[0]], moving[1])
        kept = counted.mask(by_weight=False)  # a later derivative may be with respect to the weights
        return chunking.scan(step, None, (hidden, row_args), moving_rows, kept, again=True)[1]

    return jax.jvp(rows, (free,), (partition(tangents, moving)[0],))


_each_row.defjvp(_each_row_jvp, symbolic_zeros=True)


def _row_step(row_fn, with_kernels, products, heads, params, wide) -> tuple[Callable[..., Any], list[jax.Array]]:
    """A step of the loop over rows, and the hidden states that it goes over."""
    params = vary_over_row_axes(params, heads, products)
    like = jax.tree.leaves(heads)
    if wide is not None:
        layers, others = wide
        wide = jax.tree.map(lambda x: pcast_like(x, like), layers), vary_over_row_axes(others, heads, products)
    heads = jax.tree.map(lambda x: pcast_like(x, like), heads)
    shared = ([(head.kernel, head.bias) for head in heads], params)

    def step(carry: None, rows: Pytree, valid: jax.Array | None) -> tuple[None, Pytree]:
        del valid
        hidden, args = rows
        layers, params = shared
        if wide is not None:
            layers, params = jax.tree.map(lambda x, y: x if y is None else _narrow(x, y), shared, wide)
        logits = tuple(_logits(products, Head(_rows(h), *layer)) for h, layer in zip(hidden, layers, strict=True))
        return carry, row_fn(logits, args, (params, [kernel for kernel, _ in layers]) if with_kernels else params)

    return step, [head.hidden for head in heads]


def _rows(hidden: jax.Array) -> jax.Array:
    """The hidden states of a block of sequences as those of its tokens."""
    return hidden if hidden.ndim == 2 else hidden.reshape(hidden.shape[0] * hidden.shape[1], hidden.shape[2])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _logits(products: MatrixProducts, head: Head) -> jax.Array:
    return products.logits(head)


@_logits.defjvp
def _logits_jvp(products, primals, tangents):
    (head,), (step,) = primals, tangents
    # Each product is rounded to the operands' dtype, so that its transpose multiplies operands of that dtype.
    dtype = head.kernel.dtype
    by_hidden = lax.dot(step.hidden, head.kernel, precision=products.precision, preferred_element_type=dtype)
    by_kernel = lax.dot(head.hidden, step.kernel, precision=products.precision, preferred_element_type=dtype)
    z = _logits(products, head)
    dz = by_hidden.astype(z.dtype) + by_kernel.astype(z.dtype)
    return z, dz if step.bias is None else dz + step.bias.astype(z.dtype)[None, :]
