"""What is refused on a mesh, before any shape is looked at."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType

from jaxent._errors import ArgumentTypeError, ArgumentValueError
from jaxent._mesh.class_axis import VocabAxis, axis_tuple
from jaxent._mesh.types import axes_of_type, axis_names, mesh_of, partition_of, varying


def check_vocab_axis(vocab_axis: VocabAxis, rows: Mapping[str, Any]) -> None:
    """Name an unknown mesh axis here, before a collective fails with a message about axis environments.

    `rows` are arguments with rows and no classes, not yet checked: if split over the axis, they would have a wrong
    shape too, and where there is nothing to compare it with, a value would be wrong without an error.
    """
    if vocab_axis is None:
        return
    axes = axis_tuple(vocab_axis)
    if not axes or not all(isinstance(axis, str) for axis in axes):
        expected = "be the name of a mesh axis or a tuple of names"
        raise ArgumentTypeError(f"`vocab_axis` must {expected}, got {vocab_axis!r}")
    manual = axes_of_type(jax.sharding.get_abstract_mesh(), AxisType.Manual)
    for axis in axes:
        try:
            lax.axis_size(axis)
        except NameError as error:
            raise ArgumentValueError(
                f"`vocab_axis` must name a mesh axis of the surrounding jax.shard_map, got {axis!r}; outside "
                f"shard_map leave it out: automatic and explicit sharding do not need it"
            ) from error
        if axis not in manual:
            raise ArgumentValueError(
                f"`vocab_axis` must name a mesh axis of the surrounding jax.shard_map, got {axis!r}, the axis_name of "
                f"a jax.vmap, whose sums have no derivative that knows of the other parts; use jax.shard_map"
            )
    for name, x in rows.items():
        differs = sorted(varying(x).intersection(axes)) if isinstance(x, jax.Array) else []
        if differs:
            gathered = ", or take its jax.lax.pmean if it was gathered" if name.startswith("hidden") else ""
            raise ArgumentValueError(
                f"`{name}` must be the same on all devices of `vocab_axis`, since labels count all "
                f"classes and rows have all of them; got {jax.typeof(x)}, which differs along {differs[0]!r}: leave "
                f"the axis out of its in_specs{gathered}"
            )


def check_class_axis(
    vocab_axis: VocabAxis,
    split: Mapping[str, tuple[jax.Array, int]],
    whole: Mapping[str, jax.Array | None],
    class_weights: jax.Array | None = None,
) -> None:
    """Arrays with classes, `name: (array, class axis)`, are split over `vocab_axis`; those with rows only are not.

    Class weights go with the first of `split`.
    """
    (first, (like, at)), *_ = split.items()
    if mesh_of(like, class_weights, *whole.values()).empty:
        return
    if class_weights is not None and partition_of(class_weights)[0] not in ((), partition_of(like)[at]):
        raise ArgumentValueError(
            f"`class_weights` must be split over the mesh axes that split the classes of `{first}`, or "
            f"over none, got {jax.typeof(class_weights)} and {jax.typeof(like)}; `jax.sharding.reshard` it"
        )
    axes = axis_tuple(vocab_axis)
    for name, (x, axis) in split.items():
        taken = partition_of(x)[axis]
        for other, y in whole.items():
            both = [] if y is None else sorted(set(taken) & set(axis_names(partition_of(y))))
            if both:
                raise ArgumentValueError(
                    f"`{other}` must be whole on every device of the mesh axis that splits the "
                    f"classes of `{name}`, got {jax.typeof(y)} and {jax.typeof(x)}; "
                    f"`jax.sharding.reshard` it so that {both[0]!r} splits only classes"
                )
        for missing in axes_of_type(mesh_of(x), AxisType.Manual).intersection(axes).difference(varying(x)):
            raise ArgumentValueError(
                f"`{name}` must hold each device's own classes along `vocab_axis`, got the same "
                f"classes on all devices of {missing!r}; name the axis in the in_specs of jax.shard_map, and leave "
                f"its check_vma on"
            )


def check_linear_layer(hidden: jax.Array, kernel: jax.Array, suffix: str = "") -> None:
    """On an explicit mesh rows and classes are split, each over mesh axes of its own; a kernel's features may be."""
    if mesh_of(hidden, kernel).empty:
        return
    rows, classes = partition_of(hidden), partition_of(kernel)[1]
    both = sorted(set(axis_names(rows)) & set(classes))
    if rows[-1]:
        problem = f"have whole features in `hidden{suffix}`"
        remedy = f"`jax.sharding.reshard` it so that {rows[-1][0]!r} splits rows or nothing"
    elif both:
        problem = "be split over different mesh axes"
        remedy = f"{both[0]!r} cannot split both rows and classes: `jax.sharding.reshard` one of them"
    else:
        return
    raise ArgumentValueError(
        f"`hidden{suffix}` and `kernel{suffix}` must {problem}, got {jax.typeof(hidden)} and {jax.typeof(kernel)}; "
        f"{remedy}"
    )


def check_same_split(arrays: Mapping[str, jax.Array], axis: int) -> None:
    """On an explicit mesh the arrays are split alike along an axis."""
    (first, x), (second, y) = arrays.items()
    if partition_of(x)[axis] != partition_of(y)[axis]:
        raise ArgumentValueError(
            f"`{first}` and `{second}` must be split over the same mesh axes, got "
            f"{jax.typeof(x)} and {jax.typeof(y)}; `jax.sharding.reshard` one of them"
        )
