"""Sums over many classes on one CPU: a block of rows at a time, so that what XLA writes out stays in the cache.

XLA's CPU back end does not always fuse the exponentials into their sum, but writes them all out, as many numbers as
there are logits. A block's worth of them is written to the same small piece of memory every time.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._mesh.types import may_be_split_by_xla

WIDE_CLASSES = 2**12  # heuristic: with fewer, a fused sum is as fast where there is one, and compiles faster
BLOCK_ENTRIES = 2**19  # heuristic: 2 MiB of float32


def has_wide_rows(z: jax.Array, axis: int) -> bool:
    """Whether there are too many classes for a fused sum; a symbolic number of them, as of `jax.export`, is not."""
    return isinstance(z.shape[axis], int) and z.shape[axis] >= WIDE_CLASSES


def in_row_blocks(row_fn: Callable[..., jax.Array], axis: int, z: jax.Array, *row_args: jax.Array) -> jax.Array:
    """`row_fn(z, *row_args)`, one number per row of `z`, of a block of rows at a time where the classes are last.

    Rows that may be split over devices are left together: to cut them into blocks would gather them.
    """
    batch, classes = z.shape[:-1], z.shape[-1]
    block = max(1, BLOCK_ENTRIES // classes)
    split = may_be_split_by_xla(z) or not jax.typeof(z).sharding.mesh.empty
    if axis != -1 or split or not all(isinstance(n, int) for n in batch) or math.prod(batch) <= block:
        return row_fn(z, *row_args)

    def blocked(z: jax.Array, *row_args: jax.Array) -> jax.Array:
        rows = math.prod(batch)
        flat = [x.reshape(rows, *x.shape[len(batch) :]) for x in (z, *row_args)]

        def step(i: jax.Array, results: jax.Array) -> jax.Array:
            # The start of the last block is clamped, so that it has whole rows too: some are computed twice.
            start = i * np.uint32(block)
            part = row_fn(*(lax.dynamic_slice_in_dim(x, start, block) for x in flat))
            return lax.dynamic_update_slice_in_dim(results, part, start, 0)

        # Unsigned: JAX wraps a signed start that may be negative, which takes as long to compile as the rest.
        count = np.uint32(-(-rows // block))
        return lax.fori_loop(np.uint32(0), count, step, jnp.zeros(rows, z.dtype)).reshape(batch)

    return lax.platform_dependent(z, *row_args, cpu=blocked, default=row_fn)
