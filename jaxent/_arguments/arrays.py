"""Arguments become arrays here, or an error that says which argument, what was expected and what came."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._errors import ArgumentTypeError, ArgumentValueError
from jaxent._typing import ArrayLike, DTypeLike


def describe(value: Any) -> str:
    """`float32[8,3]` for an array, the type's name for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{value!r} ({type(value).__name__})"


def shape_error(argument: str, expected: str, got: Any) -> ArgumentValueError:
    return ArgumentValueError(f"`{argument}` must {expected}, got {describe(got)}")


def dtype_error(argument: str, expected: str, got: Any) -> ArgumentTypeError:
    return ArgumentTypeError(f"`{argument}` must {expected}, got {describe(got)}")


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


def as_array(argument: str, value: Any, expected: str = "be array-like") -> jax.Array | np.ndarray:
    """A JAX array as it is; a NumPy array of anything else that lives on the host, a tensor of PyTorch included."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray):
        return _readable(argument, value)
    if hasattr(value, "__jax_array__"):  # such as a parameter of flax: an array, or a tracer, in a box
        return jnp.asarray(value)
    try:
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list of tracers
        return jnp.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        copy = _through_dlpack(value)
        if copy is None:
            raise dtype_error(argument, f"{expected} ({error})", value) from error
        return copy
    return _readable(argument, array, expected)


def _readable(argument: str, array: np.ndarray, expected: str = "be array-like") -> np.ndarray:
    """The array in a type that JAX reads: neither masked, nor of another machine's bytes, nor of more than 64 bits."""
    if isinstance(array, np.ma.MaskedArray):
        expected = "be an array without a mask (pass its `data`, and as `where` the entries that count: `~x.mask`)"
        raise dtype_error(argument, expected, array)
    if array.dtype == object:
        if not all(isinstance(x, int) for x in array.flat):
            raise dtype_error(argument, expected, array.tolist())
        return array.astype(np.float64)  # integers of more than 64 bits
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return _narrowed(argument, array, np.dtype(np.float64))
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _narrowed(argument: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """In a narrower floating dtype; what is finite stays so."""
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.array_equal(np.isinf(narrow), np.isinf(array)):
        wider = " (or switch 64-bit types on)" if dtype == np.float32 else ""
        raise shape_error(argument, f"hold numbers within the range of {dtype}{wider}", array)
    return narrow


def _through_dlpack(value: Any) -> jax.Array | None:
    """A copy of an array that NumPy cannot read, such as PyTorch's bfloat16."""
    try:
        return jnp.from_dlpack(value, copy=True)
    except Exception:  # whatever the other library raises: the error of NumPy says more
        return None


def floating(argument: str, value: ArrayLike, note: str = "") -> jax.Array:
    """A floating array in the dtype that JAX gives it; `note` says what to do with integers."""
    array = value if isinstance(value, jax.Array) else as_array(argument, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise dtype_error(argument, f"have a floating dtype{note}", array)
    if array.dtype.itemsize < 2:
        expected = (
            "have a floating dtype of at least 16 bits (float8 has too few for a loss: multiply it by its scale in "
            "`x.astype(jnp.bfloat16)` first)"
        )
        raise dtype_error(argument, expected, array)
    return array if isinstance(array, jax.Array) and not array.weak_type else _typed(argument, array)


def floating_dtype(argument: str, value: DTypeLike) -> np.dtype:
    """A floating dtype of at least 16 bits, as JAX has it."""
    expected = "be a floating dtype of at least 16 bits, such as jnp.bfloat16"
    try:
        dtype = np.dtype(value)
    except TypeError as error:
        raise dtype_error(argument, expected, value) from error
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise ArgumentTypeError(f"`{argument}` must {expected}, got {dtype}")
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def real(argument: str, value: ArrayLike) -> jax.Array:
    """A floating array; integers and flags, which are exact weights and counts, are converted."""
    array = as_array(argument, value)
    if not jnp.issubdtype(array.dtype, jnp.integer) and array.dtype != np.bool_:
        return floating(argument, array)
    if isinstance(array, np.ndarray):
        return _typed(argument, array.astype(np.float64))  # as int32, 2**31 would be negative
    return array.astype(jnp.result_type(float))


def boolean(argument: str, value: ArrayLike) -> jax.Array:
    array = as_array(argument, value)
    if array.dtype != np.bool_:
        raise dtype_error(argument, "have dtype bool (a mask of 0 and 1 goes in as `mask.astype(bool)`)", array)
    return jnp.asarray(array)


def integer(argument: str, value: ArrayLike) -> jax.Array:
    """An integer array of any width; a 64-bit host array saturates where JAX would wrap it to 32 bits."""
    array = value if isinstance(value, jax.Array) else as_array(argument, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise dtype_error(argument, "have an integer dtype", array)
    if isinstance(array, np.ndarray):
        bounds = jnp.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
        array = np.clip(array, bounds.min, bounds.max)
    return array if isinstance(array, jax.Array) and not array.weak_type else _typed(argument, array)


def of_any_dtype(argument: str, value: ArrayLike) -> jax.Array:
    """An array for a function of the user's; integers that would wrap to 32 bits are refused."""
    array = as_array(argument, value)
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.size:
        bounds = jnp.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
        if not bounds.min <= array.min() <= array.max() <= bounds.max:
            expected = f"hold integers within the range of {bounds.dtype} (or be floating, or switch 64-bit types on)"
            raise shape_error(argument, expected, array)
    return array if isinstance(array, jax.Array) else _typed(argument, array)


def _typed(argument: str, array: jax.Array | np.ndarray) -> jax.Array:
    """A strongly typed `jax.Array`: a Python float among the inputs must not change the dtype of the result.

    A number of the host that is finite in float64 and not in JAX's float32 is refused.
    """
    if isinstance(array, jax.Array):
        return jnp.asarray(array, dtype=array.dtype) if array.weak_type else array
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return jnp.asarray(array)
    return jnp.asarray(_narrowed(argument, array, dtype) if dtype == np.float32 else array.astype(dtype))


def accumulation_dtype(*arrays: jax.Array | np.dtype) -> np.dtype:
    """float64 if any input is float64, else float32: sums of narrower types lose what they add."""
    for array in arrays:
        if getattr(array, "dtype", array) == np.float64:
            return np.dtype(np.float64)
    return np.dtype(np.float32)


def accumulated(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, converted to their common accumulation dtype."""
    dtype = accumulation_dtype(*arrays)
    return tuple([a.astype(dtype) for a in arrays])


# ----------------------------------------------------------------------------------------------------------------------
# Shapes and axes


def as_int(argument: str, value: Any, expected: str = "be an int") -> int:
    """A Python or NumPy integer, known when the function is traced; a bool is none."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise dtype_error(argument, expected, value)


def canonical_axis(axis: Any, ndim: int, argument: str = "axis") -> int:
    """The axis counted from the end (-1 is the last)."""
    if type(axis) is not int:
        axis = as_int(argument, axis)
    if not -ndim <= axis < ndim:
        raise ArgumentValueError(f"`{argument}` must lie in [{-ndim}, {ndim}) for {ndim} dimensions, got {axis}")
    return axis % ndim - ndim


def canonical_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """One axis or several, counted from the end, in rising order."""
    given = axis if isinstance(axis, tuple) else (as_int("axis", axis, "be an int or a tuple of them"),)
    axes = sorted(canonical_axis(a, ndim) for a in given)
    if not axes or len(set(axes)) < len(axes):
        raise ArgumentValueError(f"`axis` must name at least one axis, and none twice, got {axis}")
    return tuple(axes)


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


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


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
    if neutral is not None and isinstance(value, (float, int)) and value == neutral and not isinstance(value, bool):
        return None
    known, array = _number(argument, value)
    if known is None:
        inside = (array > low if open_low else array >= low) & (array <= high)
        return jnp.where(inside, array, jnp.nan)
    if not ((known > low if open_low else known >= low) and known <= high and np.isfinite(known)):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if high == np.inf else ']'}"
        raise ArgumentValueError(f"`{argument}` must lie in {interval}, got {value}")
    if neutral is not None and not isinstance(value, jax.Array) and known == neutral:
        return None
    return array


def log_base(base: ArrayLike | None) -> jax.Array | None:
    """The natural logarithm of a base; nan for a traced base out of range, and None for None."""
    if base is None:
        return None
    known, array = _number("base", base)
    if known is None:
        (array,) = accumulated(array)
        return jnp.log(jnp.where((array > 0) & (array != 1) & jnp.isfinite(array), array, jnp.nan))
    if not (known > 0 and known != 1 and np.isfinite(known)):
        raise ArgumentValueError(f"`base` must be positive, finite and not 1, got {base}")
    return jnp.asarray(np.log(known), dtype=jnp.result_type(float))


def _number(argument: str, value: ArrayLike) -> tuple[float | None, jax.Array]:
    """A real scalar: its value in float64, or None if it is traced, and the array.

    A host number other than 0 that would be 0 or infinite in float32 is refused.
    """
    given = as_array(argument, value)
    if isinstance(value, str):
        raise dtype_error(argument, "be a number", value)
    if given.dtype == np.bool_:
        raise dtype_error(argument, "have a floating dtype", given)
    array = real(argument, given)
    if array.shape != ():
        raise shape_error(argument, "be a scalar", array)
    try:
        # From the argument, not from `array`: while jit traces, jnp turns even a Python float into a tracer.
        known = float(np.asarray(given).astype(np.float64))
    except jax.errors.TracerArrayConversionError:
        return None, array
    if known and abs(known) < float(jnp.finfo(array.dtype).tiny):
        raise ArgumentValueError(f"`{argument}` must be 0 or a normal number of {array.dtype}, got {value}")
    return known, array
