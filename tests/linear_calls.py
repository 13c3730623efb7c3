"""Calls of the linear loss: heads whose products are exact, and value and gradients against float64.

Hidden states, kernels and biases are multiples of 1/8 and small, so that their products are exact in every dtype:
what is left is the rounding of the row loss and of the two backward products, a few ulp of the sum of absolute terms.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles_linear
from cases import OPTIONS
from oracles import assert_close

import jaxent
from jaxent import WeightedSum

# Untyped: tables of arguments are dictionaries, and what is returned depends on `reduction`.
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
oracle: Any = oracles_linear.softmax_cross_entropy

FEATURES = 4
STATIC = ("ignore_index", "label_smoothing", "z_loss", "reduction", "denominator", "chunk_rows")
# No bias, or all that can be done to the logits of a head before their softmax.
HEADS = {
    "bare": {},
    "shaped": {"bias": True, "soft_cap": np.float32(2.0), "temperature": np.float32(0.75)},
}


def draw_grid(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (rng.integers(-8, 9, size=shape) / 8).astype(dtype)


def draw_head(rng: np.random.Generator, rows: int, count: int, head: str = "bare", dtype: Any = np.float32) -> dict:
    """Arguments for the linear layer."""
    shaped = dict(HEADS[head])
    if shaped.pop("bias", False):
        shaped["bias"] = draw_grid(rng, (count,), dtype)
    arrays = {"hidden": draw_grid(rng, (rows, FEATURES), dtype), "kernel": draw_grid(rng, (FEATURES, count), dtype)}
    return {**arrays, **shaped}


def draw_options(rng: np.random.Generator, option: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """An option of the softmax loss; no class has the weight 0, so that every class weight has its whole derivative."""
    arguments = OPTIONS[option](rng, shape)
    if "class_weights" in arguments:
        arguments["class_weights"] = arguments["class_weights"] + np.float32(0.25)
    return arguments


def value_and_gradients(arguments: dict[str, Any], cotangent: Any = 1.0) -> tuple[Any, dict[str, Any]]:
    """The value and the gradients with respect to all floating arrays; arguments of the same shapes and options share a
    program.
    """
    static = {k: v for k, v in arguments.items() if k in STATIC}
    arrays = {k: v for k, v in arguments.items() if k not in STATIC and v is not None}
    free = {k: v for k, v in arrays.items() if jnp.issubdtype(np.asarray(v).dtype, jnp.floating)}
    fixed = {k: v for k, v in arrays.items() if k not in free}
    return _value_and_gradients(free, fixed, np.asarray(cotangent), static=tuple(static.items()))


@functools.partial(jax.jit, static_argnames=("static",))
def _value_and_gradients(free: Any, fixed: Any, cotangent: jax.Array, *, static: tuple[tuple[str, Any], ...]) -> Any:
    def loss(free: Any) -> Any:
        every = {**free, **fixed}
        value = linear_softmax_cross_entropy(every.pop("hidden"), every.pop("kernel"), **every, **dict(static))
        total = value.total if isinstance(value, WeightedSum) else value
        return jnp.sum(total * cotangent.astype(total.dtype)), value

    (_, value), gradients = jax.value_and_grad(loss, has_aux=True)(free)
    return value, gradients


def check(arguments: dict[str, Any], *, ulp: float = 8, cotangent: Any = 1.0) -> None:
    """Value and every gradient against the oracle, within `ulp` of the sum of the absolute terms."""
    want = oracle(**{k: v for k, v in arguments.items() if k != "chunk_rows"}, cotangent=cotangent)
    value, gradients = value_and_gradients(arguments, cotangent)
    if isinstance(value, WeightedSum):
        assert_close(value.weight, want.weight, ulp=ulp, dtype=np.float32)
        value = value.total
    assert_close(value, want.value, ulp=ulp, dtype=value.dtype)
    for name, got in gradients.items():
        given = np.asarray(arguments[name]).dtype
        assert got.dtype == given, f"the gradient with respect to {name} is {got.dtype}, its argument {given}"
        # Operands of half precision: the logits' gradient is rounded to their dtype, and the result once more.
        allowed = 1.25 if given in (ml_dtypes.bfloat16, np.float16) else ulp
        assert_close(got, want.gradients[name], ulp=allowed, dtype=given, size=np.nan_to_num(want.sizes[name]))
