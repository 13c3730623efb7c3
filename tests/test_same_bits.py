"""What a row gets does not depend on its neighbours or on its place among them: bit for bit, at the same shape.

From hidden states that is as true as it is of the matrix product alone: without AVX-512, XLA's adds up the rows at the
end of a block in another order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import covering

from jaxent import (
    linear_softmax_cross_entropy,
    linear_token_statistics,
    softmax_cross_entropy,
    softmax_cross_entropy_gradient,
    token_statistics,
)

pytestmark = [pytest.mark.compiled, pytest.mark.usefixtures("one_device")]

FEATURES = 16
# Above 2**15 classes the value is computed in blocks of rows, here of 13.
SHAPES = {"few": (64, 10), "many": (40, 1000), "wide": (45, 40000)}
RowFunction = Callable[[jax.Array, jax.Array], Any]


def _linear(f: Callable[..., Any]) -> Callable[[int], RowFunction]:
    def with_classes(classes: int) -> RowFunction:
        kernel = jnp.sin(jnp.arange(FEATURES * classes, dtype=jnp.float32)).reshape(FEATURES, classes)
        return lambda hidden, labels: f(hidden, kernel, labels)

    return with_classes


def _hidden_gradient(reduction: Any) -> Callable[..., Any]:
    def gradient(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jax.grad(
            lambda h: jnp.sum(linear_softmax_cross_entropy(h, kernel, labels, reduction=reduction, chunk_rows=16))
        )(hidden)

    return gradient


DENSE: dict[str, RowFunction] = {
    "loss": lambda z, y: softmax_cross_entropy(z, y, reduction="none"),
    "smoothed loss": lambda z, y: softmax_cross_entropy(z, y, reduction="none", label_smoothing=0.1),
    "log_prob": lambda z, y: token_statistics(z, y).log_prob,
    "gradient": lambda z, y: softmax_cross_entropy_gradient(z, y, reduction="sum"),
    "jax.grad": jax.grad(lambda z, y: softmax_cross_entropy(z, y, reduction="sum")),
}
LINEAR: dict[str, Callable[[int], RowFunction]] = {
    "loss": _linear(lambda h, w, y: linear_softmax_cross_entropy(h, w, y, reduction="none", chunk_rows=16)),
    "log_prob": _linear(lambda h, w, y: linear_token_statistics(h, w, y, chunk_rows=16).log_prob),
    "three products": _linear(_hidden_gradient("sum")),
    "four products": _linear(_hidden_gradient("none")),
}


def _product_has_same_bits(classes: int) -> bool:
    """Whether this machine's product of a chunk of 14 rows gives equal rows equal results."""
    hidden = jnp.broadcast_to(jnp.sin(jnp.arange(FEATURES, dtype=jnp.float32)), (14, FEATURES))
    kernel = jnp.sin(jnp.arange(FEATURES * classes, dtype=jnp.float32)).reshape(FEATURES, classes)
    z = np.asarray(jax.jit(lambda turned, w: turned.T @ w)(hidden.T, kernel))
    return bool(np.all(z == z[:1]))


def _check_rows(
    f: RowFunction, x: np.ndarray, labels: np.ndarray, rng: np.random.Generator, *, exact: bool = True
) -> None:
    f = jax.jit(f)
    as_they_are = np.asarray(f(x, labels))
    order = rng.permutation(len(x))
    assert_same = np.testing.assert_array_equal
    if not exact:
        assert_same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2e-6)
    assert_same(np.asarray(f(x[order], labels[order])), as_they_are[order])
    # Neighbours with a loss above 62 and above 88 nats, far from 0, with a nan, and without a label.
    hostile, kept = x.copy(), np.arange(len(x)) % 2 == 1
    hostile[0::10, 0], hostile[2::10, 0], hostile[4::10], hostile[6::10, 0] = 70, 1000, hostile[4::10] + 1e4, np.nan
    changed = np.where(np.arange(len(x)) % 10 == 8, -100, labels)
    assert_same(np.asarray(f(hostile, changed))[kept], as_they_are[kept])


@pytest.mark.parametrize(("name", "shape"), covering(DENSE, ["wide", "few", "many"]))
def test_of_logits(name: str, shape: str, rng: np.random.Generator) -> None:
    rows, classes = SHAPES[shape]
    z = rng.normal(size=(rows, classes)).astype(np.float32) * 3
    _check_rows(DENSE[name], z, rng.integers(1, classes, size=rows), rng)


@pytest.mark.parametrize(("name", "shape"), covering(LINEAR, ["few", "many"]))
def test_of_hidden_states(name: str, shape: str, rng: np.random.Generator) -> None:
    rows, classes = SHAPES[shape]
    hidden = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    exact = _product_has_same_bits(classes)
    _check_rows(LINEAR[name](classes), hidden, rng.integers(1, classes, size=rows), rng, exact=exact)
