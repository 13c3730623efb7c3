"""Derivatives with respect to the logits, four ways: the closed form, `jax.grad`, `jax.jacfwd`, and the exact oracle.

`check_grads` adds finite differences, which need no formula at all, for every argument that has a derivative.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracles
import pytest
from cases import (
    CANCELLING,
    COMBINED,
    DTYPES,
    OPTIONS,
    REDUCTIONS,
    draw_fractions,
    draw_labels,
    draw_logits,
    draw_probabilities,
    marked,
    options_and_dtypes,
    precision,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_gradient,
    token_statistics,
)
from jax.test_util import check_grads
from oracles import assert_close

from jaxent import entropy_with_logits

SHAPE = (4, 3)


def oracle(logits: np.ndarray, arguments: dict[str, Any]) -> oracles.Losses:
    exact: Any = oracles.softmax_cross_entropy
    return exact(logits, **arguments)


@pytest.mark.parametrize(("option", "dtype"), options_and_dtypes())
def test_gradient_of_every_option(option: str, dtype: str, rng: np.random.Generator):
    kind, _, _, ulp = DTYPES[dtype]
    with precision(kind):
        z, arguments = draw_logits(rng, SHAPE, kind), OPTIONS[option](rng, SHAPE)
        want = oracle(z, arguments)
        every = kind == np.float32 and option in COMBINED
        reductions = REDUCTIONS if every else ("mean",)

        def total(z: Any, reduction: str) -> jax.Array:
            value = softmax_cross_entropy(z, **arguments, reduction=reduction)
            return value.total if reduction == "sum_and_weight" else jnp.sum(value)

        @jax.jit
        def ways(z: jax.Array) -> dict[str, list[jax.Array]]:
            return {
                r: [
                    softmax_cross_entropy_gradient(z, **arguments, reduction=r),
                    jax.grad(total)(z, r),
                    *([jax.jacfwd(total)(z, r)] if r in ("mean", "sum") and kind in (np.float32, np.float64) else []),
                ]
                for r in reductions
            }

        for reduction, gradients in ways(z).items():
            scale = want.scale(reduction)
            for got in gradients:
                assert got.dtype == kind
                size = want.size * scale if option in CANCELLING else 0
                # A half-precision gradient is a float32 one, rounded once; where terms cancel, that one has its error.
                if ulp < 1 and option in CANCELLING:
                    size = np.maximum(np.abs(want.gradient), 1e-3 * want.size) * scale
                assert_close(got, want.gradient * scale, ulp=ulp, dtype=kind, size=size)


# What decides which terms there are; the others are part of these, scale or drop rows.
TERMS = (*COMBINED, "probabilities_not_normalised")


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("option", [o if o in TERMS else pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS])
def test_hessian_of_every_option(option: str, dtype: Any, rng: np.random.Generator):
    with precision(dtype):
        z, arguments = draw_logits(rng, SHAPE, dtype), OPTIONS[option](rng, SHAPE)
        want = oracle(z, arguments)
        reduction = "mean" if "denominator" in arguments else "sum"

        def loss(z: Any) -> jax.Array:
            return softmax_cross_entropy(z, **arguments, reduction=reduction)

        def closed(z: Any) -> jax.Array:
            return softmax_cross_entropy_gradient(z, **arguments, reduction=reduction)

        @jax.jit
        def ways(z: jax.Array) -> list[jax.Array]:
            return [jax.hessian(loss)(z), jax.jacrev(jax.grad(loss))(z), jax.jacfwd(closed)(z), jax.jacrev(closed)(z)]

        expected = np.zeros((*SHAPE, *SHAPE))
        for n in range(SHAPE[0]):
            expected[n, :, n, :] = want.hessian[n] * want.scale(reduction)
        # Off the tiny losses below, `p_j (1 - p_j)` may come as the difference of `p_j` and `p_j^2`.
        size = want.scale(reduction) * want.size.max(axis=-1)[:, None, None, None] * (expected != 0)
        for got in ways(z):
            assert_close(got, expected, ulp=8, dtype=dtype, size=size)


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", marked(OPTIONS, ["everything"]))
def test_finite_differences_of_every_option(option: str, rng: np.random.Generator):
    z, arguments = draw_logits(rng, SHAPE, np.float64) / 4, OPTIONS[option](rng, SHAPE)
    check_grads(jax.jit(lambda z: softmax_cross_entropy(z, **arguments)), (z,), order=2, modes=("fwd", "rev"))


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("by_label", [pytest.param(True, marks=pytest.mark.slow), False])
def test_finite_differences_with_respect_to_every_argument(by_label: bool, rng: np.random.Generator):
    z = draw_logits(rng, SHAPE, np.float64) / 4
    labels = draw_labels(rng, SHAPE[:1], SHAPE[1])
    targets = draw_probabilities(rng, SHAPE).astype(np.float64) + 0.25
    weights, class_weights = (draw_fractions(rng, s).astype(np.float64) + 0.25 for s in (SHAPE[:1], SHAPE[1:]))

    def loss(z: Any, targets: Any, weights: Any, class_weights: Any, smoothing: Any, z_loss: Any) -> jax.Array:
        return softmax_cross_entropy(
            z,
            labels if by_label else targets,
            weights=weights,
            class_weights=class_weights,
            label_smoothing=smoothing,
            z_loss=z_loss,
        )

    check_grads(
        jax.jit(loss), (z, targets, weights, class_weights, 0.25, 0.5), order=2, modes=("fwd", "rev"), atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_finite_differences_of_the_other_losses(rng: np.random.Generator):
    z = draw_logits(rng, SHAPE, np.float64) / 4
    labels = draw_labels(rng, SHAPE[:1], SHAPE[1])

    def binary(z: Any, t: Any, weights: Any, pos_weight: Any) -> jax.Array:
        return sigmoid_cross_entropy(z, t, weights=weights, pos_weight=pos_weight)

    t, weights = draw_probabilities(rng, SHAPE).astype(np.float64), draw_fractions(rng, SHAPE).astype(np.float64) + 0.25
    check_grads(jax.jit(binary), (z, t, weights, np.array([0.5, 1.0, 2.0])), order=2, modes=("fwd", "rev"), atol=1e-4)

    def statistics(z: Any) -> tuple[jax.Array, ...]:
        got = token_statistics(z, labels)
        return got.log_prob, got.log_normalizer, got.entropy

    check_grads(jax.jit(statistics), (z,), order=2, modes=("fwd", "rev"))


def test_the_plain_gradient_is_softmax_minus_one_hot(rng: np.random.Generator):
    z, labels = draw_logits(rng, (6, 4)), draw_labels(rng, (6,), 4)
    got = softmax_cross_entropy_gradient(z, labels, reduction="sum")
    np.testing.assert_allclose(got, jax.nn.softmax(z) - jax.nn.one_hot(labels, 4), atol=3e-7)


def test_the_gradient_of_other_axes(rng: np.random.Generator):
    z, labels = draw_logits(rng, (2, 5, 3)), draw_labels(rng, (2, 3), 5)
    class_weights = draw_fractions(rng, (5,))
    got = softmax_cross_entropy_gradient(z, labels, axis=1, class_weights=class_weights)
    moved = softmax_cross_entropy_gradient(np.moveaxis(z, 1, -1), labels, class_weights=class_weights)
    np.testing.assert_allclose(got, np.moveaxis(moved, -1, 1), rtol=1e-6)
    auto = jax.grad(lambda z: softmax_cross_entropy(z, labels, axis=1, class_weights=class_weights))(z)
    np.testing.assert_allclose(got, auto, rtol=1e-6)


def test_the_derivative_with_respect_to_weights_and_class_weights_is_the_loss(rng: np.random.Generator):
    z, labels = draw_logits(rng, (4, 3)), np.array([0, 2, 2, -100])
    losses = softmax_cross_entropy(z, labels, reduction="none")

    def total(weights: Any, class_weights: Any) -> jax.Array:
        return softmax_cross_entropy(z, labels, weights=weights, class_weights=class_weights, reduction="sum")

    for weight in (1.0, 0.0):
        weights = np.full(4, weight, np.float32)
        by_row, by_class = jax.grad(total, argnums=(0, 1))(weights, np.ones(3, np.float32))
        np.testing.assert_allclose(by_row, losses, rtol=1e-6)
        expected = np.array([losses[0], 0.0, losses[1] + losses[2]]) * weight
        np.testing.assert_allclose(by_class, expected, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Tiny losses: value, gradient and curvature keep their relative accuracy

# The label comes first and dominates; differences from it are exact. exp(-86) is a normal float32.
TINY = {
    "1e-9": [0.0, -20.0, -25.0],
    "1e-18": [0.0, -41.0, -42.0],
    "shifted": [-40.0, -81.0, -82.0],
    "1e-35": [0.0, -80.0, -81.0],
    "1e-38": [0.0, -86.0, -86.5],
    "deleted": [3.0, -np.inf, -38.0],
    "single": [0.0, -np.inf, -np.inf],
}


@pytest.mark.parametrize("count", [3, 300])
@pytest.mark.parametrize("one_hot", [False, True])
def test_tiny_losses(count: int, one_hot: bool):
    target = np.eye(count, dtype=np.float32)[0] if one_hot else np.array(0)

    def loss(z: Any) -> jax.Array:
        return softmax_cross_entropy(z, target)

    def closed(z: Any) -> jax.Array:
        return softmax_cross_entropy_gradient(z, target)

    @jax.jit
    def ways(z: jax.Array) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        column = (jnp.eye(count)[0],)
        return (
            loss(z),
            [closed(z), jax.grad(loss)(z), jax.jacfwd(loss)(z)],
            [jax.jvp(f, (z,), column)[1] for f in (jax.grad(loss), closed)],
        )

    place = np.array([0, count // 2, count - 1])
    for name, row in TINY.items():
        z = np.full(count, -np.inf, np.float32)
        z[place] = row
        want = oracles.softmax_cross_entropy(z[place], np.array(0))
        value, gradients, columns = ways(z)
        assert_close(value, want.mean, ulp=4, dtype=np.float32, where=name)
        for got in gradients:
            assert_close(got[place], want.gradient, ulp=5, dtype=np.float32, where=name)
        for got in columns:
            assert_close(got[place], want.hessian[0], ulp=6, dtype=np.float32, where=name)


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("one_hot", [False, True])
def test_tiny_losses_in_float64(one_hot: bool):
    target = np.array([1.0, 0.0, 0.0]) if one_hot else np.array(0)

    @jax.jit
    def ways(z: jax.Array) -> tuple[jax.Array, ...]:
        value, gradient = jax.value_and_grad(softmax_cross_entropy)(z, target)
        hessian = jnp.diagonal(jax.hessian(softmax_cross_entropy)(z, target))
        return value, gradient, softmax_cross_entropy_gradient(z, target), hessian

    for z in ([0.0, -41.0, -42.0], [0.0, -400.0, -401.0], [100.0, -600.0, -601.0]):
        row = np.array(z)
        want = oracles.softmax_cross_entropy(row, np.array(0), digits=700)
        expected = want.mean, want.gradient, want.gradient, np.diagonal(want.hessian)
        for got, exact, ulp in zip(ways(row), expected, (4, 4, 4, 6), strict=True):
            assert_close(got, exact, ulp=ulp, dtype=np.float64, where=z)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_tiny_loss_of_half_precision_logits(dtype: str):
    kind = DTYPES[dtype][0]
    row = np.array([0.0, -8.0, -9.0], kind)
    want = oracles.softmax_cross_entropy(row, np.array(0))
    assert_close(softmax_cross_entropy(row, np.array(0)), want.mean, ulp=4, dtype=np.float32)
    assert_close(jax.grad(softmax_cross_entropy)(row, np.array(0)), want.gradient, ulp=0.51, dtype=kind)


def test_the_gradient_of_shifted_logits(rng: np.random.Generator):
    unshifted, labels = draw_logits(rng, (5, 4)), draw_labels(rng, (5,), 4)
    ways = jax.grad(softmax_cross_entropy), jax.jit(jax.jacfwd(softmax_cross_entropy)), softmax_cross_entropy_gradient
    for shift in (0.0, -50.0, 1e4, -1e4, 1e30, -1e30):
        z = unshifted + np.float32(shift)
        want = oracle(z, {"targets": labels})
        for gradient in ways:
            assert_close(gradient(z, labels), want.gradient / 5, ulp=6, dtype=np.float32, where=shift)


@pytest.mark.grid
@pytest.mark.parametrize("count", [256, 2049, 32769])
def test_the_gradient_of_long_rows_three_ways(count: int, rng: np.random.Generator):
    z, labels = draw_logits(rng, (3, count)), draw_labels(rng, (3,), count)
    want = np.stack([oracles.long_row_nll(z[n], labels[n])[1] for n in range(3)])
    direction = draw_logits(rng, (3, count))

    def loss(z: Any) -> jax.Array:
        return softmax_cross_entropy(z, labels, reduction="sum")

    ulp = 6 + np.log2(count) / 2
    assert_close(jax.jit(jax.grad(loss))(z), want, ulp=ulp, dtype=np.float32)
    assert_close(softmax_cross_entropy_gradient(z, labels, reduction="sum"), want, ulp=ulp, dtype=np.float32)
    forward = jax.jit(lambda z: jax.jvp(loss, (z,), (jnp.asarray(direction),))[1])(z)
    np.testing.assert_allclose(forward, np.sum(want * direction), rtol=1e-5, atol=1e-4)
    product = jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (jnp.asarray(direction),))[1])(z)
    p = want.copy()
    p[np.arange(3), labels] += 1
    exact = p * (direction - np.sum(p * direction, axis=-1, keepdims=True))
    np.testing.assert_allclose(product, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.grid
def test_tiny_hessians():
    @jax.jit
    def ways(z: jax.Array, label: jax.Array) -> list[jax.Array]:
        losses = (
            lambda z: softmax_cross_entropy(z, label),
            lambda z: softmax_cross_entropy(z, jax.nn.one_hot(label, 3)),
        )
        return [f(z) for loss in losses for f in (jax.jacfwd(jax.grad(loss)), jax.jacrev(jax.jacrev(loss)))]

    for z, label in itertools.product(([0.0, -20.0, -25.0], [3.0, 0.0, -41.0]), range(3)):
        e = np.exp(np.array(z) - z[0])
        p, others = e / e.sum(), np.array([e[1] + e[2], e[0] + e[2], e[0] + e[1]]) / e.sum()
        want = np.where(np.eye(3) == 1, p * others, -p[:, None] * p[None, :])
        for got in ways(jnp.array(z), label):
            # exp(-nll) is the label's probability, and half an ulp of an nll of 44 is 16 of a number near one.
            assert_close(got, want, ulp=16, dtype=np.float32, where=(z, label))


@pytest.mark.parametrize("z", [[0.0, -20.0, -25.0], [-24.0, 0.0, -23.0]])
def test_the_hessian_of_a_tiny_entropy(z: list[float]):
    # From dH/dz_k = -p_k (log p_k + H), and d log p_k / dz_j = [k = j] - p_j.
    x = np.array(z) - max(z)
    with mpmath.workdps(60):
        e = [mpmath.exp(v) for v in x]
        p = [v / sum(e) for v in e]
        log_p = [mpmath.log(v) for v in p]
        h = -sum(a * b for a, b in zip(p, log_p, strict=True))
        slope = [-a * (b + h) for a, b in zip(p, log_p, strict=True)]
        want = [
            [slope[k] * ((k == j) - p[j]) - p[k] * ((k == j) - p[j] + slope[j]) for j in range(3)] for k in range(3)
        ]
        want = np.array(want, dtype=np.float64)
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        assert_close(jax.jit(hessian(entropy_with_logits))(jnp.array(z)), want, ulp=4, dtype=np.float32)


@pytest.mark.grid
def test_smoothing_over_a_class_that_nearly_everything_falls_in():
    # Logits (0, -20), label 1 of weight 0: what is left is 0.25 / 2 of -log p_0 = log1p(exp(-20)).
    options: dict[str, Any] = {"class_weights": jnp.array([1.0, 0.0]), "label_smoothing": 0.25, "reduction": "sum"}
    logits, label, want = jnp.array([0.0, -20.0]), jnp.array(1), 0.125 * np.log1p(np.exp(-20.0))
    assert_close(softmax_cross_entropy(logits, label, **options), want, ulp=2, dtype=np.float32)
    slope = 0.125 * np.exp(-20.0) / (1 + np.exp(-20.0))
    for gradient in (softmax_cross_entropy_gradient, jax.grad(softmax_cross_entropy)):
        assert_close(gradient(logits, label, **options), np.array([-slope, slope]), ulp=4, dtype=np.float32)
