"""`dtype` of the linear functions: the operands of every product, where casts stand, and the accuracy."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles_linear
import pytest
from cases import covering
from test_linear_costs import subprograms

import jaxent

loss: Any = jaxent.linear_softmax_cross_entropy
ROWS, FEATURES, CLASSES = 24, 6, 20
BF16, FP16 = ml_dtypes.bfloat16, np.float16


def data(rng: np.random.Generator, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hidden = rng.normal(size=(rows, FEATURES)).astype(np.float32)
    kernel = rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    return hidden, kernel, rng.integers(0, CLASSES, size=rows)


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for sub in subprograms(value):
                yield from equations(sub)


def has_classes(equation: Any) -> bool:
    return any(CLASSES in x.aval.shape for x in (*equation.invars, *equation.outvars))


def mean(hidden: Any, kernel: Any, labels: Any, dtype: Any) -> jax.Array:
    return loss(hidden, kernel, labels, dtype=dtype, chunk_rows=8)


def per_row(hidden: Any, kernel: Any, labels: Any, dtype: Any) -> jax.Array:
    return jnp.sum(jnp.sin(loss(hidden, kernel, labels, dtype=dtype, chunk_rows=8, reduction="none")))


def statistics(hidden: Any, kernel: Any, labels: Any, dtype: Any) -> jax.Array:
    found: Any = jaxent.linear_token_statistics(hidden, kernel, labels, dtype=dtype, chunk_rows=8)
    return jnp.sum(found.entropy * found.log_prob)


def divergence(hidden: Any, kernel: Any, labels: Any, dtype: Any) -> jax.Array:
    del labels
    return jaxent.linear_kl_divergence(hidden, kernel, 2 * hidden, kernel, dtype=dtype, chunk_rows=8)


def norms(hidden: Any, kernel: Any, labels: Any, dtype: Any) -> jax.Array:
    found = jaxent.linear_gradient_norms(hidden, kernel, labels, dtype=dtype, chunk_rows=8)
    return jnp.sum(found.hidden + found.kernel)


FUNCTIONS = {f.__name__: f for f in (mean, per_row, statistics, divergence, norms)}


def gradient(f: Any) -> Any:
    return lambda h, w, *others: jax.grad(f, argnums=(0, 1))(h, w, *others)


def hessian_product(f: Any) -> Any:
    return lambda h, w, *others: jax.jvp(lambda h, w: gradient(f)(h, w, *others), (h, w), (h, w))[1]


def forward(f: Any) -> Any:
    return lambda h, w, *others: jax.jvp(lambda h, w: f(h, w, *others), (h, w), (h, w))


@pytest.mark.parametrize(
    ("f", "dtype", "transform"),
    [
        pytest.param(f, dtype, transform, marks=() if (i + j + k) % 2 == 0 else pytest.mark.slow)
        for i, f in enumerate(FUNCTIONS.values())
        for j, dtype in enumerate((BF16, FP16))
        for k, transform in enumerate((gradient, hessian_product, forward))
    ],
)
def test_operands_of_all_products(f: Any, dtype: Any, transform: Any, rng: np.random.Generator):
    hidden, kernel, labels = data(rng)
    jaxpr = jax.make_jaxpr(lambda h, w: transform(f)(h, w, labels, dtype))(hidden, kernel).jaxpr
    # Gradient norms have products of features with features, too.
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general" and has_classes(e)]
    assert len(products) >= 2
    assert {x.aval.dtype for e in products for x in e.invars} == {np.dtype(dtype)}
    assert {e.outvars[0].aval.dtype for e in products} == {np.dtype(np.float32)}


@pytest.mark.compiled
@pytest.mark.parametrize("f", [mean, per_row, statistics])
def test_the_program_casts_the_kernel_once(f: Any, rng: np.random.Generator):
    hidden, kernel, labels = data(rng, 64)
    step = jax.jit(lambda h, w: jax.value_and_grad(f, argnums=(0, 1))(h, w, labels, BF16))
    text: Any = step.lower(hidden, kernel).compile().as_text()
    assert len(re.findall(rf"= bf16\[{FEATURES},{CLASSES}\]\S* convert\(", text)) == 1


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_no_worse_than_dense(dtype: Any, reduction: str, rng: np.random.Generator):
    hidden, kernel, labels = data(rng, 256)
    narrow = hidden.astype(dtype)
    want = oracles_linear.softmax_cross_entropy(narrow, kernel.astype(dtype), labels)

    def fused(h: Any, w: Any) -> jax.Array:
        return jnp.mean(loss(h, w, labels, dtype=dtype, chunk_rows=8, reduction=reduction))

    def dense(h: Any, w: Any) -> jax.Array:
        return jaxent.softmax_cross_entropy((h @ w.astype(dtype)).astype(np.float32), labels)

    errors = {}
    for name, f in {"fused": fused, "dense": dense}.items():
        value, gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(narrow, kernel)
        assert gradients[0].dtype == dtype
        assert gradients[1].dtype == np.float32
        found = (value, *gradients)
        expected = (np.asarray(want.value), want.gradients["hidden"], want.gradients["kernel"])
        errors[name] = [
            float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
            for a, b in zip(found, expected, strict=True)
        ]
    for mine, theirs in zip(errors["fused"], errors["dense"], strict=True):
        assert mine <= 1.05 * theirs + 1e-6, errors


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_gradient_of_a_float32_kernel_is_not_rounded(reduction: str):
    # Terms of one sign: 300 chunks of one row, each of which adds 1/2 times 1 + 2**-7, both of them bf16 numbers; the
    # sum over a chunk and over all chunks is exact in float32 and not a bf16 number.
    hidden = np.full((300, 1), 1 + 2**-7, BF16)
    kernel = np.zeros((1, 2), np.float32)

    def total(kernel: jax.Array) -> jax.Array:
        losses = loss(hidden, kernel, np.zeros(300, np.int32), dtype=BF16, reduction=reduction, chunk_rows=4)
        return jnp.sum(losses)

    expected = 300 * (1 + 2**-7) / 2
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(kernel), [[-expected, expected]])
    assert np.float32(expected) != np.float32(np.asarray(expected, BF16))


@pytest.mark.parametrize(("f", "labels_kept"), covering([mean, per_row, statistics], [True, False]))
def test_second_derivatives_do_not_depend_on_chunks(f: Any, labels_kept: bool, rng: np.random.Generator):
    hidden, kernel, labels = data(rng)
    options: dict[str, Any] = {"ignore_index": None} if labels_kept else {}

    def value(h: jax.Array, w: jax.Array, chunk_rows: int) -> jax.Array:
        if f is statistics:
            found: Any = jaxent.linear_token_statistics(h, w, labels, dtype=BF16, chunk_rows=chunk_rows, **options)
            return jnp.sum(found.entropy * found.log_prob)
        reduction = "mean" if f is mean else "none"
        return jnp.sum(jnp.sin(loss(h, w, labels, dtype=BF16, chunk_rows=chunk_rows, reduction=reduction, **options)))

    product = jax.jit(hessian_product(value), static_argnums=2)
    many, one = (product(hidden, kernel, n) for n in (8, ROWS))
    for a, b in zip(many, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int32, "nonsense"])
def test_dtypes_that_are_refused(dtype: Any, rng: np.random.Generator):
    hidden, kernel, labels = data(rng)
    with pytest.raises(TypeError, match="`dtype` must be a floating dtype of at least 16 bits"):
        loss(hidden, kernel, labels, dtype=dtype)
