"""A linear head and its Jacobian, for the tests of curvature."""

from typing import Any

import jax
import numpy as np

import jaxent

# Untyped: tables of arguments are dictionaries.
ggn_vector_product: Any = jaxent.ggn_vector_product
fisher_vector_product: Any = jaxent.fisher_vector_product
linear_ggn_vector_product: Any = jaxent.linear_ggn_vector_product
linear_fisher_vector_product: Any = jaxent.linear_fisher_vector_product
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy

ROWS, FEATURES, COUNT = 5, 2, 3


def linear(params: Any) -> jax.Array:
    hidden, kernel, bias = params
    return hidden @ kernel + bias[None, :]


def draw_head(rng: np.random.Generator, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rng.normal(size=(rows, FEATURES)), rng.normal(size=(FEATURES, COUNT)), rng.normal(size=COUNT)


def jacobian(hidden: np.ndarray, count: int = COUNT) -> np.ndarray:
    """`d z_nk / d (W, b)`, `(rows, classes, parameters)`."""
    rows, features = hidden.shape
    by_kernel = np.einsum("nd,kc->nkdc", hidden, np.eye(count)).reshape(rows, count, features * count)
    return np.concatenate([by_kernel, np.broadcast_to(np.eye(count), (rows, count, count))], axis=-1)
