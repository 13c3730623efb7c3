"""In which orientation XLA's CPU back end multiplies the matrices of a linear layer fastest, from their shapes alone.

It has two libraries. YNNPACK takes a product whose left operand is contracted along its last axis; it copies the right
operand into blocks, which pays if the left one has many rows. Eigen takes the others, needs fewer rows, and converts
bf16 operands to float32 first, so that no matrix unit of the processor is used.

The rates behind the rules are in benchmarks/README.md. Where a mesh may split the operands nothing is turned: XLA would
have to find a sharding for what is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._engine.devices import target_of
from jaxent._mesh.types import mesh_of

FEW_ROWS = 64  # up to which Eigen makes the logits faster: up to 2.3 times as fast at 64 rows, and slower at 128
KERNEL_ROWS = 4  # times as many features as rows, from which the kernel belongs on the left of `dz @ kernel.T`
FEATURES_TURNED = 256  # from which float32 hidden states are turned for the gradient of the kernel


def turns_for_logits(hidden: jax.Array, kernel: jax.Array) -> bool:
    """Whether `hidden @ kernel` is faster as a product with `turned(hidden)`, contracted along its first axis."""
    return _known(hidden, kernel) and hidden.dtype == np.float32 and 1 < hidden.shape[0] <= FEW_ROWS


def has_kernel_first(dz: jax.Array, kernel: jax.Array) -> bool:
    """Whether `dz @ kernel.T` is faster as `turned(kernel @ dz.T)`: the smaller operand is the one to copy."""
    return _known(dz, kernel) and KERNEL_ROWS * dz.shape[0] <= kernel.shape[0]


def turns_for_kernel(hidden: jax.Array, dz: jax.Array) -> bool:
    """Whether `hidden.T @ dz` is faster with `turned(hidden)` on the left."""
    if not _known(hidden, dz) or hidden.shape[0] == 1:
        return False
    return hidden.dtype == jnp.bfloat16 or hidden.shape[1] >= FEATURES_TURNED


def turned(x: jax.Array) -> jax.Array:
    """The transpose, as an array of its own: XLA would multiply by `x` in the other orientation instead.

    In two halves, since XLA does not see a bf16 operand behind a barrier and a transpose, and converts it to float32.
    """
    half = x.shape[1] // 2
    return lax.optimization_barrier(jnp.concatenate([x[:, :half].T, x[:, half:].T]))


def _known(a: jax.Array, b: jax.Array) -> bool:
    """Whether the rules were measured for these operands."""
    fixed = all(isinstance(n, int) for n in (*a.shape, *b.shape))  # else a symbol of `jax.export`
    measured = a.dtype == b.dtype and a.dtype in (np.float32, jnp.bfloat16)
    return fixed and measured and target_of(a, b).on_cpu and mesh_of(a, b).empty
