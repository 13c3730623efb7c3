"""Sums over the rows of `hidden @ kernel + bias` other than gradients of a loss, together with per-row results."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxent._engine.chunking import Chunking
from jaxent._engine.streaming import (
    Counted,
    Head,
    Logits,
    MatrixProducts,
    Pytree,
    on_own_rows,
    vary_over_row_axes,
    with_derivative,
)
from jaxent._mesh.types import pcast_like


def stream_row_sums(
    row_fn: Callable[[Logits, Pytree, Pytree], tuple[Pytree, Pytree]],
    zeros: Callable[[Head], Pytree],
    head: Head,
    row_args: Pytree,
    params: Pytree,
    chunking: Chunking,
    products: MatrixProducts,
    counted: Counted,
    sum_specs: Any,
) -> tuple[Pytree, Pytree]:
    """`sums, rows = row_fn(logits, (args, hidden, valid), (params, kernel))` of every chunk, the sums added up.

    Sums start at `zeros(head)` and are typed as `sum_specs` say on an explicit mesh. Rows that are not `valid` must add
    nothing to them.
    """

    def run(moving: Pytree, inputs: Pytree) -> tuple[Pytree, Pytree]:
        (head,), row_args, params, counted = inputs
        params = vary_over_row_axes(params, (head,), products)
        head = jax.tree.map(lambda x: pcast_like(x, jax.tree.leaves(head)), head)
        layer = products.prepared(head)

        def step(carry: Pytree, rows: Pytree, valid: jax.Array | None) -> tuple[Pytree, Pytree]:
            hidden, args = rows
            logits = (products.logits(layer._replace(hidden=hidden)),)
            sums, out = row_fn(logits, (args, hidden, valid), (params, head.kernel))
            return jax.tree.map(jnp.add, carry, sums), out

        carry = jax.tree.map(lambda x: pcast_like(x, jax.tree.leaves(head)), zeros(head))
        per_row = (head.hidden, row_args)
        if moving is None:
            return chunking.loop(step, carry, per_row, counted.mask(by_weight=True))
        moving_rows = (moving[0][0].hidden, moving[1])
        return chunking.scan(step, carry, per_row, moving_rows, counted.mask(by_weight=False), again=True)

    def part(heads: tuple[Head, ...], rows: Pytree, params: Pytree) -> tuple[Pytree, Pytree]:
        return with_derivative(lambda inputs: run(None, inputs), run)((heads, rows[0], params, rows[1]))

    return on_own_rows(part, (head,), (row_args, counted), params, sum_specs)
