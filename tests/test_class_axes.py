"""Softmax losses over several class axes equal those over the flat classes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import covering, draw_logits, draw_probabilities, softmax_cross_entropy, softmax_cross_entropy_gradient
from jax.experimental import checkify

import jaxent
from jaxent._mesh.class_axis import ClassAxis

AXES = (2, 0)
SHAPE, COUNT = (2, 5, 3), 6


def spread(flat: Any) -> Any:
    """`(5, 6)` with the classes on axes 0 and 2."""
    return np.moveaxis(np.asarray(flat).reshape(5, 2, 3), 0, 1)


def options(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    labels = rng.integers(0, COUNT, size=5)
    sparse = jaxent.SparseTargets(rng.integers(0, COUNT, size=(5, 2)), np.full((5, 2), 0.5, np.float32))
    return {
        "labels": {"targets": labels},
        "rows": {"targets": np.where(labels < 2, -100, labels), "where": labels > 0, "weights": labels / 4},
        "all": {"targets": labels, "class_weights": rng.random(COUNT), "label_smoothing": 0.25, "z_loss": 0.5},
        "probabilities": {"targets": draw_probabilities(rng, (5, COUNT)), "class_weights": rng.random(COUNT)},
        "sparse": {"targets": sparse},
    }


@pytest.mark.parametrize(
    ("name", "reduction"), covering(["labels", "rows", "all", "probabilities", "sparse"], ["mean", "none"])
)
def test_several_axes_are_one_flat_axis(name: str, reduction: str, rng: np.random.Generator):
    z, given = draw_logits(rng, (5, COUNT)), options(rng)[name]
    given = {k: v.astype(np.float32) if getattr(v, "dtype", None) == np.float64 else v for k, v in given.items()}
    moved = dict(given)
    if name == "probabilities":
        moved["targets"] = spread(given["targets"])
    if "class_weights" in given:
        moved["class_weights"] = given["class_weights"].reshape(2, 3)
    flat, several = ({"reduction": reduction, **x} for x in (given, {**moved, "axis": AXES}))
    np.testing.assert_array_equal(softmax_cross_entropy(spread(z), **several), softmax_cross_entropy(z, **flat))
    want = spread(softmax_cross_entropy_gradient(z, **flat))
    np.testing.assert_array_equal(softmax_cross_entropy_gradient(spread(z), **several), want)
    if reduction == "mean":
        got = jax.grad(lambda z: softmax_cross_entropy(z, **several))(spread(z))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_one_axis_in_a_tuple(rng: np.random.Generator):
    z, y = draw_logits(rng, (4, 6)), rng.integers(0, 4, size=6)
    np.testing.assert_array_equal(softmax_cross_entropy(z, y, axis=(0,)), softmax_cross_entropy(z, y, axis=0))
    got = softmax_cross_entropy_gradient(z, y, axis=(0,))
    np.testing.assert_array_equal(got, softmax_cross_entropy_gradient(z, y, axis=0))


BAD = {
    "twice": ({"axis": (0, -3)}, ValueError, "`axis` must name at least one axis, and none twice"),
    "none": ({"axis": ()}, ValueError, "`axis` must name at least one axis"),
    "out of range": ({"axis": (0, 3)}, ValueError, r"`axis` must lie in \[-3, 3\)"),
    "float": ({"axis": (0, 1.0)}, TypeError, "`axis` must be an int"),
    "class weights": (
        {"axis": AXES, "class_weights": np.ones(6)},
        ValueError,
        r"`class_weights` must have shape \(2, 3\)",
    ),
    "split": ({"axis": AXES, "vocab_axis": "v"}, ValueError, "`vocab_axis` must go with one class axis"),
    "rows": ({"axis": AXES, "where": np.ones((2, 5), bool)}, ValueError, r"`where` must have shape \(5,\)"),
}


@pytest.mark.parametrize("loss", [softmax_cross_entropy, softmax_cross_entropy_gradient])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, loss: Any):
    given, error, match = BAD[name]
    with pytest.raises(error, match=f"jaxent.{loss.__name__}: {match}"):
        loss(np.zeros(SHAPE, np.float32), np.zeros(5, np.int32), **given)


@pytest.mark.grid
def test_checks_read_several_axes():
    z = np.zeros(SHAPE, np.float32)
    z[:, 3] = np.nan
    labels = np.array([0, 5, 6, 1, 2])
    found = {finding.kind: finding for finding in jaxent.diagnose(z, labels, axis=AXES)}
    assert found["labels_out_of_range"].first == (2,)
    assert "not_finite" in found
    error, _ = checkify.checkify(jax.jit(functools.partial(jaxent.checked(softmax_cross_entropy), axis=AXES)))(
        z, labels
    )
    assert "label" in (error.get() or "")


MEASURES = {
    "generalized_jensen_shannon_divergence": (jaxent.generalized_jensen_shannon_divergence, 1),
    "total_variation_distance": (jaxent.total_variation_distance, 2),
    "hellinger_distance": (jaxent.hellinger_distance, 2),
}


@pytest.mark.parametrize("name", MEASURES)
def test_checks_read_the_new_measures(name: str):
    measure, operands = MEASURES[name]
    counts = np.full((2, 3), 4, np.float32)
    error, _ = checkify.checkify(jax.jit(jaxent.checked(measure)))(*[counts] * operands)
    assert "counts / counts.sum()" in (error.get() or "")


def test_the_entry_at_a_label_outside_the_classes_is_0():
    """As it is where the entry is found by comparison."""
    x, labels = np.arange(1, 7, dtype=np.float32).reshape(2, 3), np.array([[-2], [3]], np.int32)
    np.testing.assert_array_equal(ClassAxis().take(jnp.asarray(x), jnp.asarray(labels)), np.zeros((2, 1)))
