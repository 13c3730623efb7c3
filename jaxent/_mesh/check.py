"""What is refused on a mesh, before any shape is looked at."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType

from jaxent._errors import ArgumentTypeError, ArgumentValueError
from jaxent._mesh.types import axes_of_type, axis_names, mesh_of, partition_of, varying


def check_vocab_axis(vocab_axis: str | None, rows: Mapping[str, Any] = MappingProxyType({})) -> None:
    """An unknown mesh axis is named here, before a collective fails in words about axis environments.

    `rows` are arguments with rows and no classes, as they came: split over the axis they would have a wrong shape too,
    and without any to compare their shape with, a value would be wrong and no one told.
    """
    if vocab_axis is None:
        return
    if not isinstance(vocab_axis, str):
        raise ArgumentTypeError(f"`vocab_axis` must be the name of a mesh axis, got {vocab_axis!r}")
    try:
        lax.axis_size(vocab_axis)
    except NameError as error:
        raise ArgumentValueError(
            f"`vocab_axis` must name a mesh axis of the surrounding jax.shard_map, got "
            f"{vocab_axis!r}; outside shard_map leave it out: automatic and explicit sharding do not need it"
        ) from error
    for name, x in rows.items():
        if isinstance(x, jax.Array) and vocab_axis in varying(x):
            gathered = ", or take its jax.lax.pmean if it was gathered" if name.startswith("hidden") else ""
            raise ArgumentValueError(
                f"`{name}` must be the same on all devices of `vocab_axis`, since labels count all "
                f"classes and rows have all of them; got {jax.typeof(x)}, which differs along {vocab_axis!r}: leave "
                f"the axis out of its in_specs{gathered}"
            )


def check_class_axis(
    vocab_axis: str | None,
    split: Mapping[str, tuple[jax.Array, int]],
    whole: Mapping[str, jax.Array | None],
    along: Mapping[str, tuple[jax.Array | None, int]] = MappingProxyType({}),
) -> None:
    """Arrays with classes, `name: (array, class axis)`, are split over `vocab_axis`; those with rows only are not.

    Those of `along` go with the first of `split`.
    """
    check_vocab_axis(vocab_axis, whole)
    (first, (like, at)), *_ = split.items()
    for name, (x, axis) in along.items():
        if x is not None and partition_of(x)[axis] not in ((), partition_of(like)[at]):
            raise ArgumentValueError(
                f"`{name}` must be split over the mesh axes that split the classes of `{first}`, or "
                f"over none, got {jax.typeof(x)} and {jax.typeof(like)}; `jax.sharding.reshard` it"
            )
    present = {name: x for name, x in whole.items() if x is not None}
    for name, (x, axis) in split.items():
        taken = partition_of(x)[axis]
        for other, y in present.items():
            both = sorted(set(taken) & set(axis_names(partition_of(y))))
            if both:
                raise ArgumentValueError(
                    f"`{other}` must be whole on every device of the mesh axis that splits the "
                    f"classes of `{name}`, got {jax.typeof(y)} and {jax.typeof(x)}; "
                    f"`jax.sharding.reshard` it so that {both[0]!r} splits only classes"
                )
        if vocab_axis in axes_of_type(mesh_of(x), AxisType.Manual) and vocab_axis not in varying(x):
            raise ArgumentValueError(
                f"`{name}` must hold each device's own classes along `vocab_axis`, got the same "
                f"classes on all devices of {vocab_axis!r}; name the axis in the in_specs of jax.shard_map, and leave "
                f"its check_vma on"
            )


def check_linear_layer(hidden: jax.Array, kernel: jax.Array, suffix: str = "") -> None:
    """On an explicit mesh rows and classes are split, each over mesh axes of its own, and features are not."""
    types = f"got {jax.typeof(hidden)} and {jax.typeof(kernel)}"
    features, classes = partition_of(kernel)
    if features or partition_of(hidden)[-1]:
        raise ArgumentValueError(
            f"`hidden{suffix}` and `kernel{suffix}` must have whole features on every device, "
            f"{types}; `jax.sharding.reshard` the kernel to PartitionSpec(None, classes) first"
        )
    both = sorted(set(axis_names(partition_of(hidden))) & set(classes))
    if both:
        raise ArgumentValueError(
            f"`hidden{suffix}` and `kernel{suffix}` must be split over different mesh axes, "
            f"{types}; {both[0]!r} cannot split both rows and classes: `jax.sharding.reshard` one of them"
        )


def check_same_split(arrays: Mapping[str, jax.Array], axis: int) -> None:
    """On an explicit mesh the arrays are split alike along an axis."""
    (first, x), (second, y) = arrays.items()
    if partition_of(x)[axis] != partition_of(y)[axis]:
        raise ArgumentValueError(
            f"`{first}` and `{second}` must be split over the same mesh axes, got "
            f"{jax.typeof(x)} and {jax.typeof(y)}; `jax.sharding.reshard` one of them"
        )
