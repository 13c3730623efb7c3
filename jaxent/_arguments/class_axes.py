"""Classes that lie on several axes: they are counted row by row, on one axis, the last."""

import math

import jax
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._arguments.targets import SoftmaxArguments, SparseTargets
from jaxent._errors import ArgumentValueError
from jaxent._mesh.class_axis import VocabAxis
from jaxent._typing import ArrayLike


def flatten_classes(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`(*batch, classes)`; `axes` are negative and rising."""
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(x, axes, last)
    return moved if len(axes) == 1 else moved.reshape(*moved.shape[: -len(axes)], -1)


def spread_classes(flat: jax.Array, axes: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    """The inverse, for axes of these sizes."""
    spread = flat.reshape(*flat.shape[:-1], *sizes)
    return jnp.moveaxis(spread, tuple(range(-len(axes), 0)), axes)


def flatten_softmax_arguments(
    logits: ArrayLike, given: SoftmaxArguments, axis: tuple[int, ...], vocab_axis: VocabAxis
) -> tuple[jax.Array, SoftmaxArguments, tuple[int, ...]]:
    """The arguments of a softmax over several axes as those of one over the last, and the axes.

    Arrays with classes are flattened; indices count the flat classes, and rows are what is left.
    """
    z = arrays.floating("logits", logits)
    axes = arrays.canonical_axes(axis, max(z.ndim, 1))
    if z.ndim == 0:
        raise arrays.shape_error("logits", "have a class axis", z)
    if vocab_axis is not None and len(axes) > 1:
        raise ArgumentValueError(f"`vocab_axis` must go with one class axis, got `axis` {axis}")
    targets, class_weights = given.targets, given.class_weights
    if targets is not None and not isinstance(targets, SparseTargets):
        targets = arrays.as_array("targets", targets)
        if jnp.issubdtype(targets.dtype, jnp.floating):
            targets = arrays.floating("targets", targets)
            note = "class probabilities are shaped like the logits; class indices are integers"
            arrays.check_shape("targets", targets, z.shape, note)
            targets = flatten_classes(targets, axes)
    if class_weights is not None:
        class_weights = arrays.real("class_weights", class_weights)
        sizes = tuple(z.shape[a] for a in axes)
        arrays.check_shape("class_weights", class_weights, sizes, "one weight for each class, on the class axes")
        class_weights = class_weights.reshape(math.prod(sizes))
    return flatten_classes(z, axes), given._replace(targets=targets, class_weights=class_weights), axes
