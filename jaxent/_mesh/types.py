"""How a value is typed and split: which mesh axes it varies over, and which devices may hold its parts."""

import math
from collections.abc import Collection, Sequence

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType


def varying(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """The manual mesh axes along which the value differs between devices."""
    typed = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    return frozenset() if typed.manual_axis_type is None else typed.manual_axis_type.varying


def pcast_like(
    x: jax.Array, others: Sequence[jax.Array | jax.ShapeDtypeStruct], except_for: Collection[str] = ()
) -> jax.Array:
    """`x`, typed inside `shard_map` as differing between devices along every axis that any of `others` differs along.

    A scan's carry must have its final type from the start, and a constant that is made varying before a scan is summed
    over the devices once, after it, in the backward pass, not once per step.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = frozenset[str]().union(*map(varying, others)).difference(varying(x), except_for)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def axes_that_split(x: jax.Array, size: int) -> str:
    """The manual mesh axis, or the tuple of all of them, along which parts like `x` have `size` entries; else ''."""
    mesh, own = mesh_of(x), sorted(varying(x))
    sizes = {repr(a): mesh.shape[a] for a in own}
    sizes[repr(tuple(own))] = math.prod(sizes.values())
    return next((name for name, devices in sizes.items() if devices > 1 and x.shape[0] * devices == size), "")


def sum_to_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, summed over the mesh axes along which it differs between devices and `like` does not."""
    axes = varying(x) - varying(like)
    return lax.psum(x, tuple(sorted(axes))) if axes else x


def may_be_split_by_xla(x: jax.Array) -> bool:
    """Whether the array may be split over devices without its type saying how."""
    mesh = mesh_of(x)
    # An array that only `jit` knows to be split has no mesh in its type.
    return jax.device_count() > 1 if mesh.empty else automatic_devices(x) > 1


def may_gather(x: jax.Array) -> bool:
    """Whether entries can be gathered: the array's type has no mesh, or an automatic one of a single GPU or CPU.

    The compiler of a TPU would copy the array for that.
    """
    mesh = mesh_of(x)
    on_tpu = mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"
    return mesh.empty or (mesh.size == 1 and not on_tpu and len(auto_axis_names(mesh)) == len(mesh.axis_names))


NO_MESH = AbstractMesh((), ())


def mesh_of(*arrays: jax.Array | None) -> AbstractMesh:
    """The mesh that any of the arrays is typed with; empty if none is."""
    for x in arrays:
        if x is not None:
            mesh = jax.typeof(x).sharding.mesh
            if not mesh.empty:
                return mesh
    return NO_MESH


def axes_of_type(mesh: AbstractMesh, kind: AxisType) -> frozenset[str]:
    return frozenset(name for name, its in zip(mesh.axis_names, mesh.axis_types, strict=True) if its == kind)


def auto_axis_names(mesh: AbstractMesh) -> frozenset[str]:
    """The mesh axes over which XLA splits arrays as it thinks best."""
    return axes_of_type(mesh, AxisType.Auto)


Partition = tuple[tuple[str, ...], ...]


def partition_of(x: jax.Array) -> Partition:
    """The explicit mesh axes that each dimension is split over, without those of size 1, which split nothing."""
    sharding = jax.typeof(x).sharding
    mesh, spec = sharding.mesh, sharding.spec
    if mesh.empty:
        return ((),) * x.ndim
    names = (() if s is None else s if isinstance(s, tuple) else (s,) for s in spec)
    return tuple(tuple(a for a in axes if mesh.shape[a] > 1) for axes in names)


def axis_names(split: Partition) -> tuple[str, ...]:
    return tuple(name for names in split for name in names)


def local_shape(x: jax.Array) -> tuple[int, ...]:
    """The shape of one device's part on an explicit mesh; the whole shape on others."""
    mesh = mesh_of(x)
    if mesh.empty:
        return x.shape
    return tuple(
        n // math.prod(mesh.shape[a] for a in names) for n, names in zip(x.shape, partition_of(x), strict=True)
    )


def automatic_devices(x: jax.Array) -> int:
    """Over how many devices XLA may have split an array, as far as its type knows."""
    mesh = mesh_of(x)
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in auto_axis_names(mesh))
