"""What differs between automatic, explicit and manual meshes: the class axis, whole or split, and types of values."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class ClassAxis:
    """Reductions and look-ups along the classes; every result keeps the axis, with length 1.

    `axis` is negative. With `mesh_axis` the array holds one device's share of the classes, inside `jax.shard_map`, and
    a reduction goes on over that mesh axis, so that only one number a row crosses it. Labels always count all classes.
    """

    axis: int = -1
    mesh_axis: str | None = None

    def size(self, x: jax.Array | jax.ShapeDtypeStruct) -> int:
        """How many classes there are, over all shards."""
        shards = 1 if self.mesh_axis is None else lax.axis_size(self.mesh_axis)
        return x.shape[self.axis] * shards

    def first(self, x: jax.Array) -> jax.Array | int:
        """The first class that `x` holds."""
        return 0 if self.mesh_axis is None else lax.axis_index(self.mesh_axis) * x.shape[self.axis]

    def index(self, x: jax.Array, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.Array:
        """The classes that `x` holds, counted from its own first one, shaped to broadcast against `x`."""
        shape = [1] * x.ndim
        shape[self.axis] = x.shape[self.axis]
        return jnp.arange(x.shape[self.axis], dtype=dtype).reshape(shape)

    def is_class(self, labels: jax.Array, x: jax.Array) -> jax.Array:
        """Where `x` holds the row's label; false all along the row for a label outside the classes."""
        return self.index(x) == labels - self.first(x)

    def max(self, x: jax.Array) -> jax.Array:
        """The row maximum, as a constant: `pmax` has no derivative, and the losses need none."""
        largest = lax.stop_gradient(jnp.max(lax.stop_gradient(x), axis=self.axis, keepdims=True))
        return largest if self.mesh_axis is None else lax.pmax(largest, self.mesh_axis)

    def sum(self, x: jax.Array) -> jax.Array:
        # With 64-bit types on, a sum of int32 would become int64.
        return self.across(jnp.sum(x, axis=self.axis, keepdims=True, dtype=x.dtype))

    def across(self, partial_sum: jax.Array) -> jax.Array:
        """One device's sums, summed over the shards."""
        return partial_sum if self.mesh_axis is None else lax.psum(partial_sum, self.mesh_axis)

    def min_index(self, mask: jax.Array) -> jax.Array:
        """The first class where `mask` holds, over all shards; the number of classes where it holds nowhere."""
        count = self.size(mask)
        index = self.index(mask) + self.first(mask)
        lowest = jnp.min(jnp.where(mask, index, count), axis=self.axis, keepdims=True)
        return lowest if self.mesh_axis is None else lax.pmin(lowest, self.mesh_axis)

    def take(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """`x` at the row's label; 0 for a label outside the classes."""
        if not jax.typeof(x).sharding.mesh.empty:
            # A gather over a sharded class axis raises on an explicit mesh; the comparison shards like any sum.
            return self.across(jnp.sum(jnp.where(self.is_class(labels, x), x, 0), axis=self.axis, keepdims=True))
        local, count = labels - self.first(x), x.shape[self.axis]
        taken = jnp.take_along_axis(x, jnp.clip(local, 0, count - 1), axis=self.axis, mode="promise_in_bounds")
        return jnp.where((local >= 0) & (local < count), taken, 0)

    def top(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The `k` largest entries of each row and their classes, on a new last axis in place of the class axis."""
        x = jnp.moveaxis(x, self.axis, -1)
        values, index = lax.top_k(x, min(k, x.shape[-1]))
        if self.mesh_axis is None:
            return values, index
        first = lax.axis_index(self.mesh_axis) * x.shape[-1]
        values, index = (lax.all_gather(a, self.mesh_axis, axis=-1, tiled=True) for a in (values, index + first))
        values, best = lax.top_k(values, k)
        return values, jnp.take_along_axis(index, best, axis=-1)

    def look_up(self, table: jax.Array, labels: jax.Array) -> jax.Array:
        """The entry of a table with one number a class (this shard's classes) at each label; 0 outside the classes."""
        count = table.shape[0]
        local = labels - (0 if self.mesh_axis is None else lax.axis_index(self.mesh_axis) * count)
        found = table.at[jnp.clip(local, 0, count - 1)].get(mode="promise_in_bounds")
        return self.across(jnp.where((local >= 0) & (local < count), found, 0))


def _varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes along which the value differs between devices."""
    return jax.typeof(x).manual_axis_type.varying


def like_varying(x: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
    """`x`, typed inside `shard_map` as differing between devices along every axis that any of `others` differs along.

    A scan's carry must have its final type from the start, and a constant that is made varying before a scan is summed
    over the devices once, after it, on the way back, not once a step.
    """
    axes = frozenset[str]().union(*map(_varying, others)) - _varying(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def sum_to_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, summed over the mesh axes along which it differs between devices and `like` does not."""
    axes = _varying(x) - _varying(like)
    return lax.psum(x, tuple(sorted(axes))) if axes else x


def check_vocab_axis(function: str, vocab_axis: str | None) -> None:
    """An unknown mesh axis is named here, before a collective fails in words about axis environments."""
    if vocab_axis is None:
        return
    if not isinstance(vocab_axis, str):
        raise TypeError(f"jaxent.{function}: `vocab_axis` must be the name of a mesh axis, got {vocab_axis!r}")
    try:
        lax.axis_size(vocab_axis)
    except NameError as error:
        raise ValueError(
            f"jaxent.{function}: `vocab_axis` must name a mesh axis of the surrounding jax.shard_map, got "
            f"{vocab_axis!r}; outside shard_map leave it out: automatic and explicit sharding do not need it"
        ) from error
