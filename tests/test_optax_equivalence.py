"""Every classification loss of `optax.losses` that jaxent covers, in one line: equal, and right where optax is not.

The lines are those of the table in `docs/optax_flax.md`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import covering
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

PAGE = Path(__file__).parents[1].joinpath("docs", "optax_flax.md").read_text(encoding="utf-8")
TABLE = PAGE.split("\n## ")[0]


def line_of(call: str) -> str:
    """The page's line for a call of `optax.losses`, which must be the first of its row."""
    (row,) = [row for row in TABLE.splitlines() if row.startswith(f"| `{call}")]
    return row.split(" | ")[-1].removesuffix(" |").strip("`")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A line of the table as a function of `argument`, for the other `names` in it."""

    line: str
    names: dict[str, Any]
    optax: Callable[..., Any]
    argument: str = "z"

    def __call__(self, x: Any, **names: Any) -> jax.Array:
        return eval(self.line, {**vars(jaxent), "jnp": jnp, **self.names, **names, self.argument: x})


LOSSES = optax.losses
RECIPES: dict[str, Recipe] = {
    "softmax_cross_entropy": Recipe(
        line_of("softmax_cross_entropy(z, p)`, `safe_softmax_cross_entropy"),
        {"p": P},
        lambda z, p: LOSSES.safe_softmax_cross_entropy(z, p),
    ),
    "softmax_cross_entropy_with_integer_labels": Recipe(
        line_of("softmax_cross_entropy_with_integer_labels"),
        {"y": LABELS},
        lambda z, y: LOSSES.softmax_cross_entropy_with_integer_labels(z, y),
    ),
    "smooth_labels": Recipe(
        line_of("softmax_cross_entropy(z, smooth_labels"),
        {"y": LABELS, "a": 0.125},
        lambda z, y, a: LOSSES.softmax_cross_entropy(z, LOSSES.smooth_labels(np.eye(3)[y], a)),
    ),
    "sigmoid_binary_cross_entropy": Recipe(
        line_of("sigmoid_binary_cross_entropy"), {"t": P}, lambda z, t: LOSSES.sigmoid_binary_cross_entropy(z, t)
    ),
    "sigmoid_focal_loss": Recipe(
        line_of("sigmoid_focal_loss"),
        {"t": FLAGS, "g": 2.0},
        lambda z, t, g: LOSSES.sigmoid_focal_loss(z, t, gamma=g),
    ),
    "poly_loss_cross_entropy": Recipe(
        line_of("poly_loss_cross_entropy"),
        {"y": LABELS, "e": 2.0},
        lambda z, y, e: LOSSES.poly_loss_cross_entropy(z, np.eye(3)[y], epsilon=e),
    ),
    "kl_divergence": Recipe(
        line_of("kl_divergence(log_q"), {"p": P}, lambda log_q, p: LOSSES.kl_divergence(log_q, p), "log_q"
    ),
    "kl_divergence_with_log_targets": Recipe(
        line_of("kl_divergence_with_log_targets"),
        {"log_p": np.log(P)},
        lambda log_q, log_p: LOSSES.kl_divergence_with_log_targets(log_q, log_p),
        "log_q",
    ),
    "generalized_kl_divergence": Recipe(
        line_of("generalized_kl_divergence"),
        {"p": MEASURE},
        lambda log_q, p: LOSSES.generalized_kl_divergence(log_q, p),
        "log_q",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_line_is_equal(name: str):
    recipe = RECIPES[name]

    def weighted(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def total(z: Any) -> tuple[jax.Array, jax.Array]:
            z = log_softmax(z) if recipe.argument == "log_q" else z
            value = f(z)
            return jnp.sum(value * jnp.arange(1, value.size + 1.0).reshape(value.shape)), value

        return total

    both = [jax.value_and_grad(weighted(f), has_aux=True) for f in (lambda z: recipe.optax(z, **recipe.names), recipe)]
    with lenient():
        (_, want), want_gradient = jax.jit(both[0])(Z)
    (_, got), gradient = jax.jit(both[1])(Z)
    np.testing.assert_allclose(got, want, rtol=4e-6, atol=2e-7)
    np.testing.assert_allclose(gradient, want_gradient, rtol=4e-6, atol=4e-6)


def test_every_line_of_the_table_is_run():
    rows = [row for row in TABLE.split("\n\n")[1].splitlines()[2:] if row.startswith("| `")]
    assert len(rows) == len(RECIPES) == len({recipe.line + str(list(recipe.names)) for recipe in RECIPES.values()})


# Certain, and certain and wrong, by little and by much; by float64 below.
FAR = np.array([[100.0, -100.0, 0.0], [-1000.0, 1000.0, 0.0], [30.0, -30.0, -60.0], [0.0, 0.0, -300.0]], np.float32)


def exact_rows(name: str, z: np.ndarray, names: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Values and their gradients, one for each row or entry, in float64."""
    z = z.astype(np.float64)
    names = {k: np.asarray(v, np.float64 if k not in "y" else np.int64) for k, v in names.items()}
    if name.startswith("sigmoid"):
        t = names["t"]
        miss, ce = 1 / (1 + np.exp(np.clip((2 * t - 1) * z, -700, 700))), np.logaddexp(0, z) - t * z
        if name == "sigmoid_binary_cross_entropy":
            return ce, 1 / (1 + np.exp(np.clip(-z, -700, 700))) - t
        ce, g = np.logaddexp(0, (1 - 2 * t) * z), names["g"]
        return ce * miss**g, (1 - 2 * t) * (miss + g * (1 - miss) * ce) * miss**g
    if name == "generalized_kl_divergence":
        p = names["p"]
        return np.sum(p * (np.log(p) - z) - p + np.exp(z), -1), np.exp(z) - p
    log_q = z - np.logaddexp.reduce(z, -1, keepdims=True)
    if "y" in names:
        p = np.eye(3)[names["y"]]
        p = p if name != "smooth_labels" else (1 - names["a"]) * p + names["a"] / 3
    else:
        p = names["p"] if "p" in names else np.exp(names["log_p"])
    ce, gradient = -np.sum(np.where(p > 0, p * log_q, 0), -1), np.exp(log_q) - p
    if name == "poly_loss_cross_entropy":
        e = names["e"]
        return ce - e * np.expm1(-ce), (1 + e * np.exp(-ce))[:, None] * gradient
    if name.startswith("kl"):
        ce = ce + np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), -1)
    return ce, gradient


