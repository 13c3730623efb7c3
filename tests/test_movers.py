"""Every classification loss of `optax.losses` that jaxent covers, in one line: equal, and right where optax is not.

The lines are those of the README's table.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.nn import log_softmax
from oracles import assert_close

import jaxent
from jaxent import kl_divergence, kl_divergence_with_logits

softmax_cross_entropy: Any = jaxent.softmax_cross_entropy
sigmoid_cross_entropy: Any = jaxent.sigmoid_cross_entropy


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Let optax promote types and ranks implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


Z = np.array([[0.5, -1.0, 2.0], [-3.0, 0.25, 0.0], [1.5, 1.5, -0.5], [4.0, 0.0, -4.0]], np.float32)
LABELS = np.array([2, 0, 1, 0])
ONEHOT = np.eye(3, dtype=np.float32)[LABELS]
P = np.array([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.25, 0.5, 0.25], [0.375, 0.5, 0.125]], np.float32)
FLAGS = (Z > 0).astype(np.float32)
MEASURE = 2 * P[::-1] + np.float32(0.125)  # does not sum to one
LOSSES = optax.losses

# optax, jaxent; both functions of logits and one value for each row or entry
LINES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "softmax_cross_entropy": (
        lambda z: LOSSES.softmax_cross_entropy(z, P),
        lambda z: softmax_cross_entropy(z, P, reduction="none"),
    ),
    "softmax_cross_entropy_with_integer_labels": (
        lambda z: LOSSES.softmax_cross_entropy_with_integer_labels(z, LABELS),
        lambda z: softmax_cross_entropy(z, LABELS, reduction="none"),
    ),
    "safe_softmax_cross_entropy": (
        lambda z: LOSSES.safe_softmax_cross_entropy(z, P),
        lambda z: softmax_cross_entropy(z, P, reduction="none"),
    ),
    "smooth_labels": (
        lambda z: LOSSES.softmax_cross_entropy(z, LOSSES.smooth_labels(ONEHOT, 0.125)),
        lambda z: softmax_cross_entropy(z, LABELS, label_smoothing=0.125, reduction="none"),
    ),
    "sigmoid_binary_cross_entropy": (
        lambda z: LOSSES.sigmoid_binary_cross_entropy(z, P),
        lambda z: sigmoid_cross_entropy(z, P, reduction="none"),
    ),
    "sigmoid_focal_loss": (
        lambda z: LOSSES.sigmoid_focal_loss(z, FLAGS, gamma=2.0),
        lambda z: (ce := sigmoid_cross_entropy(z, FLAGS, reduction="none")) * (-jnp.expm1(-ce)) ** 2.0,
    ),
    "poly_loss_cross_entropy": (
        lambda z: LOSSES.poly_loss_cross_entropy(z, ONEHOT, epsilon=2.0),
        lambda z: (ce := softmax_cross_entropy(z, LABELS, reduction="none")) - 2.0 * jnp.expm1(-ce),
    ),
    "kl_divergence": (
        lambda z: LOSSES.kl_divergence(log_softmax(z), P),
        lambda z: kl_divergence_with_logits(jnp.log(P), log_softmax(z)),
    ),
    "kl_divergence_with_log_targets": (
        lambda z: LOSSES.kl_divergence_with_log_targets(log_softmax(z), np.log(P)),
        lambda z: kl_divergence_with_logits(np.log(P), log_softmax(z)),
    ),
    "generalized_kl_divergence": (
        lambda z: LOSSES.generalized_kl_divergence(z, MEASURE),
        lambda z: kl_divergence(MEASURE, jnp.exp(z)),
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_the_line_is_equal(name: str):
    def weighted(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda z: (jnp.sum((value := f(z)) * jnp.arange(1, value.size + 1.0).reshape(value.shape)), value)

    both = [jax.value_and_grad(weighted(f), has_aux=True) for f in LINES[name]]
    with lenient():
        (_, want), want_gradient = jax.jit(both[0])(Z)
    (_, got), gradient = jax.jit(both[1])(Z)
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=2e-7)
    np.testing.assert_allclose(gradient, want_gradient, rtol=4e-6, atol=4e-6)


def test_the_readme_has_the_lines():
    text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    table = text.split("### From optax and flax")[1].split("\n## ")[0]
    for name in LINES:
        assert f"{name}(" in table, name


def test_labels_outside_the_classes():
    # optax trains the last class for -1, and for -100 class V - 100, if there are that many; at V the loss is nan.
    z, labels = np.zeros((4, 200), np.float32), np.array([-1, -100, 200, 3])
    with lenient():
        theirs = LOSSES.softmax_cross_entropy_with_integer_labels(z, labels)
    assert np.all(np.isfinite(theirs[:2]))
    ours = softmax_cross_entropy(z, labels, reduction="none")
    np.testing.assert_array_equal(np.isnan(ours), [True, False, True, False])
    assert ours[1] == 0  # -100 is ignored


def test_a_removed_class():
    z = np.array([0.0, -np.inf, 1.0], np.float32)
    target = np.array([1.0, 0.0, 0.0], np.float32)
    with lenient():
        assert np.isnan(LOSSES.softmax_cross_entropy(z, target))
        assert np.all(np.isnan(jax.jacfwd(LOSSES.safe_softmax_cross_entropy)(z, target)))
    assert_close(softmax_cross_entropy(z, target), np.log1p(np.e), ulp=4, dtype=np.float32)
    p = 1 / (1 + np.exp(1))
    assert_close(jax.jacfwd(softmax_cross_entropy)(z, target), [p - 1, 0, 1 - p], ulp=4, dtype=np.float32)


def test_a_certain_binary_logit():
    with lenient():
        assert np.isnan(LOSSES.sigmoid_binary_cross_entropy(np.float32(np.inf), np.float32(1)))
    assert sigmoid_cross_entropy(np.float32(np.inf), np.float32(1)) == 0


def test_a_loss_below_the_resolution_of_one():
    z = np.array([0.0, -20.0, -25.0], np.float32)
    with lenient():
        assert LOSSES.softmax_cross_entropy_with_integer_labels(z, 0) == 0
    assert_close(softmax_cross_entropy(z, 0), np.log1p(np.exp(-20) + np.exp(-25)), ulp=4, dtype=np.float32)


def test_a_divergence_from_a_target_with_a_zero():
    log_q, p = np.log(np.array([0.25, 0.25, 0.5], np.float32)), np.array([0.5, 0.0, 0.5], np.float32)
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    with lenient():
        assert np.isnan(LOSSES.kl_divergence_with_log_targets(log_q, log_p))
        assert np.isnan(jax.grad(LOSSES.kl_divergence, 1)(log_q, p)[1])
    assert_close(kl_divergence_with_logits(log_p, log_q), np.log(2) / 2, ulp=4, dtype=np.float32)
    assert np.all(np.isfinite(jax.grad(kl_divergence)(jnp.asarray(p), jnp.exp(log_q))))


def test_a_divergence_of_nearly_equal_distributions():
    # The sum of terms of both signs is rounding; here 1000 classes, where the divergence is 5e-9.
    q = np.full(1000, 1e-3)
    p = q * (1 + 1e-4 * np.tile([1, -1], 500))
    p, q = p.astype(np.float32), q.astype(np.float32)
    exact_p, exact_q = p.astype(np.float64), q.astype(np.float64)
    exact = np.sum(exact_p * np.log(exact_p / exact_q) + exact_q - exact_p)
    with lenient():
        theirs = LOSSES.kl_divergence(jnp.log(q), p)
    assert abs(theirs - exact) > exact
    assert_close(kl_divergence(p, q), exact, ulp=64, dtype=np.float32)
