"""Curvature products, diagonals and gradient norms as scalar functions, for `jaxent check`.

A matrix is seen through its form `<u, A v>`, a diagonal through a weighted sum. They are made of what the losses are
made of, so that float32 is enough.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxent
from jaxent.cli.check import curvature_references as references
from jaxent.cli.check.case import CLASSES, FEATURES, ROWS, Case, heads, rng_for
from jaxent.cli.check.references import WIDE, Array
from jaxent.cli.check.softmax_options import draw_logits


def _steps(*shape: int) -> tuple[Array, Array]:
    rng = rng_for("steps")
    return rng.integers(-6, 7, shape) / 4, rng.integers(-6, 7, shape) / 4


def _labels() -> np.ndarray:
    return rng_for("labels").integers(0, CLASSES, ROWS, dtype=np.int32)


def _like(x: Array, z: jax.Array) -> jax.Array:
    return jnp.asarray(x, dtype=z.dtype)


def curvature_cases() -> Iterator[Case]:
    z = draw_logits(rng_for("curved"), (ROWS, CLASSES), WIDE) / 2
    dense, layer = _steps(ROWS, CLASSES), _steps(FEATURES, CLASSES)
    table: list[tuple[str, Callable[..., Any], tuple[Array, ...], Callable[..., Any]]] = [
        ("logit_hessian", functools.partial(_logit_hessian, dense), (z,), functools.partial(_without_steps, dense)),
        ("logit_hessian_product", functools.partial(_product, dense[0]), (z, dense[1]), _of_product(dense[0])),
        (
            "linear_ggn_vector_product",
            functools.partial(_linear_ggn, layer),
            heads(1),
            functools.partial(references.linear_covariance, steps=layer),
        ),
        (
            "linear_fisher_vector_product",
            functools.partial(_linear_fisher, layer, _labels()),
            heads(1),
            functools.partial(references.linear_fisher, steps=layer, labels=_labels()),
        ),
        (
            "linear_ggn_diagonal",
            functools.partial(_diagonal, layer[0] ** 2),
            heads(1),
            functools.partial(references.linear_diagonal, factors=layer[0] ** 2),
        ),
    ]
    for name, function, args, oracle in table:
        yield Case(name, "form", function, args, oracle, dtypes=("float32",), products="linear" in name)


def _logit_hessian(steps: tuple[Array, Array], z: jax.Array) -> jax.Array:
    u, v = (_like(x, z) for x in steps)
    return jnp.sum(u[:, :, None] * jaxent.logit_hessian(z) * v[:, None, :])


def _without_steps(steps: tuple[Array, Array], z: Array) -> references.Exact:
    exact = references.covariance(z, *steps)
    return references.Exact(exact.value, exact.gradients[:1], exact.sizes[:1], exact.value_size)


def _product(u: Array, z: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(_like(u, z) * jaxent.logit_hessian_product(z, v))


def _of_product(u: Array) -> Callable[..., references.Exact]:
    def oracle(z: Array, v: Array) -> references.Exact:
        exact = references.covariance(z, u, v)
        return references.Exact(exact.value, exact.gradients[::2], exact.sizes[::2], exact.value_size)

    return oracle


def _linear_ggn(steps: tuple[Array, Array], hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    u, v = (_like(x, kernel) for x in steps)
    product = jaxent.linear_ggn_vector_product(hidden, kernel, (None, v), reduction="sum")[1]
    assert product is not None
    return jnp.sum(u * product)


def _linear_fisher(steps: tuple[Array, Array], labels: np.ndarray, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    u, v = (_like(x, kernel) for x in steps)
    product = jaxent.linear_fisher_vector_product(hidden, kernel, labels, (None, v), reduction="sum")[1]
    assert product is not None
    return jnp.sum(u * product)


def _diagonal(factors: Array, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    found = jaxent.linear_ggn_diagonal(hidden, kernel, reduction="sum")
    return jnp.sum(_like(factors, found.kernel) * found.kernel)


# ----------------------------------------------------------------------------------------------------------------------
# Norms


def norm_cases() -> Iterator[Case]:
    labels = _labels()
    for per in ("row", "sequence"):
        oracle = functools.partial(references.kernel_norms, labels=labels, by_sequence=per == "sequence")
        norms = functools.partial(_norms, labels, per)
        yield Case("linear_gradient_norms", f"per {per}", norms, heads(1), oracle, dtypes=("float32",), products=True)


def _norms(labels: np.ndarray, per: Any, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.sum(jaxent.linear_gradient_norms(hidden, kernel, labels, per=per).kernel)
