"""In which orientation XLA's CPU back end multiplies the matrices of a linear layer fastest, from their shapes alone.

It has two libraries. YNNPACK takes a product whose left operand is contracted along its last axis; it copies the right
operand into blocks, which pays if the left one has many rows. Eigen takes the others, needs fewer rows, loses half its
rate where rows of the result lie a power of two apart, as with most vocabularies, and converts bf16 operands to float32
first, so that no matrix unit of the processor is used.

The rates behind the rules are in benchmarks/README.md. Where a mesh may split the operands nothing is turned: XLA would
have to find a sharding for what is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._engine.devices import target_on
from jaxent._mesh.types import mesh_of

FEW_ROWS = 64  # up to which Eigen is the faster for logits; at 128 it is slower
KERNEL_ROWS = 4  # times as many features as rows, from which the kernel belongs on the left of `dz @ kernel.T`
# From which float32 hidden states are turned for the gradient of the kernel; with few rows Eigen is the faster.
FEATURES_TURNED, CLASSES_TURNED = 128, 2048


def turns_for_logits(hidden: jax.Array, kernel: jax.Array) -> bool:
    """Whether `hidden @ kernel` is faster as a product with `turned(hidden)`, contracted along its first axis."""
    return _known(hidden, kernel) and hidden.dtype == np.float32 and 1 < hidden.shape[0] <= FEW_ROWS


def has_kernel_first(dz: jax.Array, kernel: jax.Array) -> bool:
    """Whether `dz @ kernel.T` is faster as `turned(kernel @ dz.T)`: the smaller operand is the one to copy."""
    return _known(dz, kernel) and KERNEL_ROWS * dz.shape[0] <= kernel.shape[0]


def turns_for_kernel(hidden: jax.Array, dz: jax.Array) -> bool:
    """Whether `hidden.T @ dz` is faster with `turned(hidden)` on the left."""
    rows, features = hidden.shape
    if not _known(hidden, dz) or rows == 1:
        return False
    large = rows > FEW_ROWS and features >= FEATURES_TURNED and dz.shape[1] >= CLASSES_TURNED
    return hidden.dtype == jnp.bfloat16 or large


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
    mesh = mesh_of(a, b)
    return fixed and measured and mesh.empty and target_on(mesh).on_cpu
