"""What differs between automatic, explicit and manual meshes: the class axis, whole or split, and types of values.

Inside `jax.shard_map` everything is a device's own part, and the functions say what crosses the mesh. On an automatic
mesh arrays look whole, and XLA decides what crosses it. On an explicit mesh the type of an array says how it is split:
the rows are then taken apart by a `shard_map` of our own, so that sums over rows cross the mesh once, after the scan,
and the classes are left to XLA, so that a row function may look at them as a whole.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class ClassAxis:
    """Reductions and look-ups along the classes; every result keeps the axis, with length 1.

    `axis` is negative. With `mesh_axis` the array holds one device's share of the classes, inside `jax.shard_map`, and
    a reduction goes on over that mesh axis, so that only one number a row crosses it. Labels always count all classes.
    """

    axis: int = -1
    mesh_axis: str | tuple[str, ...] | None = None

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

    def zeros(self, x: jax.Array) -> jax.Array:
        """An int32 zero for each row of `x`, the same on all devices that share the row."""
        shape = list(x.shape)
        shape[self.axis] = 1
        own = self.mesh_axis if isinstance(self.mesh_axis, tuple) else (self.mesh_axis or "",)
        return like_varying(jnp.zeros(shape, jnp.int32), [x], except_for=own)

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
        taken, local = (jnp.squeeze(x, self.axis) for x in (taken, local))  # faster on a CPU than (rows, 1)
        return jnp.expand_dims(jnp.where((local >= 0) & (local < count), taken, 0), self.axis)

    def top(self, x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The `k` largest entries of each row and their classes, on a new last axis in place of the class axis."""
        x = jnp.moveaxis(x, self.axis, -1)
        if self.mesh_axis is None:
            return _top(x, k)
        values, index = lax.top_k(x, min(k, x.shape[-1]))
        index += lax.axis_index(self.mesh_axis) * x.shape[-1]
        values, best = lax.top_k(self._beside(values), k)
        return values, jnp.take_along_axis(self._beside(index), best, axis=-1)

    def _beside(self, x: jax.Array) -> jax.Array:
        """The last axes of all shards, one beside the other. An all-gather's result would be typed as varying."""
        shards = lax.axis_size(self.mesh_axis)
        own = jnp.arange(shards, dtype=jnp.int32)[:, None] == lax.axis_index(self.mesh_axis)
        slots = jnp.where(own.reshape(*[1] * (x.ndim - 1), shards, 1), x[..., None, :], 0)
        return lax.psum(slots, self.mesh_axis).reshape(*x.shape[:-1], -1)

    def look_up(self, table: jax.Array, labels: jax.Array) -> jax.Array:
        """The entry of a table with one number a class (this shard's classes) at each label; 0 outside the classes."""
        rows, own = _split(labels), _split(table)[0]
        axis = ClassAxis(mesh_axis=own) if own else self

        def found(table: jax.Array, labels: jax.Array) -> jax.Array:
            count = table.shape[0]
            local = labels - axis.first(table)
            entry = table.at[jnp.clip(local, 0, count - 1)].get(mode="promise_in_bounds")
            return axis.across(jnp.where((local >= 0) & (local < count), entry, 0))

        parts = _on_each(found, own + _names(rows), (P(own), P(*rows)), P(*rows))
        return automatic(parts, table, labels, mesh=_mesh(table, labels), out_specs=P(*rows))


