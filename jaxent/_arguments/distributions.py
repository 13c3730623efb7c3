"""The arguments of the information measures, and how a measure of arrays is evaluated."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxent._arguments import arrays
from jaxent._arguments.targets import check_classes
from jaxent._errors import ArgumentValueError
from jaxent._math import safe
from jaxent._mesh.class_axis import ClassAxis

Axes = tuple[int, ...]
"""Class axes, negative and rising."""
Measure = Callable[..., jax.Array]
"""Of arrays in the accumulation dtype and `axes`, which it keeps with length 1."""


def of_distributions(
    measure: Measure,
    values: Mapping[str, ArrayLike],
    *,
    axis: int,
    where: ArrayLike | None,
    base: ArrayLike | None = None,
    order: float | None = None,
) -> jax.Array:
    operands, axes, where = check_operands(values, axis, where)
    return evaluate(measure, operands, where, arrays.log_base(base), axes=axes, order=order)


def of_logits(
    measure: Callable[..., jax.Array],
    values: Mapping[str, ArrayLike],
    *,
    axis: int,
    where: ArrayLike | None,
    base: ArrayLike | None,
    per_class: bool = False,
) -> jax.Array:
    """`measure` takes rows of logits and their `ClassAxis`; `per_class` says that it keeps all classes."""
    operands, axes, where = check_operands(values, axis, where)
    return _evaluate_logits(measure, operands, where, arrays.log_base(base), axes=axes, per_class=per_class)


@functools.partial(jax.jit, static_argnames=("measure", "axes", "order"), inline=True)
def evaluate(
    measure: Measure,
    operands: tuple[jax.Array, ...],
    where: jax.Array | None,
    log_base: jax.Array | None,
    *,
    axes: Axes,
    order: float | None = None,
) -> jax.Array:
    """A deleted class is one of probability 0: in every measure it adds nothing where all operands are 0."""
    operands = arrays.accumulated(*operands)
    if where is not None:
        operands = tuple(jnp.where(where, x, 0) for x in operands)
    options = {} if order is None else {"order": order}
    value = measure(*safe.in_domain(*operands), axes=axes, **options)
    return in_base(jnp.squeeze(value, axes), log_base)


@functools.partial(jax.jit, static_argnames=("measure", "axes", "per_class"), inline=True)
def _evaluate_logits(
    measure: Callable[..., jax.Array],
    operands: tuple[jax.Array, ...],
    where: jax.Array | None,
    log_base: jax.Array | None,
    *,
    axes: Axes,
    per_class: bool,
) -> jax.Array:
    operands = arrays.accumulated(*operands)
    if where is not None:
        operands = tuple(jnp.where(where, z, -jnp.inf) for z in operands)
    (axis,) = axes
    value = measure(*operands, ClassAxis(axis))
    return in_base(value if per_class else jnp.squeeze(value, axis), log_base)


def in_base(value: jax.Array, log_base: jax.Array | None) -> jax.Array:
    return value if log_base is None else value / log_base.astype(value.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check_operands(
    values: Mapping[str, ArrayLike], axis: int, where: ArrayLike | None
) -> tuple[tuple[jax.Array, ...], Axes, jax.Array | None]:
    """The operands and `where`, broadcast to one shape, and the axes of the classes in it."""
    operands = {name: arrays.floating(name, value) for name, value in values.items()}
    axis = arrays.canonical_axis(axis, max(*(x.ndim for x in operands.values()), 1))
    first, *_ = operands
    for name, x in operands.items():
        if x.ndim < -axis:
            raise arrays.shape_error(name, f"have a class axis at {axis}", x)
        check_classes(name, x.shape, axis)
        count = operands[first].shape[axis]
        if x.shape[axis] != count:
            raise arrays.shape_error(name, f"have {count} classes at axis {axis}, as `{first}` has", x)
    try:
        shape = np.broadcast_shapes(*(x.shape for x in operands.values()))
    except ValueError as error:
        *_, (last, x) = operands.items()
        expected = f"broadcast against `{first}`, {arrays.describe(operands[first])}"
        raise arrays.shape_error(last, expected, x) from error
    if where is not None:
        where = arrays.boolean("where", where)
        arrays.check_broadcast("where", where, shape, " and ".join(f"`{name}`" for name in operands))
        where = jnp.broadcast_to(where, shape)
    return tuple(jnp.broadcast_to(x, shape) for x in operands.values()), (axis,), where


def check_joint(name: str, value: ArrayLike, variables: int) -> jax.Array:
    """A table of joint probabilities on the last axes, one for each variable."""
    p = arrays.floating(name, value)
    if p.ndim < variables:
        raise arrays.shape_error(name, f"have {('two', 'three')[variables - 2]} class axes", p)
    for axis in range(-variables, 0):
        check_classes(name, p.shape, axis)
    return p


def check_order(order: Any, high: float) -> float:
    if isinstance(order, bool) or not isinstance(order, (int, float, np.integer, np.floating)):
        raise arrays.dtype_error("order", "be a Python number, known when the function is traced", order)
    if not 0 <= order <= high:
        raise ArgumentValueError(f"`order` must lie in [0, inf{']' if high == np.inf else ')'}, got {order}")
    return float(order)
