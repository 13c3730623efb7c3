"""`check_gradient` where a loss has a kink, a pole, an edge or is nan: it compares what can be compared."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw_logits, softmax_cross_entropy
from gradient_reports import cubes, of, with_gradient

import jaxent
from jaxent import check_gradient
from jaxent._check.gradient import DIFFERENCES


def test_kinks_poles_and_what_is_removed(rng: np.random.Generator):
    x = np.array([0.0, 1e-9, -1e-4, 2.0], np.float32)
    assert check_gradient(lambda x: jnp.sum(jax.nn.relu(x)), x).ok
    p = np.array([1e-7, 0.25, 0.75], np.float32)
    assert check_gradient(jaxent.entropy, p).ok
    z = draw_logits(rng, (3, 4))
    z[0, 1], z[2] = -np.inf, np.nan
    assert check_gradient(softmax_cross_entropy, z, np.array([0, 1, -100]), tolerance=6).ok
    assert check_gradient(softmax_cross_entropy, z, np.array([0, 9, 0]), tolerance=6).ok  # nan, as it should be


def test_a_gradient_of_nan_where_there_is_one():
    report = check_gradient(lambda x: jnp.sum(jnp.sqrt(x**4)), np.array([1.0, 0.0], np.float32))
    # Forward mode adds the other entry's 0 * nan.
    bad = [(c.way, c.place) for c in report.comparisons if not c.ok]
    assert bad == [("jax.jvp", "args[0][0]"), (DIFFERENCES, "args[0][1]")]
    assert not check_gradient(cubes, np.array([1.0]), oracle=np.array([np.nan])).ok


def test_nothing_compared_is_not_ok():
    # No difference where the loss is nan everywhere, and float64 is out of reach.
    narrow = jnp.full(2, jnp.nan, jnp.float32)
    report = check_gradient(lambda x: cubes(x * narrow), np.array([1.0, 2.0], np.float32))
    assert not report.compared
    assert not report.ok
    assert "NOTHING COMPARED" in str(report)
    with pytest.raises(ValueError, match=r"GradientReport.worst: nothing was compared: not callable in float64"):
        _ = report.worst
    with pytest.raises(ValueError, match=r"check_gradient: `args` must hold at least one floating entry"):
        check_gradient(cubes, np.zeros(0, np.float32))


@pytest.mark.parametrize("loss", [lambda x: jnp.sum(x) * jnp.nan, lambda x: jnp.sum(jnp.log(-jnp.abs(x) - 1))])
def test_a_nan_loss_supports_no_gradient(loss: Callable[[Any], Any]):
    report = check_gradient(loss, np.array([1.0, 2.0], np.float32))
    assert not report.ok
    assert "NOTHING COMPARED" in str(report)


def roots(x: Any) -> jax.Array:
    return jnp.sum(jnp.sqrt(x) ** 3)


EDGES = {
    "edge": (roots, lambda x: 1.5 * jnp.sqrt(x), np.array([0.0, 0.5, 0.75], np.float32)),
    "many at the edge": (roots, lambda x: 1.5 * jnp.sqrt(x), np.tile([0.0, 0.5, 0.25], 500).astype(np.float32)),
    "nan": (cubes, lambda x: 3 * x**2, np.array([0.5, np.nan, -2.0], np.float32)),
    "inf": (cubes, lambda x: 3 * x**2, np.array([np.inf, 0.5, -2.0], np.float32)),
    "unused nan": (
        lambda x: cubes(jnp.where(jnp.isnan(x), 0, x)),
        lambda x: jnp.where(jnp.isnan(x), 0, 3 * x**2),
        np.array([0.5, np.nan, -2.0], np.float32),
    ),
    "infinite loss": (
        lambda x: -jnp.sum(jnp.log(x)),
        lambda x: -1 / x,
        np.array([0.5, 0.0, 0.25], np.float32),
    ),
}


@pytest.mark.parametrize("case", EDGES)
def test_what_can_be_compared_is_compared(case: str):
    """An entry at the edge of the domain, or an input of nan, hides no wrong rule of the others."""
    loss, gradient, x = EDGES[case]
    right = check_gradient(with_gradient(loss, gradient), x)
    assert right.ok, str(right)
    assert of(right, DIFFERENCES)
    assert len(right.notes) == 1 or case == "infinite loss"
    wrong = check_gradient(with_gradient(loss, lambda x: 1.01 * gradient(x)), x)
    assert not wrong.ok
    assert wrong.worst.way == DIFFERENCES
    assert wrong.notes[-1].startswith("The derivative rule is wrong")


def test_distributions_at_the_edge_of_the_simplex():
    p, q = np.array([0.0, 0.0, 1.0], np.float32), np.array([0.3, 0.3, 0.4], np.float32)
    report = check_gradient(jaxent.cross_entropy, p, q)
    assert report.ok, str(report)
    assert {(c.way, c.argument) for c in report.comparisons} >= {
        (way, argument) for way in ("jax.grad", "jax.jvp", DIFFERENCES) for argument in ("args[0]", "args[1]")
    }
    assert "no central differences for 2 of 6 entries" in report.notes[0]
