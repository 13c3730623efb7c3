"""The table of conventions at the edges: every row, for the value and for every derivative, forward and reverse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import nll_loss, run, sigmoid_cross_entropy, softmax_cross_entropy, softmax_cross_entropy_gradient
from oracles import assert_close

pytestmark = pytest.mark.usefixtures("one_device")

inf, nan = np.inf, np.nan

ROWS = {
    "finite": [1.0, 2.0, -1.0],
    "nan": [1.0, nan, -1.0],
    "nan_and_inf": [inf, nan, -inf],
    "plus_inf": [1.0, inf, -1.0],
    "two_plus_inf": [inf, inf, -1.0],
    "minus_inf": [1.0, -inf, -1.0],
    "only_minus_inf": [-inf, -inf, -inf],
    "one_left": [-inf, 2.0, -inf],
    "huge": [1e38, -1e38, 0.0],
}
# Without the last: the square of its log-normaliser overflows.
ROWS_FOR_Z_LOSS = {name: row for name, row in ROWS.items() if name != "huge"}
CLASS_WEIGHTS = np.array([0.5, 0.0, 2.0], np.float32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class_weights": {"class_weights": CLASS_WEIGHTS},
    "smoothing_and_z_loss": {"label_smoothing": 0.25, "z_loss": 0.25},
    "all": {"label_smoothing": 0.25, "z_loss": 0.25, "class_weights": CLASS_WEIGHTS},
}


def every_derivative(logits: np.ndarray, targets: Any, arguments: dict[str, Any], at: np.ndarray) -> tuple:
    """For each row of logits: the value, three gradients, and three ways to the rows `at` of its Hessian."""

    @jax.vmap
    def ways(z: jax.Array, targets: jax.Array, at: jax.Array) -> tuple:
        def loss(z: jax.Array) -> jax.Array:
            return softmax_cross_entropy(z, targets, **arguments, reduction="sum")

        def closed(z: jax.Array) -> jax.Array:
            return softmax_cross_entropy_gradient(z, targets, **arguments, reduction="sum")

        basis = jnp.zeros((len(at), len(z))).at[jnp.arange(len(at)), at].set(1.0)
        forward = jax.vmap(lambda v: jax.jvp(loss, (z,), (v,))[1])(basis)
        curvature = [jax.vmap(lambda v, f=f: jax.jvp(f, (z,), (v,))[1])(basis) for f in (jax.grad(loss), closed)]
        reverse = jax.vmap(jax.vjp(jax.grad(loss), z)[1])(basis)[0]
        return loss(z), (closed(z)[at], jax.grad(loss)(z)[at], forward), [x[:, at] for x in (*curvature, reverse)]

    return run(ways, logits, targets, np.broadcast_to(at, (len(logits), len(at))))


def check(rows: list[list[float]], targets: list[Any], arguments: dict[str, Any], count: int = 3) -> None:
    """Every row with every target, against the oracle; in rows of `count` classes the others are removed by -inf."""
    pairs = [(np.array(row, np.float32), target) for row in rows for target in targets]
    at = np.arange(3) if count == 3 else np.array([0, count // 2, count - 1])
    z = np.full((len(pairs), count), -inf, np.float32)
    z[:, at] = np.stack([row for row, _ in pairs])
    given = np.array([target for _, target in pairs])
    if np.issubdtype(given.dtype, np.integer):
        given = np.where((given >= 0) & (given < 3), at[given.clip(0, 2)], np.where(given < 0, given, count))
    else:
        given = given.astype(np.float32)
    value, gradients, hessians = every_derivative(z, given, arguments, at)
    exact: Any = oracles.softmax_cross_entropy
    for n, (row, target) in enumerate(pairs):
        want = exact(row, np.array(target), **arguments)
        assert_close(value[n], want.total, ulp=4, dtype=np.float32)
        for got in gradients:
            cancelling = arguments or given.dtype == np.float32
            assert_close(got[n], want.gradient, ulp=6, dtype=np.float32, size=want.size if cancelling else 0)
        for got in hessians:
            size = np.where(want.hessian == 0, 0, want.size.max())
            assert_close(got[n], want.hessian, ulp=8, dtype=np.float32, size=size)


@pytest.mark.parametrize(
    ("target", "arguments", "option"),
    [
        (-100, {}, "plain"),
        (1, {"ignore_index": 1}, "all"),
        (1, {"where": np.array(False)}, "all"),
        (1, {"weights": np.array(0.0)}, "plain"),
        (7, {"weights": np.array(0.0)}, "all"),
        ([0.25, nan, inf], {"where": np.array(False)}, "plain"),
        ([0.25, nan, inf], {"where": np.array(False)}, "all"),
        ([0.25, 0.25, 0.5], {"weights": np.array(0.0)}, "all"),
    ],
)
def test_a_dropped_row_is_exactly_zero(target: Any, arguments: dict[str, Any], option: str):
    logits = np.array(list(ROWS_FOR_Z_LOSS.values()), np.float32)
    given = np.broadcast_to(np.array(target), (len(logits), *np.shape(target)))
    arguments = {**arguments, **OPTIONS[option]}
    value, gradients, hessians = every_derivative(logits, given, arguments, np.arange(3))
    for got in (value, *gradients, *hessians):
        np.testing.assert_array_equal(got, np.zeros_like(got))
    sums = run(
        jax.vmap(lambda z, t: softmax_cross_entropy(z, t, **arguments, reduction="sum_and_weight")), logits, given
    )
    np.testing.assert_array_equal(sums.total, 0)
    np.testing.assert_array_equal(sums.weight, 0)


@pytest.mark.grid
def test_a_dropped_row_is_zero_in_third_derivatives():
    z = np.array([[1.0, 2.0, -1.0], [nan, inf, 3.0], [200.0, -inf, 0.0]], np.float32)
    labels = np.array([0, -100, -100])

    def loss(z: jax.Array) -> jax.Array:
        return softmax_cross_entropy(z, labels, reduction="sum")

    for outer in (jax.jacfwd, jax.jacrev):
        third = jax.jit(outer(jax.jacrev(jax.jacrev(loss))))(z)
        assert np.all(np.isfinite(third[0]))
        assert np.any(third[0] != 0)
        assert np.all(third[1:] == 0)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_row_with_every_label_and_labels_out_of_range(option: str):
    rows = ROWS_FOR_Z_LOSS if "z_loss" in OPTIONS[option] else ROWS
    check(list(rows.values()), [0, 1, 2, -1, 3, -100, 2**31 - 1, -(2**31)], {"ignore_index": None, **OPTIONS[option]})


@pytest.mark.parametrize("option", ["plain", "class_weights"])
def test_every_row_with_probabilities(option: str):
    targets = [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.25, 0.25, 0.5], [0.0, 0.0, 0.0]]
    check(list(ROWS.values()), targets, OPTIONS[option])


@pytest.mark.grid
@pytest.mark.parametrize("count", [255, 256, 32769])
def test_every_row_in_long_rows(count: int):
    check(list(ROWS.values()), [0, 1, 2, -1, 3], {}, count)


@pytest.mark.parametrize("one_hot", [True, False])
def test_a_single_class(one_hot: bool):
    z, want = np.array([-inf, inf, nan, 5.0], np.float32), np.array([nan, nan, nan, 0.0])
    targets = np.ones((4, 1), np.float32) if one_hot else np.zeros(4, np.int32)
    got, gradients, hessians = every_derivative(z[:, None], targets, {}, np.array([0]))
    np.testing.assert_array_equal(got, want)
    for x in (*gradients, *hessians):
        np.testing.assert_array_equal(np.ravel(x), want)


@pytest.mark.parametrize("count", [3, 300, 32769])
def test_a_bad_row_leaves_the_others_alone(count: int):
    names = list(ROWS)
    at = np.array([0, count // 2, count - 1])
    z = np.full((len(names), count), -inf, np.float32)
    z[:, at] = np.array(list(ROWS.values()), np.float32)
    labels = np.full(len(names), at[1], np.int32)

    @jax.jit
    def rows_and_gradient(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        losses, pull = jax.vjp(lambda z: softmax_cross_entropy(z, labels, reduction="none"), z)
        return losses, pull(jnp.ones_like(losses))[0], softmax_cross_entropy_gradient(z, labels, reduction="none")

    losses, gradient, closed = rows_and_gradient(z)
    for n, name in enumerate(names):
        want = oracles.softmax_cross_entropy(np.array(ROWS[name], np.float32), np.array(1))
        assert_close(losses[n], want.total, ulp=4, dtype=np.float32)
        for got in (gradient, closed):
            assert_close(got[n, at], want.gradient, ulp=6, dtype=np.float32)
            unusable = np.isnan(want.gradient[0])
            assert np.all(np.isnan(got[n])) if unusable else np.all(np.delete(got[n], at) == 0)


@pytest.mark.grid
def test_smoothing_at_logits_far_apart():
    # Megatron: inf.
    z = [0.0, -50.0, -120.0]
    check([z], [0, 1, 2], {"label_smoothing": 0.125})
    got = softmax_cross_entropy(np.array(z, np.float32), np.array(0), label_smoothing=0.1)
    assert_close(got, 0.1 / 3 * 170, ulp=4, dtype=np.float32)


@pytest.mark.grid
def test_smoothing_with_a_removed_class_costs_infinity_unless_its_weight_is_0():
    z = [1.0, -inf, 0.0]
    assert softmax_cross_entropy(np.array(z), np.array(0), label_smoothing=0.125) == inf
    check([z], [0, 2], {"label_smoothing": 0.125, "class_weights": CLASS_WEIGHTS})


@pytest.mark.grid
def test_a_weight_of_0_silences_an_infinite_loss():
    check([[1.0, -inf, 0.0]], [0, 1], {"weights": np.array(0.0)})
    check([[1.0, -inf, 0.0]], [0, 1], {"class_weights": CLASS_WEIGHTS})


def test_a_weight_of_0_does_not_hide_the_loss_from_the_weights_gradient():
    z = np.array([[1.0, 2.0, 0.0]], np.float32)
    slope = jax.grad(lambda w: softmax_cross_entropy(z, np.array([0]), weights=w, reduction="sum"))(np.zeros(1))
    assert_close(slope, softmax_cross_entropy(z, np.array([0]), reduction="none"), ulp=1, dtype=np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_edges(dtype: str):
    z = jnp.array([[1.0, -inf, 0.0], [nan, 1.0, 0.0], [1.0, 2.0, 0.0]], dtype)
    value, gradient = jax.value_and_grad(softmax_cross_entropy)(z, np.array([0, -100, 7]), reduction="sum")
    assert np.isnan(value)
    assert gradient.dtype == dtype
    gradient = gradient.astype(np.float32)
    assert np.all(np.isfinite(gradient[0]))
    assert gradient[0, 1] == 0
    assert np.all(gradient[1] == 0)
    assert np.all(np.isnan(gradient[2]))


# ----------------------------------------------------------------------------------------------------------------------
# The other losses


def test_nll_loss_at_the_edges():
    log_p = np.array([[-1.0, nan], [-1.0, -inf], [nan, nan], [-1.0, -2.0], [-1.0, -2.0]], np.float32)
    labels = np.array([0, 1, -100, 2, 0], np.int32)

    def loss(log_p: Any) -> jax.Array:
        return nll_loss(log_p, labels, reduction="none")

    np.testing.assert_array_equal(loss(log_p), [1.0, inf, 0.0, nan, 1.0])
    expected = np.array([[-1, 0], [0, -1], [0, 0], [nan, nan], [-1, 0]])
    for jacobian in (jax.jacfwd, jax.jacrev):
        got = jax.vmap(jacobian(lambda p, y: nll_loss(p, y)))(log_p, labels)
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(nll_loss(log_p, labels, weights=np.array([1, 0, 1, 0, 2])), 1.0)
    np.testing.assert_array_equal(nll_loss(log_p[:0], labels[:0]), 0.0)


def test_sigmoid_cross_entropy_at_the_edges():
    z = np.array([inf, inf, -inf, -inf, nan, nan, nan], np.float32)
    t = np.array([1, 0, 1, 0, 1, 1, 0])
    where = np.array([True] * 5 + [False, True])
    weights = np.array([1.0] * 6 + [0.0])

    def loss(z: Any) -> jax.Array:
        return sigmoid_cross_entropy(z, t, where=where, weights=weights, reduction="none")

    np.testing.assert_array_equal(loss(z), [0.0, inf, inf, 0.0, nan, 0.0, 0.0])
    _, pull = jax.vjp(loss, z)
    np.testing.assert_array_equal(pull(jnp.ones(7))[0], [0.0, 1.0, -1.0, 0.0, nan, 0.0, 0.0])
    np.testing.assert_array_equal(jnp.diagonal(jax.jacfwd(loss)(z)), [0.0, 1.0, -1.0, 0.0, nan, 0.0, 0.0])
    for n in range(4):
        curvature = jax.hessian(lambda x, n=n: sigmoid_cross_entropy(x, t[n]))(z[n])
        assert curvature == 0
    assert sigmoid_cross_entropy(z[:0], t[:0]) == 0
    assert sigmoid_cross_entropy(z, t, where=np.zeros(7, bool)) == 0


def test_an_infinite_pos_weight_side_of_probability_0_adds_0():
    assert sigmoid_cross_entropy(np.float32(-inf), np.float32(0.0), pos_weight=3.0) == 0
