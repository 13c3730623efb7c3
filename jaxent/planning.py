"""How many rows of logits at a time: decided before anything runs, from the shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxent import _arrays

# float32 logits held at a time. Heuristics: on a CPU larger chunks no longer pay once the kernel's gradient is added to
# seldom enough; an accelerator needs thousands of rows to fill its matrix units.
LOGITS_BUDGET = {"cpu": 128 * 2**20}
ACCELERATOR_BUDGET = 1024 * 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `rows` are cut: `chunks` of `chunk_rows`, where chunk `i` holds the rows `i, i + chunks, i + 2 chunks, ...`.

    The stride keeps rows that are sharded over devices where they are: every device has its share of every chunk. Rows
    in contiguous chunks would put the sharded dimension on the scan, and all activations would be gathered.
    """

    rows: int
    chunk_rows: int

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows) if self.rows else 1

    @property
    def padding(self) -> int:
        return self.chunks * self.chunk_rows - self.rows

    def cut(self, x: jax.Array) -> jax.Array:
        """`(rows, ...)` to `(chunk_rows, chunks, ...)`; the last row fills up, since a zero row may have no loss."""
        if self.padding:
            x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (self.padding, *x.shape[1:]))])
        return x.reshape(self.chunk_rows, self.chunks, *x.shape[1:])

    def counted(self, chunk: jax.Array) -> jax.Array | None:
        """Which rows of a chunk are not padding."""
        if not self.padding:
            return None
        return jnp.arange(self.chunk_rows) * self.chunks + chunk < self.rows

    def join(self, x: jax.Array) -> jax.Array:
        """The chunks' results `(chunks, chunk_rows, ...)`, back in the order of the rows."""
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(self.chunks * self.chunk_rows, *x.shape[2:])[: self.rows]

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


def layout_for(function: str, rows: int, num_classes: int, chunk_rows: int | None) -> Layout:
    """The caller's `chunk_rows`, or the rows whose logits fit the budget, in chunks of equal size."""
    if chunk_rows is None:
        budget = LOGITS_BUDGET.get(jax.default_backend(), ACCELERATOR_BUDGET)
        chunk_rows = max(1, budget // (4 * num_classes))
    elif isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise _arrays.dtype_error(function, "chunk_rows", "be an int or None", chunk_rows)
    elif chunk_rows < 1:
        raise ValueError(f"jaxent.{function}: `chunk_rows` must be at least 1, got {chunk_rows}")
    if rows == 0:
        return Layout(0, 0)
    least = -(-rows // chunk_rows)
    # A few chunks more avoid padding, and with it a copy of all rows.
    even = (chunks for chunks in range(least, least + least // 4 + 1) if rows % chunks == 0)
    return Layout(rows, -(-rows // next(even, least)))
