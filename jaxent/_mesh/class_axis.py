"""Reductions and look-ups along the classes, whole or split over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxent._mesh.apply import on_each_device, with_auto_axes
from jaxent._mesh.types import axis_names, may_be_split_by_xla, may_gather, mesh_of, partition_of, pcast_like


def row_sum(x: jax.Array, axis: int | tuple[int, ...], keepdims: bool = True) -> jax.Array:
    """The sum along `axis` in the dtype of `x`, kept out of what XLA fuses with the results.

    XLA's CPU back end of jax 0.10.2 reads the wrong operand in `v - sum(z * v)` where `z` is a factor that is broadcast
    over a batch, as it is under `vmap` and so in every Hessian. `reduce_precision` to the dtype's own precision changes
    no bit and ends the fusion; its transpose is itself, so that the sums of reverse mode are kept apart as well.
    """
    # A sum of int32 would become int64 with x64 on.
    return kept_apart(jnp.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype))


def kept_apart(x: jax.Array) -> jax.Array:
    """`x`, as it is, in a computation of its own, and so is what comes back to it in reverse mode."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    bits = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)


VocabAxis = str | tuple[str, ...] | None
"""The mesh axes that split the classes inside `jax.shard_map`."""


def axis_tuple(vocab_axis: VocabAxis) -> tuple[str, ...]:
    return vocab_axis if isinstance(vocab_axis, tuple) else () if vocab_axis is None else (vocab_axis,)


