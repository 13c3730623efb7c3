"""What a linear loss will cost: decided before anything runs, from the shapes alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.reduction import Reduction, check_reduction
from jaxent._engine.chunking import chunking_of, default_chunk_rows
from jaxent._engine.devices import target_of
from jaxent._errors import ArgumentValueError, public
from jaxent._typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one value and gradient of a linear loss costs; bytes estimate XLA's temporaries."""

    chunk_rows: int
    """Rows at a time."""
    num_chunks: int
    """How many times."""
    matrix_products: int
    """Matrix products of N x D x V multiply-adds: 3, or 4 for per-row losses, whose logits are computed twice."""
    multiply_adds: int
    """Of all products."""
    chunk_bytes: int
    """The logits of one chunk, and their gradient in the kernel's dtype where that is another one."""
    temp_bytes: int
    """The chunk, its share of the kernel's gradient, and the rows with their gradient."""
    dense_logits_bytes: int
    """What dense code holds instead: the logits of all rows."""

    def __str__(self) -> str:
        mib = 2**20
        return (
            f"{self.num_chunks} chunks of {self.chunk_rows} rows, {self.matrix_products} matrix products, "
            f"about {self.temp_bytes / mib:.0f} MiB of temporaries where the logits take "
            f"{self.dense_logits_bytes / mib:.0f} MiB"
        )


@public
def plan(
    num_rows: int,
    features: int,
    num_classes: int,
    *,
    dtype: DTypeLike = jnp.float32,
    chunk_rows: int | None = None,
    reduction: Reduction = "mean",
) -> Plan:
    r"""What `linear_softmax_cross_entropy` will allocate and compute, in bytes and multiply-adds, before it runs.

    $$\lceil N / R \rceil \text{ chunks}, \qquad 3\,N D V \text{ multiply-adds, or } 4\,N D V \text{ by rows}$$

    **Arguments:** `num_rows`, `features` and `num_classes`: N, D and V of `hidden (N, D)` and `kernel (D, V)`.
    `dtype`: theirs. `chunk_rows` (R) and `reduction`: of the call; `"none"` gives losses by rows.

    **Returns:** a `Plan`.

    **Raises:** `TypeError` for a wrong type, `ValueError` for a wrong option and for sizes that are not positive
    (`num_rows` may be 0).

    >>> print(plan(8192, 4096, 128256, chunk_rows=1024))
    8 chunks of 1024 rows, 3 matrix products, about 2761 MiB of temporaries where the logits take 4008 MiB
    """
    num_rows, features, num_classes = (
        _size(argument, size, least)
        for argument, size, least in (
            ("num_rows", num_rows, 0),
            ("features", features, 1),
            ("num_classes", num_classes, 1),
        )
    )
    check_reduction(reduction, None)
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError as error:
        raise arrays.dtype_error("dtype", "be a dtype, such as jnp.bfloat16 or 'bfloat16'", dtype) from error
    if not is_floating:
        raise arrays.dtype_error("dtype", "be floating", np.dtype(dtype).name)
    default = default_chunk_rows(target_of(), features, num_classes, dtype)
    chunking = chunking_of(num_rows, chunk_rows, default)
    narrow = np.dtype(dtype).itemsize
    wide = max(4, narrow)
    copies = wide + (narrow if narrow < wide else 0)
    chunk_bytes = chunking.chunk_rows * num_classes * copies
    kernel_bytes = features * num_classes * wide
    sums = (chunking.chunks > 1) + (narrow < wide)  # a chunk's share of the kernel's gradient; its float32 sum
    products = 4 if reduction == "none" else 3
    return Plan(
        chunk_rows=chunking.chunk_rows,
        num_chunks=chunking.chunks,
        matrix_products=products,
        multiply_adds=products * num_rows * features * num_classes,
        chunk_bytes=chunk_bytes,
        temp_bytes=chunk_bytes + sums * kernel_bytes + 2 * num_rows * features * wide,
        dense_logits_bytes=num_rows * num_classes * wide,
    )


def _size(argument: str, size: int, least: int) -> int:
    size = arrays.as_int(argument, size)
    if size < least:
        raise ArgumentValueError(f"`{argument}` must be at least {least}, got {size}")
    return size
