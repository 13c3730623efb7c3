"""What is done to the logits of a chunk, a block of rows at a time, so that what lies in between stays small."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._engine.chunking import with_rules
from jaxent._engine.devices import target_of
from jaxent._mesh.types import mesh_of, pcast_like

Pytree = Any
Logits = tuple[jax.Array, ...]

# The CPU back end writes out most of what an accelerator's fuses: with all options five arrays as large as the logits.
BLOCKS = 8
LEAST_LOGITS = 2**16  # of a block; heuristic: smaller ones are left to one core


def row_blocks(rows: int, classes: int, like: jax.Array) -> int:
    """Into how many blocks to cut the rows of a chunk; `like` is typed as they are."""
    worth_it = rows % BLOCKS == 0 and rows * classes >= BLOCKS * LEAST_LOGITS
    return BLOCKS if worth_it and target_of(like).on_cpu and mesh_of(like).empty else 1


def by_row_blocks(
    f: Callable[[Logits, Pytree], tuple[Pytree, Logits | None, Pytree]],
    logits: Logits,
    rows: Pytree,
    *,
    differentiable: bool = False,
) -> tuple[Pytree, Logits | None, Pytree]:
    """`sums, others, out = f(logits, rows)`: sums over the rows, arrays like the logits, and results per row.

    The logits are overwritten by the others.
    """
    count = logits[0].shape[0]
    blocks = row_blocks(count, min(z.shape[1] for z in logits), logits[0])
    if blocks == 1:
        return f(logits, rows)
    size = count // blocks

    def cut(x: Pytree, i: jax.Array) -> Pytree:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * size, size, 0), x)

    def put(x: Pytree, part: Pytree, i: jax.Array) -> Pytree:
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, i * size, 0), x, part)

    first = jnp.zeros((), jnp.int32)
    sums, others, out = jax.eval_shape(lambda: f(cut(logits, first), cut(rows, first)))
    sums = jax.tree.map(lambda x: pcast_like(jnp.zeros(x.shape, x.dtype), [x]), sums)
    out = jax.tree.map(lambda x: pcast_like(jnp.zeros((count, *x.shape[1:]), x.dtype), [x]), out)

    own = None if others is None else logits
    # Several arrays are written a block late, after which all of them are read. Else XLA would read one array's block
    # after that of another was overwritten: from a copy of all of it, in every step. A tangent is one more array.
    late = cut(logits, first) if own is not None and (differentiable or len(logits) > 1) else None

    def body(i: jax.Array, state: Pytree) -> Pytree:
        sums, own, late, out = state
        if late is not None:
            own = put(own, late, jnp.maximum(i - 1, 0))
        block = with_rules(i, f) if differentiable else f
        more, others, part = block(cut(logits if own is None else own, i), cut(rows, i))
        if late is None:
            own, others = None if own is None else put(own, others, i), None
        return jax.tree.map(jnp.add, sums, more), own, others, put(out, part, i)

    sums, own, late, out = lax.fori_loop(0, blocks, body, (sums, own, late, out))
    return sums, own if late is None else put(own, late, first + (blocks - 1)), out
