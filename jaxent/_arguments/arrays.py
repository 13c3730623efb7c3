"""Arguments become arrays here, or an error that names the function, the argument, what was expected and what came."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxent._errors import ArgumentTypeError, ArgumentValueError


def describe(value: Any) -> str:
    """`float32[8,3]` for an array, the type's name for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{value!r} ({type(value).__name__})"


def shape_error(argument: str, expected: str, got: Any) -> ValueError:
    return ArgumentValueError(f"`{argument}` must {expected}, got {describe(got)}")


def dtype_error(argument: str, expected: str, got: Any) -> TypeError:
    return ArgumentTypeError(f"`{argument}` must {expected}, got {describe(got)}")


def _as_array(argument: str, value: ArrayLike) -> jax.Array | np.ndarray:
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "__jax_array__"):  # such as a parameter of flax: an array, or a tracer, in a box
        return jnp.asarray(value)
    try:
        array = np.asarray(value, dtype=getattr(value, "dtype", None))
    except (TypeError, ValueError) as error:
        raise dtype_error(argument, "be array-like", value) from error
    if array.dtype == object:
        raise dtype_error(argument, "be array-like", value)
    return array


def floating(argument: str, value: ArrayLike) -> jax.Array:
    """A floating array in the dtype that JAX gives it."""
    array = _as_array(argument, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise dtype_error(argument, "have a floating dtype", array)
    return _typed(array)


def real(argument: str, value: ArrayLike) -> jax.Array:
    """A floating array; integers, which are exact weights and counts, are converted."""
    array = _as_array(argument, value)
    if jnp.issubdtype(array.dtype, jnp.integer):
        # On the host: JAX would wrap 64 bits to 32.
        array = array.astype(np.float64) if isinstance(array, np.ndarray) else array
        return jnp.asarray(array).astype(jnp.result_type(float))
    return floating(argument, array)


def probability_or_flag(argument: str, value: ArrayLike) -> jax.Array:
    """Probabilities of the positive class, or bool or integer flags, as a floating array."""
    array = _as_array(argument, value)
    return jnp.asarray(array).astype(jnp.result_type(float)) if array.dtype == np.bool_ else real(argument, array)


def boolean(argument: str, value: ArrayLike) -> jax.Array:
    array = _as_array(argument, value)
    if array.dtype != np.bool_:
        raise dtype_error(argument, "have dtype bool", array)
    return jnp.asarray(array)


def integer(argument: str, value: ArrayLike) -> jax.Array:
    """An integer array of any width; a 64-bit host array saturates where JAX would wrap it to 32 bits."""
    array = _as_array(argument, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise dtype_error(argument, "have an integer dtype", array)
    if isinstance(array, np.ndarray):
        bounds = jnp.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
        array = np.clip(array, bounds.min, bounds.max)
    return _typed(array)


def _typed(array: jax.Array | np.ndarray) -> jax.Array:
    """A strongly typed `jax.Array`: a Python float among the inputs must not change the dtype of the result."""
    return jnp.asarray(array, dtype=jax.dtypes.canonicalize_dtype(array.dtype))


def accumulation_dtype(*arrays: jax.Array) -> np.dtype:
    """float64 if any input is float64, else float32: sums of narrower types lose what they add."""
    return np.dtype(np.float64 if any(a.dtype == np.float64 for a in arrays) else np.float32)


def accumulated(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, converted to their common accumulation dtype."""
    dtype = accumulation_dtype(*arrays)
    return tuple(a.astype(dtype) for a in arrays)


def canonical_axis(axis: Any, ndim: int, argument: str = "axis") -> int:
    """The axis counted from the end (-1 is the last)."""
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise dtype_error(argument, "be an int", axis)
    if not -ndim <= axis < ndim:
        raise ArgumentValueError(f"`{argument}` must lie in [{-ndim}, {ndim}) for {ndim} dimensions, got {axis}")
    return int(axis) % ndim - ndim


def check_shape(argument: str, array: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        raise shape_error(argument, f"have shape {shape} ({meaning})", array)


def check_broadcast(argument: str, array: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise shape_error(argument, f"broadcast to shape {shape}, that of {meaning}", array)


def scalar(
    argument: str,
    value: ArrayLike,
    *,
    low: float,
    high: float = np.inf,
    open_low: bool = False,
    neutral: float | None = None,
) -> jax.Array | None:
    """A real number in range as a 0-d array, or None if it is a host number equal to `neutral` (the option is off).

    A value that is known now is checked now; a traced one becomes nan when it is out of range.
    """
    array = real(argument, value)
    if array.shape != ():
        raise shape_error(argument, "be a scalar", array)
    try:
        # Of the argument, not of `array`: while jit traces, jnp turns even a Python float into a tracer.
        known = float(np.asarray(value))
    except jax.errors.TracerArrayConversionError:
        inside = (array > low if open_low else array >= low) & (array <= high)
        return jnp.where(inside, array, jnp.nan)
    if not ((known > low if open_low else known >= low) and known <= high):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == np.inf else ']'}"
        raise ArgumentValueError(f"`{argument}` must lie in {interval}, got {value}")
    if neutral is not None and not isinstance(value, jax.Array) and known == neutral:
        return None
    return array


def log_base(base: ArrayLike | None) -> jax.Array | None:
    """The natural logarithm of a base; nan for a traced base out of range, and None for None."""
    if base is None:
        return None
    array = real("base", base)
    if array.shape != ():
        raise shape_error("base", "be a scalar", array)
    try:
        # Of the argument, not of `array`: while jit traces, jnp turns even a Python number into a tracer.
        known = float(np.asarray(base).astype(np.float64))
    except jax.errors.TracerArrayConversionError:
        (array,) = accumulated(array)
        return jnp.log(jnp.where((array > 0) & (array != 1) & jnp.isfinite(array), array, jnp.nan))
    if not (known > 0 and known != 1 and np.isfinite(known)):
        raise ArgumentValueError(f"`base` must be positive, finite and not 1, got {base}")
    return jnp.asarray(np.log(known), dtype=jnp.result_type(float))
