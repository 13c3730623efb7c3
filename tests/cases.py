"""The tables that the tests of the losses share.

The options of the softmax loss are those of `jaxent check`; differences of its logits are exact, so that tolerances are
a few ulp.
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
from jaxent.cli.check.softmax_options import OPTIONS as OPTIONS
from jaxent.cli.check.softmax_options import draw_fractions as draw_fractions
from jaxent.cli.check.softmax_options import draw_labels as draw_labels
from jaxent.cli.check.softmax_options import draw_logits as draw_logits
from jaxent.cli.check.softmax_options import draw_probabilities as draw_probabilities

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
