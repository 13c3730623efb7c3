"""How many rows of logits at a time, from the shapes alone, and how rows are cut into such chunks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._arguments import arrays

# Logits held at a time, in elements. An accelerator needs thousands of rows to fill its matrix units (heuristic: 1 GiB
# of float32). On a CPU twice as many rows as features are the fastest, since each chunk also adds a gradient as large
# as the kernel to the sum so far; less than 16 MiB does not pay, and beyond 256 MiB memory matters more than the last
# percents. Measured on 2 cores, float32: D=64 V=32768 at 128 rows 0.60 of dense optax, at 1024 rows 0.78; D=512 V=32768
# at 1024 rows 0.90, at 256 1.06; D=256 V=128256 at 512 rows 0.91, at 128 1.04.
ACCELERATOR_LOGITS = 2**28
CPU_LOGITS = (2**22, 2**26)
CPU_ROWS_PER_FEATURE = 2


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How `rows` are cut: `chunks` of `chunk_rows`, where chunk `i` holds the rows `i, i + chunks, i + 2 chunks, ...`.

    The stride keeps rows that are sharded over devices where they are: every device has its share of every chunk. Rows
    in contiguous chunks would put the sharded dimension on the scan, and all activations would be gathered. With
    `groups` each of that many equal runs of rows, one or more to a device, is cut and filled up by itself.
    """

    rows: int
    chunk_rows: int
    groups: int = 1

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows) if self.rows else 1

    @property
    def padding(self) -> int:
        return self.chunks * self.chunk_rows - self.rows

    def cut(self, x: jax.Array) -> jax.Array:
        """`(rows, ...)` to `(chunk_rows, chunks, ...)`; a group's last row fills it up: a zero row may have no loss."""
        shape = x.shape[1:]
        if self.padding:
            x = x.reshape(self.groups, -1, *shape)
            last = jnp.broadcast_to(x[:, -1:], (self.groups, self.padding // self.groups, *shape))
            x = jnp.concatenate([x, last], axis=1)
        return x.reshape(self.chunk_rows, self.chunks, *shape)

    def valid_rows(self, chunk: jax.Array) -> jax.Array | None:
        """Which rows of a chunk are not padding."""
        if not self.padding:
            return None
        place = jnp.arange(self.chunk_rows, dtype=jnp.int32) % (self.chunk_rows // self.groups)
        return place * self.chunks + chunk < self.rows // self.groups

    def join(self, x: jax.Array) -> jax.Array:
        """The chunks' results `(chunks, chunk_rows, ...)`, back in the order of the rows."""
        x = jnp.moveaxis(x, 0, 1)
        if self.padding:
            x = x.reshape(self.groups, -1, *x.shape[2:])[:, : self.rows // self.groups]
        return x.reshape(self.rows, *x.shape[2:])

    def scan(self, step: Callable, carry: Any, per_row: Any) -> tuple[Any, Any]:
        """`carry, out = step(carry, chunk, rows)` over the chunks; a single chunk needs no loop."""
        if self.chunks == 1:
            carry, out = step(carry, jnp.zeros((), jnp.int32), per_row)
            return carry, jax.tree.map(lambda x: x[None], out)
        cut = jax.tree.map(self.cut, per_row)

        def body(carry: Any, chunk: jax.Array) -> tuple[Any, Any]:
            rows = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, chunk, 1, keepdims=False), cut)
            return step(carry, chunk, rows)

        return lax.scan(body, carry, jnp.arange(self.chunks, dtype=jnp.int32))


def _default_chunk_rows(features: int, num_classes: int) -> int:
    if jax.default_backend() != "cpu":
        return ACCELERATOR_LOGITS // num_classes
    least, most = (n // num_classes for n in CPU_LOGITS)
    return min(max(CPU_ROWS_PER_FEATURE * features, least), most)


def chunking_of(
    function: str, rows: int, features: int, num_classes: int, chunk_rows: int | None, devices: int = 1
) -> Chunking:
    """The caller's `chunk_rows`, or the rows whose logits fit the budget, in chunks of equal size.

    `devices` is over how many devices XLA may have split rows and classes. The budget is each one's, and where it could
    have split the rows evenly each has its share of every chunk, which is then no smaller than that.
    """
    if chunk_rows is None:
        chunk_rows = max(1, devices * _default_chunk_rows(features, num_classes))
    elif isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise arrays.dtype_error(function, "chunk_rows", "be an int or None", chunk_rows)
    elif chunk_rows < 1:
        raise ValueError(f"jaxent.{function}: `chunk_rows` must be at least 1, got {chunk_rows}")
    if rows == 0:
        return Chunking(0, 0)
    groups = math.gcd(rows, devices)
    rows_each = rows // groups
    least = -(-rows_each // max(1, chunk_rows // groups))
    # A few chunks more avoid padding, and with it a copy of all rows.
    even = (chunks for chunks in range(least, least + least // 4 + 1) if rows_each % chunks == 0)
    return Chunking(rows, groups * -(-rows_each // next(even, least)), groups)