@pytest.mark.parametrize(("name", "jitted"), covering(RECIPES, [True, False]))
def test_values_and_gradients_of_easy_and_impossible_examples(name: str, jitted: bool):
    """The options of a line are traced too."""
    recipe, z = RECIPES[name], FAR
    names: dict[str, Any] = {k: np.float32(v) if isinstance(v, float) else v for k, v in recipe.names.items()}
    if name == "sigmoid_focal_loss":
        names["t"] = np.array([[1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]], np.float32)
    if recipe.argument == "log_q":
        z = np.asarray(log_softmax(FAR / 4))
    if name == "generalized_kl_divergence":
        z = z / 10

    def derived(z: Any, names: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda z: recipe(z, **names), z)
        forward = jax.jvp(lambda z: recipe(z, **names), (z,), (jnp.ones_like(z).at[:, 0].set(2.0),))[1]
        return value, pull(jnp.ones_like(value))[0], forward

    with jax.numpy_dtype_promotion("standard"):
        value, gradient, forward = (jax.jit(derived) if jitted else derived)(z, names)
    want, want_gradient = exact_rows(name, z, names)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=2e-6)
    step = np.where(np.arange(3) == 0, 2.0, 1.0)
    along = want_gradient * step if name.startswith("sigmoid") else np.sum(want_gradient * step, -1)
    np.testing.assert_allclose(forward, along, rtol=1e-4, atol=4e-6)


@pytest.mark.grid
@pytest.mark.parametrize("p", [[0.0, 0.25, 0.75], [0.0, 0.0, 1.0]])
def test_a_divergence_has_derivatives_with_respect_to_a_target_of_zero(p: list[float]):
    recipe, log_q = RECIPES["kl_divergence"], np.log(np.array([0.25, 0.25, 0.5], np.float32))
    value, gradient = jax.value_and_grad(lambda p: recipe(log_q, p=p))(jnp.array(p))
    kept = np.array(p) > 0
    slope = np.log(np.array(p)[kept]) - log_q[kept]
    np.testing.assert_allclose(value, np.sum(np.array(p)[kept] * slope), rtol=1e-6)
    # Along the simplex: with respect to all entries together the distribution is rescaled.
    np.testing.assert_allclose(gradient[kept] - gradient[kept][0], slope - slope[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[~kept], 0)
    np.testing.assert_allclose(jax.jacfwd(lambda p: recipe(log_q, p=p))(jnp.array(p)), gradient, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(jax.hessian(lambda p: recipe(log_q, p=p))(jnp.array(p))))


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
