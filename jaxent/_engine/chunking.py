"""How many rows of logits at a time, from the shapes alone, and how a loop goes over the rows that count."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._arguments import arrays
from jaxent._engine.devices import Target
from jaxent._engine.roofline import ROWS_ALIGNED, chunk_rows_for
from jaxent._errors import ArgumentValueError
from jaxent._mesh.types import pcast_like

# Logits held at a time, in elements. Devices in the table of `devices.py` get what `chunk_rows_for` says; one that is
# not gets a budget (heuristic: 1 GiB of float32), since it needs thousands of rows to fill its matrix units. On a CPU
# twice as many rows as features are the fastest, since each chunk also adds a gradient as large as the kernel to the
# sum so far; less than 16 MiB does not pay, and beyond 256 MiB memory matters more than the last percents. Measured on
# 2 cores, float32: D=64 V=32768 at 128 rows 0.60 of dense optax, at 1024 rows 0.78; D=512 V=32768 at 1024 rows 0.90, at
# 256 1.06; D=256 V=128256 at 512 rows 0.91, at 128 1.04.
ACCELERATOR_LOGITS = 2**28
CPU_LOGITS = (2**22, 2**26)
CPU_ROWS_PER_FEATURE = 2
# What is left over after the full chunks is taken in parts of a chunk, unless that many parts cost as much as a chunk.
# Heuristic, as is the least size of a part: smaller ones spend their time on adding up the gradient of the kernel.
PARTS, PARTS_WORTH_IT, LEAST_PART = 8, 5, 32

Pytree = Any
# `carry, out = step(carry, rows, valid)`: one chunk's rows, and which of them count (None: all). `out` has the rows
# first. Rows that do not count hold zeros or copies of other rows, and must add nothing to the carry.
Step = Callable[[Pytree, Pytree, jax.Array | None], tuple[Pytree, Pytree]]


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How `rows` are cut: `chunks` of `chunk_rows`.

    Where XLA may have split rows over devices (`strided`), chunk `i` holds the rows `i, i + chunks, i + 2 chunks, ...`,
    so that they stay where they are: every device has its share of every chunk. Contiguous chunks would put the sharded
    dimension on the scan, and all activations would be gathered. With `groups` each of that many equal runs of rows,
    one or more to a device, is cut and filled up by itself.

    Elsewhere chunks hold runs of rows, of those that count if only some do: these come first, and a loop ends with
    them.
    """

    rows: int
    chunk_rows: int
    groups: int = 1
    strided: bool = True
    first_apart: bool = False
    """Whether the first chunk stands before the loop that has no reverse mode: it writes sums, where the others add to
    them, at the price of a longer program.
    """

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows) if self.chunk_rows else 1

    @property
    def padding(self) -> int:
        return self.chunks * self.chunk_rows - self.rows

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """How many rows a step may get."""
        part = self._part()
        return (self.chunk_rows,) if part is None else (self.chunk_rows, part)

    def scan(
        self,
        step: Step,
        carry: Pytree,
        per_row: Pytree,
        moving: Pytree,
        kept: jax.Array | None,
        *,
        again: bool = False,
        differentiable: bool = True,
    ) -> tuple[Any, Any]:
        """The carry after all chunks and the results of all rows, differentiable in either mode.

        `kept` says which rows count; the others get 0 in floating and -1 in integer results. A derivative is taken with
        respect to the leaves of `per_row` at which `moving` is True: theirs are written a chunk at a time. Without
        `differentiable` none is. With `again` nothing is kept for the way back: a chunk is computed again.
        """
        if again:
            step = jax.checkpoint(step, prevent_cse=False)
        if self.chunks == 1:
            return _masked_step(step, carry, per_row, kept)
        if self.strided:
            return self._strided_scan(step, carry, per_row, kept, again=again, differentiable=differentiable)
        order = None if kept is None else _Order.of(kept)
        free, fixed = partition(per_row, moving)
        free = jax.tree.map(lambda x: self._in_chunks(x, order), free)

        def body(carry: Pytree, xs: Any) -> tuple[Pytree, Pytree]:
            chunk, free = xs
            start = chunk * self.chunk_rows
            others, valid = self._window(fixed, order, start, self.chunk_rows)
            rows = merge(free, others)
            if order is not None:
                return _choose(start < order.kept, step, carry, rows, valid)
            return (with_rules(chunk, step) if differentiable else step)(carry, rows, valid)

        if again:  # else the choice would keep the chunk, whatever the step does
            body = jax.checkpoint(body, prevent_cse=False)
        carry, out = lax.scan(body, carry, (jnp.arange(self.chunks, dtype=jnp.int32), free))
        return carry, jax.tree.map(lambda x: self._restored(x.reshape(-1, *x.shape[2:]), order), out)

    def loop(self, step: Step, carry: Pytree, per_row: Pytree, kept: jax.Array | None) -> tuple[Any, Any]:
        """The same over as many chunks as the rows that count fill, without a reverse mode.

        A scan would have to choose between a chunk and nothing, and on NVIDIA's compiler the result of that choice is a
        copy of the carry in every chunk.
        """
        if kept is None or self.strided or self.chunks == 1:
            return self.scan(step, carry, per_row, jax.tree.map(lambda _: False, per_row), kept, differentiable=False)
        order = _Order.of(kept)
        part = self._part()
        spare = 0 if part is None else PARTS_WORTH_IT * part
        full = (order.kept + (self.chunk_rows - 1 - spare)) // self.chunk_rows

        def taken(state: Pytree, start: jax.Array | int, size: int) -> Pytree:
            carry, buffers = state
            rows, valid = self._window(per_row, order, start, size)
            carry, out = step(carry, rows, valid)
            out = _filled(out, valid)
            return carry, jax.tree.map(lambda b, x: lax.dynamic_update_slice_in_dim(b, x, start, 0), buffers, out)

        def run(state: Pytree, first: jax.Array | int, size: int, count: jax.Array) -> Pytree:
            def body(state: Pytree) -> Pytree:
                i, *rest = state
                return i + 1, *taken(tuple(rest), first + i * size, size)

            zero = pcast_like(jnp.zeros((), jnp.int32), [count])
            return lax.while_loop(lambda state: state[0] < count, body, (zero, *state))[1:]

        rows, valid = self._window(per_row, order, 0, self.chunk_rows)
        shapes = jax.eval_shape(lambda *a: _filled(step(*a)[1], valid), carry, rows, valid)
        state = carry, _fill(shapes, self.chunks * self.chunk_rows)
        apart = int(self.first_apart and bool(jax.tree.leaves(carry)))
        if apart:
            state = lax.cond(full > 0, lambda: taken(state, 0, self.chunk_rows), lambda: state)
        state = run(state, apart * self.chunk_rows, self.chunk_rows, full - apart)
        if part is not None:
            done = full * self.chunk_rows
            state = run(state, done, part, -(-jnp.maximum(order.kept - done, 0) // part))
        carry, buffers = state
        return carry, jax.tree.map(lambda x: self._restored(x, order), buffers)

    def _part(self) -> int | None:
        """The rows of a part of a chunk, where the last chunk that is filled matters."""
        part = -(-self.chunk_rows // PARTS)
        few = isinstance(self.chunks, int) and self.chunks <= PARTS
        return part if few and part >= LEAST_PART else None

    def _window(
        self, x: Pytree, order: "_Order | None", start: jax.Array | int, size: int
    ) -> tuple[Pytree, jax.Array | None]:
        """The rows that stand at `start` and the `size - 1` places after it, and which of them count."""
        if order is None and _is_zero(self.padding):
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, 0), x), None
        index, valid = self._rows_at(start + jnp.arange(size, dtype=jnp.int32), order)
        return jax.tree.map(lambda x: _rows(x, index), x), valid

    def _rows_at(self, place: jax.Array, order: "_Order | None") -> tuple[jax.Array, jax.Array]:
        """Which rows stand at some places, and whether they count; where not, a row that does is there instead."""
        last = jnp.asarray(self.rows - 1, jnp.int32)
        if order is None:
            return jnp.minimum(place, last), place <= last
        valid = place < order.kept
        return jnp.where(valid, _rows(order.rows, jnp.minimum(place, last)), order.rows[0]), valid

    def _in_chunks(self, x: jax.Array, order: "_Order | None") -> jax.Array:
        """`(rows, ...)` to `(chunks, chunk_rows, ...)`."""
        if order is not None or not _is_zero(self.padding):
            index, _ = self._rows_at(jnp.arange(self.chunks * self.chunk_rows, dtype=jnp.int32), order)
            x = _rows(x, index)
        return x.reshape(self.chunks, self.chunk_rows, *x.shape[1:])

    def _restored(self, x: jax.Array, order: "_Order | None") -> jax.Array:
        """Results in the order in which rows were taken, in the order of the rows."""
        if order is not None:
            return _rows(x, order.places)
        return x if _is_zero(self.padding) else x[: self.rows]

    # ------------------------------------------------------------------------------------------------------------------
    # Where XLA may have split the rows

    def _strided_scan(
        self,
        step: Step,
        carry: Pytree,
        per_row: Pytree,
        kept: jax.Array | None,
        *,
        again: bool,
        differentiable: bool,
    ) -> tuple[Any, Any]:
        cut = jax.tree.map(self._cut, (per_row, kept))

        def body(carry: Pytree, chunk: jax.Array) -> tuple[Pytree, Pytree]:
            rows, valid = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, chunk, 1, keepdims=False), cut)
            if not _is_zero(self.padding):
                place = jnp.arange(self.chunk_rows, dtype=jnp.int32) % (self.chunk_rows // self.groups)
                own = place * self.chunks + chunk < self.rows // self.groups
                valid = own if valid is None else valid & own
            masked = functools.partial(_masked_step, step)
            return (with_rules(chunk, masked) if differentiable else masked)(carry, rows, valid)

        if again:
            body = jax.checkpoint(body, prevent_cse=False)
        carry, out = lax.scan(body, carry, jnp.arange(self.chunks, dtype=jnp.int32))
        return carry, jax.tree.map(self._joined, out)

    def _cut(self, x: jax.Array) -> jax.Array:
        """`(rows, ...)` to `(chunk_rows, chunks, ...)`; a group's last row fills it up."""
        shape = x.shape[1:]
        if not _is_zero(self.padding):
            x = x.reshape(self.groups, -1, *shape)
            last = jnp.broadcast_to(x[:, -1:], (self.groups, self.padding // self.groups, *shape))
            x = jnp.concatenate([x, last], axis=1)
        return x.reshape(self.chunk_rows, self.chunks, *shape)

    def _joined(self, x: jax.Array) -> jax.Array:
        """The chunks' results `(chunks, chunk_rows, ...)`, back in the order of the rows."""
        x = jnp.moveaxis(x, 0, 1)
        if not _is_zero(self.padding):
            x = x.reshape(self.groups, -1, *x.shape[2:])[:, : self.rows // self.groups]
        return x.reshape(self.rows, *x.shape[2:])


def partition(tree: Pytree, mask: Pytree) -> tuple[Pytree, Pytree]:
    """The leaves where the mask holds, and the others, each with None in the other's places."""
    chosen = jax.tree.map(lambda x, keep: x if keep else None, tree, mask)
    return chosen, jax.tree.map(lambda x, keep: None if keep else x, tree, mask)


def merge(a: Pytree, b: Pytree) -> Pytree:
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda x: x is None)


class _Order(NamedTuple):
    """The rows that count, and after them the others."""

    rows: jax.Array  # in the order in which they are taken
    places: jax.Array  # of the rows in that order
    kept: jax.Array  # how many count

    @classmethod
    def of(cls, kept: jax.Array) -> "_Order":
        number = jnp.arange(kept.shape[0], dtype=jnp.int32)
        _, rows = lax.sort(((~kept).astype(jnp.int32), pcast_like(number, [kept])), num_keys=1, is_stable=True)
        _, places = lax.sort((rows, pcast_like(number, [kept])), num_keys=1)
        return cls(rows, places, jnp.sum(kept, dtype=jnp.int32))


def _is_zero(n: Any) -> bool:
    """Whether a size is 0 for certain: it may be a symbol of `jax.export`."""
    return isinstance(n, int) and n == 0


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _masked_step(step: Step, carry: Pytree, rows: Pytree, valid: jax.Array | None) -> tuple[Pytree, Pytree]:
    """A step whose rows stay where they are: those that do not count hold zeros."""
    if valid is not None:
        rows = jax.tree.map(lambda x: _where(valid, x, 0), rows)
    carry, out = step(carry, rows, valid)
    return carry, _filled(out, valid)


def _choose(
    chosen: jax.Array, step: Step, carry: Pytree, rows: Pytree, valid: jax.Array | None
) -> tuple[Pytree, Pytree]:
    """A step, or the carry as it is and the results of rows that do not count."""

    def full(carry: Pytree, rows: Pytree, valid: jax.Array | None) -> tuple[Pytree, Pytree]:
        carry, out = step(carry, rows, valid)
        return carry, _filled(out, valid)

    def empty(carry: Pytree, rows: Pytree, valid: jax.Array | None) -> tuple[Pytree, Pytree]:
        return carry, _fill(jax.eval_shape(full, carry, rows, valid)[1])

    return lax.cond(chosen, full, empty, carry, rows, valid)


def with_rules(index: jax.Array, f: Callable[..., Pytree]) -> Callable[..., Pytree]:
    """What a scan does at an index, a function that keeps its derivative rules.

    Before 0.12 JAX drops those of a scan's body when it differentiates the scan, but not those in a choice. XLA makes
    this one when it compiles.
    """

    def kept(*args: Pytree) -> Pytree:
        return lax.cond((index >= 0) | True, f, lambda *args: _fill(jax.eval_shape(f, *args)), *args)

    return kept


def _where(valid: jax.Array, x: jax.Array, other: int) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys, any of which will do
        return x
    return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.asarray(other, x.dtype))


def _nothing(dtype: Any) -> int:
    return -1 if jnp.issubdtype(dtype, jnp.signedinteger) else 0


def _filled(out: Pytree, valid: jax.Array | None) -> Pytree:
    """The results, with those of rows that do not count as 0, or -1 where they are integers."""
    return out if valid is None else jax.tree.map(lambda x: _where(valid, x, _nothing(x.dtype)), out)


def _fill(shapes: Pytree, rows: int | None = None) -> Pytree:
    """Results of rows that do not count, typed like others."""

    def constant(like: Any) -> jax.Array:
        shape = like.shape if rows is None else (rows, *like.shape[1:])
        return pcast_like(jnp.full(shape, _nothing(like.dtype), like.dtype), [like])

    return jax.tree.map(constant, shapes)


# ----------------------------------------------------------------------------------------------------------------------
# How many rows


class DefaultRows(NamedTuple):
    """Rows whose logits one device holds at a time unless the caller says, what their number is a multiple of, whether
    the first chunk stands apart (see `Chunking`), and how many rows are worth more than doing without padding.
    """

    rows: int
    aligned: int = 1
    first_apart: bool = False
    fewest: int = 0


def default_chunk_rows(target: Target, features: int, num_classes: int, dtype: Any) -> DefaultRows:
    if target.device is not None:
        rows, fewest = chunk_rows_for(target.device, features, num_classes, dtype)
        # A TPU's compiler writes the gradient of the logits where it computes that of a lone chunk.
        return DefaultRows(rows, ROWS_ALIGNED, not target.device.is_tpu, fewest)
    if not target.on_cpu:
        return DefaultRows(max(1, ACCELERATOR_LOGITS // num_classes))
    least, most = (n // num_classes for n in CPU_LOGITS)
    return DefaultRows(max(1, min(max(CPU_ROWS_PER_FEATURE * features, least), most)))


def chunking_of(
    rows: int, chunk_rows: int | None, default: DefaultRows, devices: int = 1, strided: bool = False
) -> Chunking:
    """The caller's `chunk_rows`, or the default of one device, in chunks of equal size.

    `devices` is over how many devices XLA may have split rows and classes. The default is each one's, and where it
    could have split the rows evenly each has its share of every chunk, which is then no smaller than that.
    """
    aligned, fewest = 1, 0
    if chunk_rows is None:
        chunk_rows, aligned, fewest = devices * default.rows, default.aligned, default.fewest
    else:
        chunk_rows = arrays.as_int("chunk_rows", chunk_rows, "be an int or None")
        if chunk_rows < 1:
            raise ArgumentValueError(f"`chunk_rows` must be at least 1, got {chunk_rows}")
    if not isinstance(rows, int):  # a symbol of `jax.export`
        return Chunking(rows, chunk_rows, 1, strided, default.first_apart)
    if rows == 0:
        return Chunking(0, 0)
    groups = math.gcd(rows, devices)
    rows_each = rows // groups
    least = -(-rows_each // max(1, chunk_rows // groups))
    # A few chunks more avoid padding, and with it a copy of all rows.
    some = range(least, least + least // 4 + 1)
    even = (chunks for chunks in some if rows_each % chunks == 0 and rows_each // chunks >= fewest)
    own = -(-rows_each // next(even, least))
    own = min(rows_each, aligned * -(-own // aligned))
    return Chunking(rows, groups * own, groups, strided, default.first_apart)