def _top(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` where XLA may have split the last axis, which it would gather for a sort.

    There the maximum is taken `k` times, of which only a number a row crosses the mesh.
    """
    if not may_be_split_by_xla(x):
        return lax.top_k(x, k)
    classes = ClassAxis()
    settled = lax.optimization_barrier(lax.stop_gradient(x))  # compared with its own maximum, not with one rounded anew
    left, values, found = jnp.ones(x.shape, bool), [], []
    for _ in range(k):
        highest = classes.max(jnp.where(left, settled, -jnp.inf))
        index = classes.min_index(left & (settled == highest))
        left &= ~classes.is_class(index, x)
        values.append(classes.take(x, index))
        found.append(index)
    return jnp.concatenate(values, axis=-1), jnp.concatenate(found, axis=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Manual meshes: along which axes a value differs between devices


def varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes along which the value differs between devices."""
    return jax.typeof(x).manual_axis_type.varying


def like_varying(x: jax.Array, others: Sequence[jax.Array], except_for: Collection[str] = ()) -> jax.Array:
    """`x`, typed inside `shard_map` as differing between devices along every axis that any of `others` differs along.


    A scan's carry must have its final type from the start, and a constant that is made varying before a scan is summed
    over the devices once, after it, on the way back, not once a step.
    """
    axes = frozenset[str]().union(*map(varying, others)).difference(varying(x), except_for)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def sum_to_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, summed over the mesh axes along which it differs between devices and `like` does not."""
    axes = varying(x) - varying(like)
    return lax.psum(x, tuple(sorted(axes))) if axes else x


# ----------------------------------------------------------------------------------------------------------------------
# Automatic and explicit meshes


def may_be_split_by_xla(x: jax.Array) -> bool:
    """Whether the array may be split over devices without its type saying how."""
    mesh = _mesh(x)
    # An array that only `jit` knows to be split has no mesh in its type.
    return jax.device_count() > 1 and (mesh.empty or bool(_left_to_xla(mesh)))


def _mesh(*arrays: jax.Array) -> AbstractMesh:
    """The mesh that any of the arrays is typed with; empty if none is."""
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    return next((mesh for mesh in meshes if not mesh.empty), AbstractMesh((), ()))


def _axes(mesh: AbstractMesh, kind: AxisType) -> frozenset[str]:
    return frozenset(name for name, its in zip(mesh.axis_names, mesh.axis_types, strict=True) if its == kind)


def _left_to_xla(mesh: AbstractMesh) -> frozenset[str]:
    """The mesh axes over which XLA splits arrays as it thinks best."""
    return _axes(mesh, AxisType.Auto)


Split = tuple[tuple[str, ...], ...]


def _split(x: jax.Array) -> Split:
    """The explicit mesh axes that each dimension is split over, without those of size 1, which split nothing."""
    mesh, spec = _mesh(x), jax.typeof(x).sharding.spec
    names = (() if s is None else s if isinstance(s, tuple) else (s,) for s in spec)
    return tuple(tuple(a for a in axes if mesh.shape[a] > 1) for axes in names)


def _names(split: Split) -> tuple[str, ...]:
    return tuple(name for names in split for name in names)


def local_shape(x: jax.Array) -> tuple[int, ...]:
    """The shape of one device's part on an explicit mesh; the whole shape on others."""
    mesh = _mesh(x)
    return tuple(n // math.prod(mesh.shape[a] for a in names) for n, names in zip(x.shape, _split(x), strict=True))


def automatic_devices(x: jax.Array) -> int:
    """Over how many devices XLA may have split an array, as far as its type knows."""
    mesh = _mesh(x)
    return math.prod(mesh.shape[name] for name in _left_to_xla(mesh))


def automatic(f: Callable[..., Any], *arrays: Any, mesh: AbstractMesh, out_specs: Any) -> Any:
    """`f(*arrays)` with the explicit axes of the mesh left to XLA; `out_specs` types the result."""
    explicit = _axes(mesh, AxisType.Explicit)
    if not explicit:
        return f(*arrays)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, axes=tuple(sorted(explicit)), out_sharding=out_specs)(*arrays)


def _on_each(f: Callable[..., Any], axes: tuple[str, ...], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` of the parts, on every device of the mesh axes; for use inside `automatic`."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes)) if axes else f


def elementwise(f: Callable[..., Any], x: jax.Array, *others: Any, without: int | None = None) -> Any:
    """`f(x, *others)`, typed like `x`, or like `x` without an axis, after which the result may have more."""
    split = _split(x)
    if without is not None:
        split = split[: x.ndim + without] + split[x.ndim + without + 1 :]
    return automatic(f, x, *others, mesh=_mesh(x, *jax.tree.leaves(others)), out_specs=P(*split))


def over_rows(f: Callable[..., Any], per_row: Any, shared: Any, *, summed: bool) -> Any:
    """`f(per_row, shared)`, on an explicit mesh of every device's own rows.

    The rows are split as the first leaf of `per_row` is. With `summed` the results are sums over rows, else they have
    the rows first.
    """
    first, *_ = jax.tree.leaves(per_row)
    axes = _split(first)[0]
    rows = P(axes)
    result = P() if summed else rows

    def part(per_row: Any, shared: Any) -> Any:
        out = f(per_row, shared)
        return lax.psum(out, axes) if summed and axes else out

    mesh = _mesh(*jax.tree.leaves((per_row, shared)))
    return automatic(_on_each(part, axes, (rows, P()), result), per_row, shared, mesh=mesh, out_specs=result)


class Batch(tuple[int, ...]):
    """The shape of a batch whose axes become one, and how an explicit mesh splits it.

    Each device flattens its own part, so that nothing moves; the rows then come in another order.
    """

    mesh: AbstractMesh
    split: Split
    like: jax.Array

    @classmethod
    def of(cls, x: jax.Array, dims: int) -> "Batch":
        """The first `dims` axes of `x`."""
        batch = cls(x.shape[:dims])
        batch.mesh, batch.split, batch.like = _mesh(x), _split(x)[:dims], x
        return batch

    def flatten(self, x: jax.Array) -> jax.Array:
        """`(*batch, ...)` to `(rows, ...)`, split as the batch is."""
        dims, axes = len(self), _names(self.split)
        if dims == 1:
            return x
        if axes and _mesh(x).empty:
            x = self._on_mesh(x)
        flat = _on_each(lambda x: x.reshape(-1, *x.shape[dims:]), axes, P(*self.split), P(axes))
        return automatic(flat, x, mesh=self.mesh, out_specs=P(axes, *_split(x)[dims:]))

    def _on_mesh(self, x: jax.Array) -> jax.Array:
        """An array of the host, split as the batch is: outside `jit`, `shard_map` takes no other beside split ones."""
        dims = len(self)
        nowhere = jnp.any(jnp.zeros_like(self.like, bool), axis=tuple(range(dims, self.like.ndim)))
        return jnp.where(jnp.expand_dims(nowhere, tuple(range(dims, x.ndim))), x, x)

    def unflatten(self, x: jax.Array) -> jax.Array:
        """`(rows, ...)` to `(*batch, ...)`."""
        axes = _names(self.split)
        if len(self) == 1:
            return x
        shape = [n // math.prod(self.mesh.shape[a] for a in names) for n, names in zip(self, self.split, strict=True)]
        parts = _on_each(lambda x: x.reshape(*shape, *x.shape[1:]), axes, P(axes), P(*self.split))
        return automatic(parts, x, mesh=self.mesh, out_specs=P(*self.split, *_split(x)[1:]))


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check_vocab_axis(function: str, vocab_axis: str | None, rows: Mapping[str, Any] = MappingProxyType({})) -> None:
    """An unknown mesh axis is named here, before a collective fails in words about axis environments.

    `rows` are arguments with rows and no classes, as they came: split over the axis they would have a wrong shape too,
    and without any to compare their shape with, a value would be wrong and no one told.
    """
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
    for name, x in rows.items():
        if isinstance(x, jax.Array) and vocab_axis in varying(x):
            gathered = ", or take its jax.lax.pmean if it was gathered" if name.startswith("hidden") else ""
            raise ValueError(
                f"jaxent.{function}: `{name}` must be the same on all devices of `vocab_axis`, since labels count all "
                f"classes and rows have all of them; got {jax.typeof(x)}, which differs along {vocab_axis!r}: leave "
                f"the axis out of its in_specs{gathered}"
            )


def check_class_axis(
    function: str,
    vocab_axis: str | None,
    split: Mapping[str, tuple[jax.Array, int]],
    whole: Mapping[str, jax.Array | None],
    along: Mapping[str, tuple[jax.Array | None, int]] = MappingProxyType({}),
) -> None:
    """Arrays with classes, `name: (array, class axis)`, are split over `vocab_axis`; those with rows only are not.

    Those of `along` go with the first of `split`.
    """
    check_vocab_axis(function, vocab_axis, whole)
    (first, (like, at)), *_ = split.items()
    for name, (x, axis) in along.items():
        if x is not None and _split(x)[axis] not in ((), _split(like)[at]):
            raise ValueError(
                f"jaxent.{function}: `{name}` must be split over the mesh axes that split the classes of `{first}`, or "
                f"over none, got {jax.typeof(x)} and {jax.typeof(like)}; `jax.sharding.reshard` it"
            )
    present = {name: x for name, x in whole.items() if x is not None}
    for name, (x, axis) in split.items():
        taken = _split(x)[axis]
        for other, y in present.items():
            both = sorted(set(taken) & set(_names(_split(y))))
            if both:
                raise ValueError(
                    f"jaxent.{function}: `{other}` must be whole on every device of the mesh axis that splits the "
                    f"classes of `{name}`, got {jax.typeof(y)} and {jax.typeof(x)}; "
                    f"`jax.sharding.reshard` it so that {both[0]!r} splits only classes"
                )
        if vocab_axis in _axes(_mesh(x), AxisType.Manual) and vocab_axis not in varying(x):
            raise ValueError(
                f"jaxent.{function}: `{name}` must hold each device's own classes along `vocab_axis`, got the same "
                f"classes on all devices of {vocab_axis!r}; name the axis in the in_specs of jax.shard_map, and leave "
                f"its check_vma on"
            )


def check_linear_layer(function: str, hidden: jax.Array, kernel: jax.Array, suffix: str = "") -> None:
    """On an explicit mesh rows and classes are split, each over mesh axes of its own, and features are not."""
    types = f"got {jax.typeof(hidden)} and {jax.typeof(kernel)}"
    features, classes = _split(kernel)
    if features or _split(hidden)[-1]:
        raise ValueError(
            f"jaxent.{function}: `hidden{suffix}` and `kernel{suffix}` must have whole features on every device, "
            f"{types}; `jax.sharding.reshard` the kernel to PartitionSpec(None, classes) first"
        )
    both = sorted(set(_names(_split(hidden))) & set(classes))
    if both:
        raise ValueError(
            f"jaxent.{function}: `hidden{suffix}` and `kernel{suffix}` must be split over different mesh axes, "
            f"{types}; {both[0]!r} cannot split both rows and classes: `jax.sharding.reshard` one of them"
        )


def check_same_split(function: str, arrays: Mapping[str, jax.Array], axis: int) -> None:
    """On an explicit mesh the arrays are split alike along an axis."""
    (first, x), (second, y) = arrays.items()
    if _split(x)[axis] != _split(y)[axis]:
        raise ValueError(
            f"jaxent.{function}: `{first}` and `{second}` must be split over the same mesh axes, got "
            f"{jax.typeof(x)} and {jax.typeof(y)}; `jax.sharding.reshard` one of them"
        )