# Labels compared in one pass over the classes. Heuristic: the passes, not the comparisons, take the time.
SPREAD_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class ClassAxis:
    """Reductions and look-ups along the classes; every result keeps the axis, with length 1.

    `axis` is negative. With `mesh_axis` the array holds one device's share of the classes, inside `jax.shard_map`, and
    a reduction continues over that mesh axis, so that one number per row crosses it. Labels always count all classes.
    """

    axis: int = -1
    mesh_axis: VocabAxis = None

    def size(self, x: jax.Array | jax.ShapeDtypeStruct) -> int:
        """How many classes there are, over all shards."""
        shards = 1 if self.mesh_axis is None else lax.axis_size(self.mesh_axis)
        return x.shape[self.axis] * shards

    def offset(self, x: jax.Array) -> jax.Array | int:
        """The first class that `x` holds."""
        return 0 if self.mesh_axis is None else lax.axis_index(self.mesh_axis) * x.shape[self.axis]

    def local_indices(self, x: jax.Array, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.Array:
        """The classes that `x` holds, counted from its own first one, shaped to broadcast against `x`."""
        shape = [1] * x.ndim
        shape[self.axis] = x.shape[self.axis]
        return jnp.arange(x.shape[self.axis], dtype=dtype).reshape(shape)

    def zeros(self, x: jax.Array) -> jax.Array:
        """An int32 zero for each row of `x`, the same on all devices that share the row."""
        shape = list(x.shape)
        shape[self.axis] = 1
        return pcast_like(jnp.zeros(shape, jnp.int32), [x], except_for=axis_tuple(self.mesh_axis))

    def is_class(self, labels: jax.Array, x: jax.Array) -> jax.Array:
        """Where `x` holds the row's label; false all along the row for a label outside the classes."""
        return self.local_indices(x) == labels - self.offset(x)

    def max(self, x: jax.Array) -> jax.Array:
        """The row maximum, as a constant: `pmax` has no derivative, and the losses need none."""
        largest = lax.stop_gradient(jnp.max(lax.stop_gradient(x), axis=self.axis, keepdims=True))
        return largest if self.mesh_axis is None else lax.pmax(largest, self.mesh_axis)

    def sum(self, x: jax.Array) -> jax.Array:
        return self.psum(row_sum(x, self.axis))

    def psum(self, partial_sum: jax.Array) -> jax.Array:
        """One device's sums, summed over the shards."""
        return partial_sum if self.mesh_axis is None else lax.psum(partial_sum, self.mesh_axis)

    def min_index(self, mask: jax.Array) -> jax.Array:
        """The first class where `mask` holds, over all shards; the number of classes where it holds nowhere."""
        count = self.size(mask)
        index = self.local_indices(mask) + self.offset(mask)
        lowest = jnp.min(jnp.where(mask, index, count), axis=self.axis, keepdims=True)
        return lowest if self.mesh_axis is None else lax.pmin(lowest, self.mesh_axis)

    def take(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """`x` at the row's label; 0 for a label outside the classes."""
        if not may_gather(x):
            # A gather over a sharded class axis raises on an explicit mesh; the comparison shards like any sum.
            return self.sum(jnp.where(self.is_class(labels, x), x, 0))
        local, count = labels - self.offset(x), x.shape[self.axis]
        taken, local = (
            jnp.squeeze(x, self.axis) for x in (self._gather(x, local), local)
        )  # faster on a CPU than (rows, 1)
        return jnp.expand_dims(jnp.where((local >= 0) & (local < count), taken, 0), self.axis)

    def _gather(self, x: jax.Array, local: jax.Array) -> jax.Array:
        inside = jnp.clip(local, 0, x.shape[self.axis] - 1)
        return jnp.take_along_axis(x, inside, axis=self.axis, mode="promise_in_bounds")

    def take_each(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """`x` at each of the row's `k` labels, which lie along the class axis; 0 for those outside the classes."""
        if not may_gather(x):
            chosen = jnp.where(self._is_each(labels, x), x[..., None], 0)
            return self.psum(jnp.moveaxis(jnp.sum(chosen, axis=self.axis - 1), -1, self.axis))
        local = labels - self.offset(x)
        inside = (local >= 0) & (local < x.shape[self.axis])
        return jnp.where(inside, self._gather(x, local), 0)

    def spread(self, values: jax.Array, labels: jax.Array, x: jax.Array) -> jax.Array:
        """The `k` values of each row added up at their labels, shaped like `x`.

        By comparison, a few labels in each pass: a scatter over a sharded class axis raises on an explicit mesh, and a
        sum over a new axis of length k is written out, k times as large as `x`.
        """
        count = labels.shape[self.axis]
        if count <= SPREAD_AT_ONCE:
            each = zip(*(jnp.split(y, count, self.axis) for y in (labels, values)), strict=True)
            terms = [jnp.where(self.is_class(label, x), value, 0) for label, value in each]
            return functools.reduce(jnp.add, terms, jnp.zeros_like(x))
        passes = -(-count // SPREAD_AT_ONCE)

        def grouped(y: jax.Array) -> jax.Array:
            """`(passes, *batch, SPREAD_AT_ONCE)`, filled up with class 0 and nothing to add."""
            y = jnp.moveaxis(y, self.axis, -1)
            y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, passes * SPREAD_AT_ONCE - count)])
            return jnp.moveaxis(y.reshape(*y.shape[:-1], passes, SPREAD_AT_ONCE), -2, 0)

        def add(total: jax.Array, group: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            own_values, own_labels = (jnp.moveaxis(y, -1, self.axis) for y in group)
            return total + self.spread(own_values, own_labels, x), None

        nothing = pcast_like(jnp.zeros_like(x), [x, values, labels])
        return lax.scan(add, nothing, (grouped(values), grouped(labels)))[0]

    def _is_each(self, labels: jax.Array, x: jax.Array) -> jax.Array:
        """Where `x` holds each of the row's `k` labels, on a new last axis."""
        local = jnp.moveaxis(labels - self.offset(x), self.axis, -1)
        return self.local_indices(x)[..., None] == jnp.expand_dims(local, self.axis - 1)

    def top(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The `k` largest entries of each row and their classes, on a new last axis in place of the class axis."""
        x = jnp.moveaxis(x, self.axis, -1)
        if self.mesh_axis is None:
            return _top(x, k)
        values, index = lax.top_k(x, min(k, x.shape[-1]))
        index += lax.axis_index(self.mesh_axis) * x.shape[-1]
        values, best = lax.top_k(self.all_gather_replicated(values), k)
        return values, jnp.take_along_axis(self.all_gather_replicated(index), best, axis=-1)

    def all_gather_replicated(self, x: jax.Array) -> jax.Array:
        """The last axes of all shards, side by side. An all-gather's result would be typed as varying."""
        shards = lax.axis_size(self.mesh_axis)
        own = jnp.arange(shards, dtype=jnp.int32)[:, None] == lax.axis_index(self.mesh_axis)
        slots = jnp.where(own.reshape(*[1] * (x.ndim - 1), shards, 1), x[..., None, :], 0)
        return lax.psum(slots, self.mesh_axis).reshape(*x.shape[:-1], -1)

    def lookup(self, table: jax.Array, labels: jax.Array) -> jax.Array:
        """The entry of a table with one number a class (this shard's classes) at each label; 0 outside the classes."""
        rows, own = partition_of(labels), partition_of(table)[0]
        axis = ClassAxis(mesh_axis=own) if own else self

        def found(table: jax.Array, labels: jax.Array) -> jax.Array:
            count = table.shape[0]
            local = labels - axis.offset(table)
            entry = table.at[jnp.clip(local, 0, count - 1)].get(mode="promise_in_bounds")
            return axis.psum(jnp.where((local >= 0) & (local < count), entry, 0))

        parts = on_each_device(found, own + axis_names(rows), (P(own), P(*rows)), P(*rows))
        return with_auto_axes(parts, table, labels, mesh=mesh_of(table, labels), out_specs=P(*rows))


def _top(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` where XLA may have split the last axis, which it would gather for a sort.

    There the maximum is taken `k` times, and only one number per row crosses the mesh each time.
    """
    if not may_be_split_by_xla(x):
        return lax.top_k(x, k)
    classes = ClassAxis()
    # Each entry is compared with the very maximum, not with one that XLA recomputes and rounds differently.
    materialized = lax.optimization_barrier(lax.stop_gradient(x))
    left, values, found = jnp.ones(x.shape, bool), [], []
    for _ in range(k):
        highest = classes.max(jnp.where(left, materialized, -jnp.inf))
        index = classes.min_index(left & (materialized == highest))
        left &= ~classes.is_class(index, x)
        values.append(classes.take(x, index))
        found.append(index)
    return jnp.concatenate(values, axis=-1), jnp.concatenate(found, axis=-1)
