"""Statistics of rows of logits, and their derivatives, against the oracles."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import draw_labels, draw_logits, token_statistics
from oracles import assert_close

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((5, 6), 0), ((2, 5, 3), 1), ((5,), -1), ((4, 1), -1)])
def test_token_statistics(shape: tuple[int, ...], axis: int, rng: np.random.Generator):
    z = draw_logits(rng, shape)
    last = np.moveaxis(z, axis, -1)
    labels = draw_labels(rng, last.shape[:-1], last.shape[-1])
    top_k = min(3, last.shape[-1])
    got = token_statistics(z, labels, axis=axis, top_k=top_k)
    for n in np.ndindex(labels.shape):
        want = oracles.row_statistics(last[n])
        order = np.argsort(-last[n], kind="stable")
        assert_close(got.log_prob[n], want["log_p"][labels[n]], ulp=4, dtype=np.float32)
        assert_close(got.log_normalizer[n], want["log_normalizer"], ulp=4, dtype=np.float32, size=np.abs(last[n]).max())
        assert_close(got.entropy[n], want["entropy"], ulp=8, dtype=np.float32)
        assert got.argmax[n] == np.argmax(last[n])
        assert got.rank[n] == np.sum(last[n] > last[n][labels[n]])
        np.testing.assert_array_equal(got.top_classes[n], order[:top_k])
        assert_close(got.top_log_probs[n], want["log_p"][order[:top_k]], ulp=4, dtype=np.float32)


def test_token_statistics_without_labels():
    got = token_statistics(np.zeros((2, 3), np.float32))
    assert got.log_prob is None
    assert got.rank is None
    assert got.top_classes is None
    assert got.top_log_probs is None


def test_ties_go_to_the_first_class():
    got = token_statistics(np.array([[1.0, 3.0, 3.0, 0.0, 3.0]], np.float32), np.array([2]), top_k=4)
    assert got.argmax[0] == 1
    assert got.rank[0] == 0
    np.testing.assert_array_equal(got.top_classes, [[1, 2, 4, 0]])


@functools.cache
def derivatives_of_a_row(derivative: Any) -> Any:
    """Of the log-normaliser, the entropy, and the log-probability of each label."""
    return jax.jit(
        lambda z: (
            derivative(lambda z: token_statistics(z).log_normalizer)(z),
            derivative(lambda z: token_statistics(z).entropy)(z),
            jax.vmap(lambda y: derivative(lambda z: token_statistics(z, y).log_prob)(z))(jnp.arange(z.size)),
        )
    )


@pytest.mark.grid
@pytest.mark.parametrize(
    "z",
    [
        *([0.0, -20.0, -25.0], [0.0, -41.0, -42.0], [0.0, -80.0, -81.0], [-85.0, 0.0, -82.0]),
        *([0.0, -np.inf, -41.0], [3.0, 3.0, -np.inf], [1.0, 2.0, 3.0], [0.5]),
    ],
)
def test_statistics_and_derivatives_of_a_row(z: list[float]):
    row = np.array(z, np.float32)
    want = oracles.row_statistics(row)
    assert_close(token_statistics(row).entropy, want["entropy"], ulp=4, dtype=np.float32)
    for derivative in (jax.grad, jax.jacfwd):
        normalizer, entropy, log_probs = derivatives_of_a_row(derivative)(row)
        assert_close(normalizer, want["p"], ulp=4, dtype=np.float32)
        # The entry of the maximum is (its probability) * (a difference): the two largest terms cancel.
        assert_close(entropy, want["entropy_gradient"], ulp=8, dtype=np.float32)
        for label, slope in enumerate(log_probs):
            nll = oracles.softmax_cross_entropy(row[None], np.array([label]))
            assert_close(slope, -nll.gradient[0], ulp=4, dtype=np.float32)


def test_statistics_at_the_edges():
    inf, nan = np.inf, np.nan
    z = np.array([[0, 1, nan], [0, inf, 0], [-inf, -inf, -inf], [0, 0, 0], [0, -inf, 0]], np.float32)
    got = token_statistics(z, np.array([0, 0, 0, 7, 1]), top_k=2)
    np.testing.assert_array_equal(got.log_prob, [nan, nan, nan, nan, -inf])
    np.testing.assert_array_equal(np.isnan(got.log_normalizer), [True, True, True, False, False])
    np.testing.assert_array_equal(np.isnan(got.entropy), [True, True, True, False, False])
    np.testing.assert_array_equal(got.argmax, [-1, -1, -1, 0, 0])
    np.testing.assert_array_equal(got.rank, [-1, -1, -1, -1, 2])
    np.testing.assert_array_equal(got.top_classes, [[-1, -1]] * 3 + [[0, 1], [0, 2]])
    np.testing.assert_array_equal(np.isnan(got.top_log_probs), [[True] * 2] * 3 + [[False] * 2] * 2)
    for dtype in (np.int8, np.int32):
        got = token_statistics(z, np.full(5, -1, dtype), top_k=2)
        assert np.isnan(got.log_prob[3])
        assert got.rank[3] == -1
