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
from jaxent._engine.products import zeros_with_derivative
from jaxent._engine.row_blocks import by_row_blocks
from jaxent._engine.streaming import (
    Counted,
    Head,
    Layer,
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

    Biases and parameters go in twice if they are narrower than their sums: as they are, and as a wide array that has
    their derivative. The scan adds the chunks' shares of a constant's cotangent in the constant's dtype, and devices
    theirs: a bf16 sum stops growing, as 512 additions of 1/1024 give 0.25. Kernels are such pairs already.
    """
    layers = tuple(map(products.prepared, heads))
    shared = ([layer.bias for layer in layers], params)
    wide = jax.tree.map(_wide, shared)
    biases, params = jax.tree.map(lambda x, y: x if y is None else lax.stop_gradient(x), shared, wide)
    layers = tuple(layer._replace(bias=bias) for layer, bias in zip(layers, biases, strict=True))

    def part(layers: tuple[Layer, ...], rows: Pytree, shared: Pytree) -> Pytree:
        return None, _each_row(
            (row_fn, differentiable or row_fn), with_kernels, chunking, products, layers, rows[0], *shared, rows[1]
        )

    return on_own_rows(part, layers, (row_args, counted), (params, wide))[1]


def _wide(x: jax.Array) -> jax.Array | None:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return zeros_with_derivative(x) if floating and x.dtype != arrays.accumulation_dtype(x) else None


@jax.custom_jvp
def _narrow(x: jax.Array, wide: jax.Array) -> jax.Array:
    """`x` with the derivative of `wide`."""
    del wide
    return x


@_narrow.defjvp
def _narrow_jvp(primals, tangents):
    return _narrow(*primals), tangents[1].astype(primals[0].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _each_row(row_fns, with_kernels, chunking, products, layers, row_args, params, wide, counted) -> Pytree:
    row_fn, _ = row_fns

    def by_blocks(logits: Logits, args: Pytree, params: Pytree) -> Pytree:
        return by_row_blocks(lambda logits, args: (None, None, row_fn(logits, args, params)), logits, args)[2]

    row_step = row_fn if with_kernels else by_blocks
    step, hidden = _row_step(row_step, with_kernels, products, layers, params, None)
    return chunking.loop(step, None, (hidden, row_args), counted.mask(by_weight=True))[1]


def _each_row_jvp(row_fns, with_kernels, chunking, products, primals, tangents):
    _, row_fn = row_fns
    moving = jax.tree.map(is_differentiated, tangents)
    free, fixed = partition(primals, moving)

    def rows(free: Pytree) -> Pytree:
        layers, row_args, params, wide, counted = merge(free, fixed)
        step, hidden = _row_step(row_fn, with_kernels, products, layers, params, wide)
        moving_rows = ([layer.hidden for layer in moving[0]], moving[1])
        kept = counted.mask(by_weight=False)  # a later derivative may be with respect to the weights
        return chunking.scan(step, None, (hidden, row_args), moving_rows, kept, again=True)[1]

    # The value has its rule: partial evaluation of the scan would drop those of its body, as in `_with_derivative`.
    value = _each_row(row_fns, with_kernels, chunking, products, *primals)
    return value, jax.jvp(rows, (free,), (partition(tangents, moving)[0],))[1]


_each_row.defjvp(_each_row_jvp, symbolic_zeros=True)


def _row_step(row_fn, with_kernels, products, layers, params, wide) -> tuple[Callable[..., Any], list[jax.Array]]:
    """A step of the loop over rows, and the hidden states that it goes over."""
    params = vary_over_row_axes(params, layers, products)
    like = jax.tree.leaves(layers)
    if wide is not None:
        biases, others = wide
        wide = jax.tree.map(lambda x: pcast_like(x, like), biases), vary_over_row_axes(others, layers, products)
    layers = jax.tree.map(lambda x: pcast_like(x, like), layers)
    shared = ([layer.bias for layer in layers], params)

    def step(carry: None, rows: Pytree, valid: jax.Array | None) -> tuple[None, Pytree]:
        del valid
        hidden, args = rows
        biases, params = shared
        if wide is not None:
            biases, params = jax.tree.map(lambda x, y: x if y is None else _narrow(x, y), shared, wide)
        parts = zip(hidden, layers, biases, strict=True)
        logits = tuple(products.logits(Layer(_rows(h), layer.kernel, bias)) for h, layer, bias in parts)
        return carry, row_fn(logits, args, (params, [layer.kernel for layer in layers]) if with_kernels else params)

    return step, [layer.hidden for layer in layers]


def _rows(hidden: jax.Array) -> jax.Array:
    """The hidden states of a block of sequences as those of its tokens."""
    return hidden if hidden.ndim == 2 else hidden.reshape(hidden.shape[0] * hidden.shape[1], hidden.shape[2])
