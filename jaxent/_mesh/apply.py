"""Functions run on each device's own rows, on automatic and on explicit meshes.

On an automatic mesh arrays look whole, and XLA decides what crosses it. On an explicit mesh the type of an array says
how it is split: the rows are then split up by a `shard_map` of our own, so that sums over rows cross the mesh once,
after the scan, and the classes are left to XLA, so that a row function may look at them as a whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxent._mesh.types import (
    Partition,
    auto_axis_names,
    automatic_devices,
    axes_of_type,
    axis_names,
    mesh_of,
    partition_of,
)


def with_auto_axes(f: Callable[..., Any], *arrays: Any, mesh: AbstractMesh, out_specs: Any) -> Any:
    """`f(*arrays)` with the explicit axes of the mesh left to XLA; `out_specs` types the result."""
    if mesh.empty:
        return f(*arrays)
    explicit = axes_of_type(mesh, AxisType.Explicit)
    if not explicit:
        return f(*arrays)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, axes=tuple(sorted(explicit)), out_sharding=out_specs)(*arrays)


def on_each_device(f: Callable[..., Any], axes: tuple[str, ...], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` of the parts, on every device of the mesh axes; for use inside `with_auto_axes`."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes)) if axes else f


def map_rows(f: Callable[..., Any], x: jax.Array, *others: Any, without: int | None = None) -> Any:
    """`f(x, *others)`, typed like `x`, or like `x` without an axis, after which the result may have more."""
    split = partition_of(x)
    if without is not None:
        split = split[: x.ndim + without] + split[x.ndim + without + 1 :]
    return with_auto_axes(f, x, *others, mesh=mesh_of(x, *jax.tree.leaves(others)), out_specs=P(*split))


def shard_map_rows(f: Callable[..., Any], per_row: Any, shared: Any, sum_specs: Any = None) -> Any:
    """`f(per_row, shared)`, on an explicit mesh of every device's own rows: sums over rows, and results of each row.

    The rows are split as the first leaf of `per_row` is; `sum_specs` type the sums, if they are not whole. What is
    shared and split over the same mesh axes, as the features of a kernel are in fully sharded data parallelism, is
    gathered once, and its cotangent is reduce-scattered.
    """
    first, *others = jax.tree.leaves((per_row, shared))
    mesh = mesh_of(first, *others)
    axes = partition_of(first)[0]
    out_specs = (P(), P(axes))
    leaves, structure = jax.tree.flatten(shared)
    splits = [partition_of(x) for x in leaves]

    def part(per_row: Any, leaves: list[jax.Array]) -> Any:
        whole = [_gather(x, split, axes) for x, split in zip(leaves, splits, strict=True)]
        sums, rows = f(per_row, jax.tree.unflatten(structure, whole))
        return (lax.psum(sums, axes) if axes else sums), rows

    in_specs = (P(axes), [P(*_among(split, axes)) for split in splits])
    parts = on_each_device(part, axes, in_specs, out_specs)
    return with_auto_axes(parts, per_row, leaves, mesh=mesh, out_specs=(sum_specs or P(), P(axes)))


def _among(split: Partition, axes: Collection[str], *, within: bool = True) -> Partition:
    return tuple(tuple(a for a in names if (a in axes) == within) for names in split)


def _gather(x: jax.Array, split: Partition, axes: tuple[str, ...]) -> jax.Array:
    """The whole of what is split over some of the manual mesh axes `axes`; `x` itself if it is not.

    The other axes that split it are made manual as well: next to an automatic axis XLA gathers that one too.
    """
    held, others = _among(split, axes), _among(split, axes, within=False)
    if not any(held):
        return x
    gather = functools.partial(_all_gather, split=held, axes=axes)
    return on_each_device(gather, axis_names(others), P(*others), P(*others))(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _all_gather(x: jax.Array, split: Partition, axes: tuple[str, ...]) -> jax.Array:
    """Of an array that is split over some of `axes`, and typed as differing along all of them.

    Its cotangent is summed in at least float32, first over the axes that split it, of which each device keeps its part.
    """
    others = tuple(a for a in axes if a not in axis_names(split))
    x = lax.pcast(x, others, to="varying") if others else x
    for dim, names in enumerate(split):
        x = lax.all_gather(x, names, axis=dim, tiled=True) if names else x
    return x


@_all_gather.defjvp
def _all_gather_jvp(split, axes, primals, tangents):
    (x,), (dx,) = primals, tangents
    wide = np.promote_types(x.dtype, np.float32)  # JAX's own raises under strict promotion
    return _all_gather(x, split, axes), _all_gather(dx.astype(wide), split, axes).astype(x.dtype)


def whole_along_others(x: jax.Array, axis: int, axes: Collection[str]) -> jax.Array:
    """`x`, gathered along a dimension over the mesh axes that are not among `axes`.

    XLA, which may have split it over automatic axes, would gather it again in each step of a loop.
    """
    mesh = mesh_of(x)
    if auto_axis_names(mesh) == frozenset(mesh.axis_names):
        spec: list[Any] = [P.UNCONSTRAINED] * x.ndim
        spec[axis] = None
        return x if automatic_devices(x) == 1 else _constrained(x, NamedSharding(mesh, P(*spec)))
    split = list(partition_of(x))
    kept = tuple(a for a in split[axis] if a in axes)
    if kept == split[axis]:
        return x
    split[axis] = kept
    return jax.sharding.reshard(x, NamedSharding(mesh, P(*split)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return lax.with_sharding_constraint(x, sharding)


@_constrained.defjvp
def _constrained_jvp(sharding, primals, tangents):
    return _constrained(*primals, sharding), tangents[0]


def _joined(dims: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: x.reshape(math.prod(x.shape[:dims]), *x.shape[dims:])


@dataclasses.dataclass(frozen=True)
class Batch:
    """The shape of a batch whose axes become one, and how an explicit mesh splits it.

    Each device flattens its own part, so that nothing moves; the rows then come in another order.
    """

    shape: tuple[int, ...]
    mesh: AbstractMesh
    split: Partition

    @classmethod
    def of(cls, x: jax.Array) -> "Batch":
        """All axes of `x` but the last."""
        mesh, shape = mesh_of(x), x.shape[:-1]
        return cls(shape, mesh, ((),) * len(shape) if mesh.empty else partition_of(x)[:-1])

    def flatten(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """`(*batch, ...)` to `(rows, ...)`, split as the batch is, which is that of `like`."""
        dims = len(self.shape)
        if dims == 1:
            return x
        axes = axis_names(self.split)
        if axes and mesh_of(x).empty:
            x = self._on_mesh(x, like)
        flat = on_each_device(_joined(dims), axes, P(*self.split), P(axes))
        return with_auto_axes(flat, x, mesh=self.mesh, out_specs=P(axes, *partition_of(x)[dims:]))

    def _on_mesh(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """An array of the host, split as the batch is: outside `jit`, `shard_map` takes split arrays only or none."""
        nowhere = jnp.any(jnp.zeros_like(like, bool), axis=-1)
        return jnp.where(jnp.expand_dims(nowhere, tuple(range(nowhere.ndim, x.ndim))), x, x)

    def unflatten(self, x: jax.Array) -> jax.Array:
        """`(rows, ...)` to `(*batch, ...)`."""
        if len(self.shape) == 1:
            return x
        axes, sizes = axis_names(self.split), zip(self.shape, self.split, strict=True)
        shape = [n // math.prod(self.mesh.shape[a] for a in names) for n, names in sizes]
        parts = on_each_device(lambda x: x.reshape(*shape, *x.shape[1:]), axes, P(axes), P(*self.split))
        return with_auto_axes(parts, x, mesh=self.mesh, out_specs=P(*self.split, *partition_of(x)[1:]))
