"""A small head with labels, and what should come out of it, for the calls that people write."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference as ref

# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
Call = Callable[..., Any]
RNG = np.random.default_rng(0)
H, W = RNG.normal(size=(6, 4)).astype(np.float32), RNG.normal(size=(4, 8)).astype(np.float32)
B = RNG.normal(size=8).astype(np.float32)
Z, Y = H @ W, np.array([3, 0, 7, 2, 5, 1], np.int32)
PROBABILITIES = ref.softmax(Z).astype(np.float32)
DZ = ref.softmax(Z) - ref.onehot(Y, 8)
"""The derivative of the summed loss with respect to the logits."""


def close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(ref.wide(got), ref.wide(want), rtol=rtol, atol=atol)


def user_rows(z: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), y[:, None], axis=-1)[:, 0]


def close_leaves(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Leaf by leaf, where a list is an array; nan and inf must be where they are wanted."""
    leaves = [jax.tree.leaves(x, is_leaf=lambda x: isinstance(x, list)) for x in (got, want)]
    for g, w in zip(*leaves, strict=True):
        np.testing.assert_allclose(ref.wide(g), ref.wide(w), rtol=rtol, atol=atol)
