"""The Brier score: against its formula and scikit-learn, its edges, its derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from cases import draw_labels, draw_probabilities
from measures import f32

import jaxent

brier_score: Any = jaxent.brier_score


def test_values(rng: np.random.Generator):
    p, labels = draw_probabilities(rng, (6, 4, 5)), draw_labels(rng, (6, 4), 5)
    weights, where = f32(rng.integers(0, 4, size=(6, 4))), rng.random((6, 4)) < 0.7
    one_hot = np.eye(5)[labels]
    rows = np.sum((p - one_hot) ** 2, axis=-1)
    for targets in (labels, f32(one_hot), labels.astype(np.int8)):
        for reduction, want in (("none", rows), ("mean", rows.mean()), ("sum", rows.sum())):
            np.testing.assert_allclose(brier_score(p, targets, reduction=reduction), want, rtol=1e-6)
        options = {"where": where, "weights": weights}
        summed = brier_score(p, targets, **options, reduction="sum_and_weight")
        np.testing.assert_allclose(summed.total, np.sum(rows * weights * where), rtol=1e-6)
        np.testing.assert_allclose(summed.weight, np.sum(weights * where), rtol=1e-6)
        np.testing.assert_allclose(brier_score(p, targets, **options), summed.mean(), rtol=1e-6)
    mixed = draw_probabilities(rng, (6, 4, 5))
    np.testing.assert_allclose(brier_score(p, mixed), np.mean(np.sum((p - mixed) ** 2, axis=-1)), rtol=1e-6)
    assert brier_score(p.astype(np.float16), labels).dtype == np.float32


def test_two_classes_are_twice_those_of_scikit_learn(rng: np.random.Generator):
    q, labels, weights = f32(rng.random(50)), rng.integers(0, 2, size=50), f32(rng.random(50))
    want = 2 * sklearn.metrics.brier_score_loss(labels, q, sample_weight=weights)
    np.testing.assert_allclose(brier_score(np.stack([1 - q, q], -1), labels, weights=weights), want, rtol=1e-5)


def test_axes(rng: np.random.Generator):
    p, labels = draw_probabilities(rng, (4, 6)), draw_labels(rng, (4,), 6)
    rows = np.asarray(brier_score(p, labels, reduction="none"))
    np.testing.assert_array_equal(brier_score(p.T, labels, axis=0, reduction="none"), rows)
    spread = np.moveaxis(p.reshape(4, 2, 3), 0, 1)
    np.testing.assert_allclose(brier_score(spread, labels, axis=(0, 2), reduction="none"), rows, rtol=1e-6)
    one_hot = np.moveaxis(np.eye(6, dtype=np.float32)[labels].reshape(4, 2, 3), 0, 1)
    np.testing.assert_allclose(brier_score(spread, one_hot, axis=(-1, 0), reduction="none"), rows, rtol=1e-6)


@pytest.mark.grid
def test_rows_that_do_not_count():
    p, nothing = f32([[0.5, 0.5], [np.nan, -1]]), f32([1, 0])
    labels = np.array([0, 7])
    for options in ({"where": nothing > 0}, {"weights": nothing}):
        value, gradient = jax.value_and_grad(lambda p, options=options: brier_score(p, labels, **options))(p)
        assert value == 0.5
        np.testing.assert_array_equal(gradient, [[-1, 1], [0, 0]])
    assert brier_score(p, labels, where=np.zeros(2, bool)) == 0
    assert brier_score(np.zeros((0, 3), np.float32), np.zeros(0, np.int32)) == 0
    # The derivative with respect to a weight of 0 is that of any other.
    good = f32([[0.5, 0.5], [0.25, 0.75]])
    slope = jax.grad(lambda w: brier_score(good, np.array([0, 0]), weights=w))(nothing)
    np.testing.assert_allclose(slope, [0, 0.625], rtol=1e-6)


def test_ignored_labels_and_sparse_targets():
    p, labels = f32([[0.5, 0.25, 0.25], [np.nan, 0, 1], [0, 1, 0]]), np.array([0, -100, 2])
    value, gradient = jax.value_and_grad(lambda p: brier_score(p, labels))(p)
    np.testing.assert_allclose(value, (0.375 + 2) / 2)
    np.testing.assert_array_equal(gradient[1], 0)
    assert brier_score(p, labels, ignore_index=2) != value
    assert jnp.isnan(brier_score(p[:1], labels[1:2], ignore_index=None))
    shares = f32([[0.75, 0.25], [1, 1], [1, 0.5]])
    mixed = jaxent.SparseTargets(np.array([[0, 2], [-100, -100], [1, -100]]), shares)
    got = brier_score(p, mixed, reduction="none")
    np.testing.assert_allclose(got, [0.0625 + 0.0625, 0, 0], rtol=1e-6)
    assert brier_score(p, mixed, reduction="sum_and_weight").weight == 2
    assert jnp.isnan(brier_score(p[:1], jaxent.SparseTargets(np.array([[0, 3]]), shares[:1])))


@pytest.mark.parametrize("targets", [np.array([2]), np.array([-1]), f32([[np.nan, 1]])])
def test_invalid_targets_give_nan(targets: Any):
    assert jnp.isnan(brier_score(f32([[0.5, 0.5]]), targets))
    assert jnp.isnan(brier_score(f32([[-0.5, 1.5]]), np.array([0])))


BAD = {
    "counts": (
        ([[3, 5]], [0]),
        {},
        TypeError,
        r"brier_score: `probabilities` must have a floating dtype .*sum\(\)`\), got int",
    ),
    "a scalar": ((0.5, 1), {}, ValueError, r"`probabilities` must have a class axis at -1, got float"),
    "bools": ((f32([[1, 0]]), np.array([True])), {}, TypeError, r"`targets` must have an integer dtype, got bool"),
    "labels": ((f32([[1, 0]]), np.array([0, 1])), {}, ValueError, r"`targets` must have shape \(1,\)"),
    "shape": ((f32([[1, 0]]), f32([[1, 0, 0]])), {}, ValueError, r"`targets` must have shape \(1, 2\)"),
    "where": ((f32([[1, 0]]), [0]), {"where": [[True, False]]}, ValueError, r"`where` must have shape \(1,\)"),
    "reduction": ((f32([[1, 0]]), [0]), {"reduction": "max"}, ValueError, r"brier_score: `reduction` must be 'mean'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    arguments, options, error, match = BAD[name]
    with pytest.raises(error, match=match):
        brier_score(*arguments, **options)
