"""The arguments of the information measures, and how a measure of arrays is evaluated."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.class_axes import flatten_classes, spread_classes
from jaxent._errors import ArgumentValueError
from jaxent._math import safe
from jaxent._mesh.class_axis import ClassAxis
from jaxent._typing import ArrayLike

Axis = int | tuple[int, ...]
"""Where the classes lie, as the caller says it."""
Axes = tuple[int, ...]
"""The same, negative and rising."""
Measure = Callable[..., jax.Array]
"""Of arrays in the accumulation dtype and `axes`, which it keeps with length 1."""


class Options(NamedTuple):
    """The arguments that nearly all measures take, not yet checked."""

    axis: Axis
    where: ArrayLike | None
    keepdims: bool = False
    base: ArrayLike | None = None


def of_distributions(
    measure: Measure,
    values: Mapping[str, ArrayLike],
    options: Options,
    *parameters: jax.Array,
    order: float | None = None,
) -> jax.Array:
    """`measure(*values, *parameters, axes=..., order=...)` of probabilities."""
    operands, axes, where = check_operands(values, options, probabilities)
    log_base, keepdims = arrays.log_base(options.base), bool(options.keepdims)
    return evaluate(measure, operands, where, log_base, *parameters, axes=axes, keepdims=keepdims, order=order)


def of_logits(
    measure: Callable[..., jax.Array],
    values: Mapping[str, ArrayLike],
    options: Options,
    *,
    per_class: bool = False,
) -> jax.Array:
    """`measure` takes rows of logits and their `ClassAxis`; `per_class` says that it keeps all classes."""
    operands, axes, where = check_operands(values, options, arrays.floating)
    log_base, keepdims = arrays.log_base(options.base), bool(options.keepdims)
    return _evaluate_logits(measure, operands, where, log_base, axes=axes, keepdims=keepdims, per_class=per_class)


@functools.partial(jax.jit, static_argnames=("measure", "axes", "keepdims", "order"), inline=True)
def evaluate(
    measure: Measure,
    operands: tuple[jax.Array, ...],
    where: jax.Array | None,
    log_base: jax.Array | None,
    *parameters: jax.Array,
    axes: Axes,
    keepdims: bool = False,
    order: float | None = None,
) -> jax.Array:
    """A deleted class is one of probability 0: in every measure it adds nothing where all operands are 0."""
    operands = arrays.accumulated(*operands)
    parameters = tuple(x.astype(operands[0].dtype) for x in parameters)
    empty = None
    if where is not None:
        empty = ~jnp.any(where, axis=axes, keepdims=True)
        operands = tuple(jnp.where(empty, 1, jnp.where(where, x, 0)) for x in operands)
    options = {} if order is None else {"order": order}
    value = _in_base(measure(*safe.in_domain(*operands), *parameters, axes=axes, **options), log_base)
    if empty is not None:
        value = jnp.where(empty, 0, value)
    return value if keepdims else jnp.squeeze(value, axes)


@functools.partial(jax.jit, static_argnames=("measure", "axes", "keepdims", "per_class"), inline=True)
def _evaluate_logits(
    measure: Callable[..., jax.Array],
    operands: tuple[jax.Array, ...],
    where: jax.Array | None,
    log_base: jax.Array | None,
    *,
    axes: Axes,
    keepdims: bool,
    per_class: bool,
) -> jax.Array:
    operands = arrays.accumulated(*operands)
    empty = None
    if where is not None:
        empty = ~jnp.any(where, axis=axes, keepdims=True)
        operands = tuple(jnp.where(empty, 0, jnp.where(where, z, -jnp.inf)) for z in operands)
    if len(axes) == 1:
        value = measure(*operands, ClassAxis(*axes))
    else:
        value = _of_last_axis(lambda *z: measure(*z, ClassAxis(-1)), operands, axes)
    value = _in_base(value, log_base)
    if empty is not None:
        value = jnp.where(empty, 0, value)
    return value if keepdims or per_class else jnp.squeeze(value, axes)


def _of_last_axis(f: Callable[..., jax.Array], operands: tuple[jax.Array, ...], axes: Axes) -> jax.Array:
    """`f` of several axes made one, which it keeps, with all classes or with length 1."""
    value = f(*(flatten_classes(x, axes) for x in operands))
    sizes = tuple(operands[0].shape[a] for a in axes)
    return spread_classes(value, axes, sizes if value.shape[-1] > 1 else (1,) * len(axes))


def _in_base(value: jax.Array, log_base: jax.Array | None) -> jax.Array:
    return value if log_base is None else value / log_base.astype(value.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def probabilities(argument: str, value: ArrayLike) -> jax.Array:
    """A floating array; integers are taken for counts, which are not rescaled behind the caller's back."""
    return arrays.floating(argument, value, " (a one-hot list as `[0.0, 1.0]`, counts as `counts / counts.sum()`)")


def check_operands(
    values: Mapping[str, ArrayLike],
    options: Options,
    convert: Callable[[str, ArrayLike], jax.Array],
) -> tuple[tuple[jax.Array, ...], Axes, jax.Array | None]:
    """The operands and `where`, broadcast to one shape, and the axes of the classes in it."""
    operands = {name: convert(name, value) for name, value in values.items()}
    axes = arrays.canonical_axes(options.axis, max(*(x.ndim for x in operands.values()), 1))
    first, *_ = operands
    for name, x in operands.items():
        check_class_axes(name, x, axes)
        for at in axes:
            count = operands[first].shape[at]
            if x.shape[at] != count:
                raise arrays.shape_error(name, f"have {count} classes at axis {at}, as `{first}` has", x)
    try:
        shape = np.broadcast_shapes(*(x.shape for x in operands.values()))
    except ValueError as error:
        *_, (last, x) = operands.items()
        expected = f"broadcast against `{first}`, {arrays.describe(operands[first])}"
        raise arrays.shape_error(last, expected, x) from error
    where = check_class_mask(options.where, shape, " and ".join(f"`{name}`" for name in operands))
    return tuple(jnp.broadcast_to(x, shape) for x in operands.values()), axes, where


def check_class_axes(argument: str, x: jax.Array, axes: Axes) -> None:
    for axis in axes:
        if x.ndim < -axis:
            raise arrays.shape_error(argument, f"have a class axis at {axis}", x)
        if x.shape[axis] == 0:
            raise ArgumentValueError(f"`{argument}` must have at least one class, got shape {x.shape}")


def check_class_mask(where: ArrayLike | None, shape: tuple[int, ...], meaning: str) -> jax.Array | None:
    if where is None:
        return None
    where = arrays.boolean("where", where)
    arrays.check_broadcast("where", where, shape, meaning)
    return jnp.broadcast_to(where, shape)


def check_joint(argument: str, value: ArrayLike, variables: int) -> jax.Array:
    """A table of joint probabilities on the last axes, one for each variable."""
    p = probabilities(argument, value)
    if p.ndim < variables:
        raise arrays.shape_error(argument, f"have {('two', 'three')[variables - 2]} class axes", p)
    check_class_axes(argument, p, tuple(range(-variables, 0)))
    return p


def check_order(order: Any, high: float) -> float:
    if isinstance(order, bool) or not isinstance(order, (int, float, np.integer, np.floating)):
        raise arrays.dtype_error("order", "be a Python number, known when the function is traced", order)
    number = float(order)  # of float16, whose comparison with a large Python number overflows
    if not 0 <= number <= high:
        raise ArgumentValueError(f"`order` must lie in [0, inf{']' if high == np.inf else ')'}, got {order}")
    return number
