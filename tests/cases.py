"""The tables that the tests of the losses share: dtypes with their tolerances, and every option of the softmax loss.

Logits lie on a grid of 1/16, so that their differences are exact in every dtype and tolerances are a few ulp; option
values are binary fractions for the same reason.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxent
from jaxent import gradients

# Untyped: tables of arguments are dictionaries, and what is returned depends on `reduction`.
softmax_cross_entropy: Any = jaxent.softmax_cross_entropy
softmax_cross_entropy_gradient: Any = gradients.softmax_cross_entropy_gradient
nll_loss: Any = jaxent.nll_loss
sigmoid_cross_entropy: Any = jaxent.sigmoid_cross_entropy
token_statistics: Any = jaxent.token_statistics

REDUCTIONS = ("mean", "sum", "none", "sum_and_weight")

# Logits' dtype; dtype of the loss; ulp of the loss; ulp of the gradient, in the logits' dtype.
DTYPES = {
    "float32": (np.float32, np.float32, 4, 6),
    "bfloat16": (ml_dtypes.bfloat16, np.float32, 4, 0.51),
    "float16": (np.float16, np.float32, 4, 0.51),
    "float64": (np.float64, np.float64, 4, 6),
}


# Each of the other options is part of one of these.
COMBINED = ("plain", "everything", "probabilities_everything")


def options_and_dtypes() -> list:
    """Every option in float32; outside `slow`, the other dtypes take the combined options alone."""
    return [
        pytest.param(option, dtype, marks=[] if dtype == "float32" or option in COMBINED else [pytest.mark.slow])
        for option in OPTIONS
        for dtype in DTYPES
    ]


def covering(*axes: Iterable[Any]) -> list:
    """The product of the axes, as rows of a table: each value stands in one that CI runs; the others are `slow`.

    For axes that the code takes apart, such as the function and the dtype: every row compiles a program of its own.
    """
    values = [list(axis) for axis in axes]
    usual = {tuple(i % len(axis) for axis in values) for i in range(max(map(len, values)))}
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(values, at, strict=True)), marks=[] if at in usual else pytest.mark.slow
        )
        for at in np.ndindex(*map(len, values))
    ]


def marked(table: Iterable[Any], usual: Iterable[Any]) -> list:
    """The rows of a table, of which CI runs the usual ones; the others are `slow`."""
    usual = set(usual)
    return [pytest.param(name, marks=[] if name in usual else pytest.mark.slow) for name in table]


def precision(dtype: Any) -> contextlib.AbstractContextManager:
    """64-bit types if `dtype` needs them."""
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def draw_logits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (np.round(rng.normal(size=shape) * 3 * 16).clip(-127, 127) / 16).astype(dtype)


def draw_labels(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    return rng.integers(0, count, size=shape, dtype=np.int32)


def draw_fractions(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """0, 1/4, ... 2, with the first entry 0."""
    x = (rng.integers(0, 9, size=shape) / 4).astype(np.float32)
    x.flat[:1] = 0
    return x


def draw_probabilities(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of multiples of 1/64 that sum to one, with zeros among them."""
    counts = rng.multinomial(64, np.full(shape[-1], 1 / shape[-1]), size=shape[:-1])
    return (counts / 64).astype(np.float32)


def _some(rng: np.random.Generator, labels: np.ndarray, value: int) -> np.ndarray:
    """The labels, with about a third of them, and always the last, replaced by `value`."""
    chosen = rng.random(labels.shape) < 1 / 3
    chosen.flat[-1:] = True
    return np.where(chosen, value, labels).astype(labels.dtype)


def _everything(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Any]:
    batch, count = shape[:-1], shape[-1]
    return {
        "where": rng.random(batch) < 0.7,
        "weights": draw_fractions(rng, batch),
        "class_weights": draw_fractions(rng, (count,)),
        "label_smoothing": 0.125,
        "z_loss": 0.25,
    }


def _labels(**options: Any) -> Callable[[np.random.Generator, tuple[int, ...]], dict[str, Any]]:
    return lambda rng, shape: {"targets": draw_labels(rng, shape[:-1], shape[-1]), **options}


Arguments = dict[str, Any]
# name -> arguments in addition to the logits, for logits of a shape with the classes last
OPTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Arguments]] = {
    "plain": _labels(),
    "where": lambda rng, s: _labels(where=rng.random(s[:-1]) < 0.6)(rng, s),
    "weights": lambda rng, s: _labels(weights=draw_fractions(rng, s[:-1]))(rng, s),
    "class_weights": lambda rng, s: _labels(class_weights=draw_fractions(rng, s[-1:]))(rng, s),
    "ignore_-100": lambda rng, s: {"targets": _some(rng, draw_labels(rng, s[:-1], s[-1]), -100)},
    "ignore_a_class": _labels(ignore_index=1),
    "ignore_none": _labels(ignore_index=None),
    "smoothing": _labels(label_smoothing=0.125),
    "smoothing_1": _labels(label_smoothing=1.0),
    "z_loss": _labels(z_loss=0.25),
    "denominator": _labels(denominator=4.0),
    "smoothing_class_weights": lambda rng, s: _labels(label_smoothing=0.25, class_weights=draw_fractions(rng, s[-1:]))(
        rng, s
    ),
    "everything": lambda rng, s: {
        "targets": _some(rng, draw_labels(rng, s[:-1], s[-1]), -100),
        **_everything(rng, s),
    },
    "probabilities": lambda rng, s: {"targets": draw_probabilities(rng, s)},
    "one_hot": lambda rng, s: {"targets": np.eye(s[-1], dtype=np.float32)[draw_labels(rng, s[:-1], s[-1])]},
    "probabilities_not_normalised": lambda rng, s: {"targets": draw_fractions(rng, s)},
    "probabilities_class_weights": lambda rng, s: {
        "targets": draw_probabilities(rng, s),
        "class_weights": draw_fractions(rng, s[-1:]),
    },
    "probabilities_everything": lambda rng, s: {"targets": draw_probabilities(rng, s), **_everything(rng, s)},
}

# The options in whose gradient terms cancel, so that its error is measured against the terms.
CANCELLING = {name for name in OPTIONS if any(part in name for part in ("smoothing", "z_loss", "every", "probabilit"))}

# ----------------------------------------------------------------------------------------------------------------------
# Programs whose mathematics is looked at, or what they send: both are settled before code is emitted

FAST: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):  # later there is no such option
    FAST["xla_cpu_use_fusion_emitters"] = False


def run(f: Callable[..., Any], *args: Any) -> Any:
    """`jit(f)(*args)`, compiled in a hurry."""
    return jax.jit(f).lower(*args).compile(FAST)(*args)


# ----------------------------------------------------------------------------------------------------------------------
# Scalars and stacks, to try transformations with


def norm2(tree: Any) -> jax.Array:
    return sum((jnp.sum(x**2) for x in jax.tree.leaves(tree)), jnp.zeros(()))


def both(f: Callable[..., Any]) -> Any:
    return jax.grad(f, argnums=(0, 1))


def stacked(x: Any) -> jax.Array:
    return jnp.stack([jnp.asarray(x), 0.5 * x, -x])
