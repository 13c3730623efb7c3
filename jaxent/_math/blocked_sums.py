"""Sums over the classes of many logits on one CPU, a block of rows at a time, so that what XLA writes stays in cache.

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

LARGE = 2**22  # heuristic: 16 MiB of float32, beyond a core's own cache
BLOCK_ENTRIES = 2**19  # heuristic: 2 MiB of float32


def takes_blocks(z: jax.Array, axis: int) -> bool:
    """Whether the logits are many, and rows can be cut into blocks: the classes are last and no size is a symbol of
    `jax.export`. To cut rows that may be split over devices would gather them.
    """
    split = may_be_split_by_xla(z) or not jax.typeof(z).sharding.mesh.empty
    return axis == -1 and not split and all(isinstance(n, int) for n in z.shape) and math.prod(z.shape) >= LARGE


def in_row_blocks(row_fn: Callable[..., jax.Array], z: jax.Array, *row_args: jax.Array) -> jax.Array:
    """`row_fn(z, *row_args)`, one number per row of `z`, of a block of rows at a time on a CPU, if `takes_blocks`."""
    batch, classes = z.shape[:-1], z.shape[-1]
    rows, block = math.prod(batch), max(1, BLOCK_ENTRIES // classes)

    def blocked(z: jax.Array, *row_args: jax.Array) -> jax.Array:
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
