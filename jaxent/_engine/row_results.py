"""The other half of the engine: a pytree with one entry per row, of `hidden @ kernel + bias`, in four products.

A cotangent of the entries is not known while the logits are there. A chunk's logits are computed again on the way back.
"""

import functools
import warnings

import jax

from jaxent._engine.chunking import Chunking
from jaxent._engine.row_blocks import by_row_blocks
from jaxent._engine.streaming import (
    Counted,
    Head,
    Layer,
    Logits,
    MatrixProducts,
    Pytree,
    RowFunction,
    on_own_rows,
    vary_over_row_axes,
    with_derivative,
    with_wide_params,
)
from jaxent._errors import ShardingWarning
from jaxent._mesh.types import automatic_devices, pcast_like


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
    """
    row_fns = [with_wide_params(f, params) for f in (row_fn, differentiable or row_fn)]
    (row_fn, params), (differentiable, _) = row_fns

    def by_blocks(logits: Logits, args: Pytree, params: Pytree) -> Pytree:
        return by_row_blocks(lambda logits, args: (None, None, row_fn(logits, args, params)), logits, args)[2]

    def run(row_fn: RowFunction, moving: Pytree, inputs: Pytree) -> Pytree:
        layers, row_args, params, counted = inputs
        params = vary_over_row_axes(params, layers, products)
        layers = jax.tree.map(lambda x: pcast_like(x, jax.tree.leaves(layers)), layers)
        shared = (params, [layer.kernel for layer in layers]) if with_kernels else params

        def step(carry: None, rows: Pytree, valid: jax.Array | None) -> tuple[None, Pytree]:
            del valid
            hidden, args = rows
            logits = [products.logits(layer._replace(hidden=_rows(h))) for h, layer in zip(hidden, layers, strict=True)]
            return carry, row_fn(tuple(logits), args, shared)

        per_row = ([layer.hidden for layer in layers], row_args)
        if moving is None:
            return chunking.loop(step, None, per_row, counted.mask(by_weight=True))[1]
        if any(jax.tree.leaves([layer.kernel for layer in moving[0]])):
            _warn_of_sums(chunking, layers)
        moving_rows = ([layer.hidden for layer in moving[0]], moving[1])
        kept = counted.mask(by_weight=False)  # a later derivative may be with respect to the weights
        return chunking.scan(step, None, per_row, moving_rows, kept, again=True)[1]

    value = functools.partial(run, row_fn if with_kernels else by_blocks, None)
    derivative = functools.partial(run, differentiable)

    def part(layers: tuple[Layer, ...], rows: Pytree, params: Pytree) -> tuple[None, Pytree]:
        return None, with_derivative(value, derivative)((layers, rows[0], params, rows[1]))

    return on_own_rows(part, tuple(map(products.prepared, heads)), (row_args, counted), params)[1]


def _warn_of_sums(chunking: Chunking, layers: tuple[Layer, ...]) -> None:
    """The transpose of a scan adds up the kernel's gradient; where no type says which axes split the rows, XLA has to
    add it up over the devices in every step.
    """
    on_automatic_mesh = chunking.strided and any(automatic_devices(layer.hidden) > 1 for layer in layers)
    if not on_automatic_mesh or chunking.chunks == 1:
        return
    warnings.warn(
        "jaxent: on an automatic mesh XLA sums the kernel's gradient of per-row results over the devices in each of "
        f"{chunking.chunks} chunks. To have it summed once, say how the arguments are split: "
        "`jax.sharding.explicit_axes(f, in_sharding=...)`, under `jax.set_mesh(mesh)`",
        ShardingWarning,
        stacklevel=2,
    )


def _rows(hidden: jax.Array) -> jax.Array:
    """The hidden states of a block of sequences as those of its tokens."""
    return hidden if hidden.ndim == 2 else hidden.reshape(hidden.shape[0] * hidden.shape[1], hidden.shape[2])
