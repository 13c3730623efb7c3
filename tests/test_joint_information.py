"""The measures of several variables: values and derivatives against the oracle, the edges, scikit-learn's shares."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles_information as oracle
import pytest
import sklearn.metrics
from cases import draw_probabilities, marked
from measures import differentiated, draw_positive, f32, third_derivative
from oracles import assert_close

import jaxent as info

NORMALIZERS: dict[Any, Any] = {
    "mean": "arithmetic",
    "min": "min",
    "max": "max",
    "geometric": "geometric",
    "joint": None,
}


# Each measure of a table of two variables, with its oracle of the table laid end to end.
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "joint_entropy": (info.joint_entropy, lambda p, columns: oracle.entropy(p)),
    "entropy of x": (
        functools.partial(info.conditional_entropy, axis=-1),
        functools.partial(oracle.conditional_entropy, known=1),
    ),
    "entropy of y": (
        functools.partial(info.conditional_entropy, axis=-2),
        functools.partial(oracle.conditional_entropy, known=0),
    ),
    "mutual_information": (info.mutual_information, oracle.mutual_information),
    "variation_of_information": (info.variation_of_information, oracle.variation_of_information),
    **{
        f"share of {name}": (
            functools.partial(info.normalized_mutual_information, normalizer=name),
            functools.partial(oracle.normalized_mutual_information, normalizer=name),
        )
        for name in NORMALIZERS
    },
}


def draw_joint(rng: np.random.Generator) -> np.ndarray:
    return draw_probabilities(rng, (12,)).reshape(3, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("name", PAIRS)
def test_values(name: str, rng: np.random.Generator):
    measure, exact = PAIRS[name]
    tables = np.stack([draw_joint(rng) for _ in range(6)])
    want = oracle.by_row(functools.partial(exact, columns=4), tables.reshape(6, 12))
    got = jax.jit(measure)(tables)
    assert_close(got, want, ulp=8, dtype=np.float32)
    kept = measure(tables, keepdims=True)
    assert kept.shape == (6, 1, 1)
    np.testing.assert_allclose(kept.ravel(), got, rtol=1e-6)
    if "share" not in name:
        assert_close(measure(tables, base=2), np.asarray(got, np.float64) / np.log(2), ulp=2, dtype=np.float32)


@pytest.mark.grid
def test_conditional_mutual_information(rng: np.random.Generator):
    p = draw_positive(rng, 24).reshape(2, 3, 4)
    exact = functools.partial(oracle.conditional_mutual_information, rows=2, columns=3)
    got = info.conditional_mutual_information(np.stack([p, p]))
    assert_close(got, [oracle.value(exact, p.ravel())] * 2, ulp=16, dtype=np.float32)
    assert info.conditional_mutual_information(p, keepdims=True).shape == (1, 1, 1)
    alone = p[..., :1] / p[..., 0].sum()
    want = info.mutual_information(alone[..., 0])
    np.testing.assert_allclose(info.conditional_mutual_information(alone), want, rtol=1e-5)
    # The chain rule: I(X; Y, Z) = I(X; Z) + I(X; Y | Z).
    chained = info.mutual_information(p.sum(1)) + info.conditional_mutual_information(p)
    np.testing.assert_allclose(info.mutual_information(p.reshape(2, 12)), chained, rtol=1e-5)


def test_conditional_mutual_information_near_independence(rng: np.random.Generator):
    rows, columns, depth = (draw_positive(rng, n) for n in (2, 3, 2))
    p = np.einsum("i,j,k->ijk", *(np.round(x * 64) / 64 for x in (rows, columns, depth))).astype(np.float32)
    assert 0 <= info.conditional_mutual_information(p) < 1e-13


@pytest.mark.parametrize("normalizer", [n for n, average in NORMALIZERS.items() if average])
def test_shares_are_those_of_scikit_learn(normalizer: Any, rng: np.random.Generator):
    several = rng.integers(0, 4, size=(2, 200))
    one = np.zeros(200, np.int64)
    a, b = several
    for x, y in ((a, b), (a, a), (a, one), (one, b), (one, one), (a, a // 2)):
        table = info.empirical_distribution((x, y), (4, 5))
        got = info.normalized_mutual_information(table, normalizer=normalizer)
        want = sklearn.metrics.normalized_mutual_info_score(x, y, average_method=NORMALIZERS[normalizer])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_pointwise_mutual_information(rng: np.random.Generator):
    p = np.zeros((4, 5), np.float32)
    p[:3, :4] = draw_joint(rng)
    p[0, 0], p[1, 1] = p[1, 1] + p[0, 0], 0
    got = np.asarray(info.pointwise_mutual_information(p))
    p_x, p_y = p.sum(1, keepdims=True, dtype=np.float64), p.sum(0, keepdims=True, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.where(p_x * p_y == 0, 0, np.log(p / (p_x * p_y)))
    assert np.isneginf(want).any()
    assert_close(got, want, ulp=4, dtype=np.float32, size=1)
    mean = np.sum(p * np.where(p > 0, got, 0))
    np.testing.assert_allclose(mean, info.mutual_information(p), rtol=1e-5)
    assert_close(info.pointwise_mutual_information(p, base=2), got / np.log(2), ulp=2, dtype=np.float32)


@pytest.mark.grid
def test_derivatives_of_pointwise_mutual_information():
    p = f32([[0.5, 0.25, 0], [0, 0.25, 0], [0, 0, 0]])
    p_x, p_y = p.sum(1), p.sum(0)
    got = np.asarray(jax.jacfwd(info.pointwise_mutual_information)(p))
    np.testing.assert_allclose(got, jax.jacrev(info.pointwise_mutual_information)(p), rtol=1e-6)
    want = np.zeros((3, 3, 3, 3))
    for x, y in np.ndindex(2, 2):
        want[x, y, x] -= 1 / p_x[x]
        want[x, y, :, y] -= 1 / p_y[y]
        want[x, y, x, y] += np.inf if p[x, y] == 0 else 1 / p[x, y]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_cell_whose_second_derivative_overflows_spoils_no_other():
    p = f32([[0.5, 1e-30], [0.25, 0.25]])
    got = np.array(jax.hessian(lambda p: jnp.sum(info.pointwise_mutual_information(p)))(p)).reshape(4, 4)
    x, y = np.divmod(np.arange(4), 2)
    of_rows, of_columns = p.astype(np.float64).sum(1), p.astype(np.float64).sum(0)
    want = 2 * (x[:, None] == x) / of_rows[x] ** 2 + 2 * (y[:, None] == y) / of_columns[y] ** 2
    want = want - np.diag(1 / p.astype(np.float64).ravel() ** 2)
    assert got[1, 1] < -1e38
    got[1, 1] = want[1, 1] = 0
    assert_close(got, want, ulp=8, dtype="f4", size=16)


def test_conditional_entropy_that_is_nearly_zero():
    p = np.array([[0.5, 2.0**-40], [2.0**-60, 0.5]], np.float32)
    want = oracle.value(oracle.conditional_entropy, p.ravel(), columns=2, known=0)
    assert 0 < want < 1e-10
    assert_close(info.conditional_entropy(p, axis=-2), want, ulp=8, dtype=np.float32)


def test_mutual_information_near_independence(rng: np.random.Generator):
    rows, columns = draw_positive(rng, 3), draw_positive(rng, 4)
    p = np.outer(rows, columns)
    assert p.sum(dtype=np.float64) == 1
    assert 0 <= info.mutual_information(p) < 1e-14
    p[:2, :2] += f32([[2.0**-18, -(2.0**-18)], [-(2.0**-18), 2.0**-18]])
    want = oracle.value(oracle.mutual_information, p.ravel(), columns=4)
    assert want < 1e-8
    assert float(info.mutual_information(p)) == pytest.approx(float(want), rel=1e-4)
    rare = f32([[1e-25, 0], [0, 1]])  # the product of the marginals is no float32 number
    want = oracle.value(oracle.mutual_information, rare.ravel(), columns=2)
    assert_close(info.mutual_information(rare), want, ulp=8, dtype=np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


# The other axis, and averages that are of the kind of the others.
SELDOM = ("entropy of y", *(f"share of {name}" for name in ("min", "max", "geometric")))


@pytest.mark.parametrize("name", marked(PAIRS, [n for n in PAIRS if n not in SELDOM]))
def test_derivatives(name: str, rng: np.random.Generator):
    measure, exact = PAIRS[name]
    exact = functools.partial(exact, columns=3)
    p = draw_positive(rng, 6)

    def of(flat):
        return measure(flat.reshape(2, 3))

    want, curved = oracle.gradient(exact, p), oracle.hessian(exact, p)
    got = differentiated(of, 1)
    gradient, forward, hessian = (np.asarray(jax.tree.leaves(x)[0]) for x in got(p)[1:])
    assert_close(forward, gradient, ulp=4, dtype=np.float32, size=np.abs(want).max())
    # Mutual information leaves out the constant that the direction off the simplex adds.
    tangent = np.eye(6) - 1 / 6
    size = max(np.abs(want).max(), 1)
    assert_close(tangent @ gradient, tangent @ want, ulp=8, dtype=np.float32, size=size)
    size = np.abs(curved).max()
    assert_close(tangent @ hessian @ tangent, tangent @ curved @ tangent, ulp=32, dtype="f4", size=size)
    at_zero = got(f32([0.5, 0, 0, 0, 0.25, 0.25]))
    zero = np.array([False, True, True, True, False, False])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(at_zero))
    assert np.all(at_zero.gradient[0][zero] == 0)
    curved = at_zero.hessian[0][0]
    assert np.all(curved[zero] == 0)
    np.testing.assert_allclose(curved, curved.T, rtol=1e-5, atol=1e-5)


def same(*axes: int, shape: tuple[int, ...] = (2, 2, 2)) -> np.ndarray:
    """Whether two cells of a table laid end to end agree in these axes."""
    at = np.array(list(np.ndindex(shape)))[:, list(axes)]
    return np.all(at[:, None] == at, axis=-1)


# Signs of the sums `s log s` that make up a measure of three variables, by the axes that each is a marginal of.
SUMS: dict[str, tuple[Callable[..., Any], dict[tuple[int, ...], int]]] = {
    "joint_entropy": (info.joint_entropy, {(0, 1): -1}),
    "conditional_entropy": (info.conditional_entropy, {(0, 1): -1, (1,): 1}),
    "variation_of_information": (info.variation_of_information, {(0, 1): -2, (0,): 1, (1,): 1}),
    "mutual_information": (info.mutual_information, {(0, 1): 1, (0,): -1, (1,): -1}),
    "conditional_mutual_information": (
        info.conditional_mutual_information,
        {(0, 1, 2): 1, (0, 2): -1, (1, 2): -1, (2,): 1},
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_second_and_third_derivatives_of_tiny_probabilities(name: str):
    """Of `s log s` they are `1 / s` and `-1 / s**2`, and a cell of 0 is a constant."""
    measure, sums = SUMS[name]
    p = f32([0.5, 1e-7, 1e-12, 0.25, 0, 1e-3, 0.25 - 1e-3, 0])
    if max(max(axes) for axes in sums) == 1:
        p, shape = p[[0, 1, 4, 3]], (2, 2)
    else:
        shape = (2, 2, 2)
    second, third, wide = np.zeros((p.size, p.size)), np.zeros((p.size, p.size)), p.astype(np.float64)
    at = 1
    for axes, sign in sums.items():
        alike = same(*axes, shape=shape)
        marginal = alike @ wide
        inverse = np.where(marginal > 0, 1 / np.where(marginal > 0, marginal, 1), 0)
        second += sign * alike * inverse
        third -= sign * alike * alike[at] * inverse**2
    kept = np.outer(p > 0, p > 0)

    def of(flat: jax.Array) -> jax.Array:
        return measure(flat.reshape(shape))

    got = differentiated(of, 1)(p).hessian[0][0]
    # An entry of 1e12 has its terms of 1 rounded away, and the sum of its row too.
    assert_close(got, second * kept, ulp=8, dtype=np.float32, size=np.abs(np.diag(second))[:, None] + 1)
    got = third_derivative(of, 1)(jnp.int32(at), p)
    assert_close(got, third * kept, ulp=16, dtype=np.float32, size=np.abs(third).max())


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("name", [*PAIRS, "pointwise_mutual_information"])
def test_invalid_joint_distributions_give_nan(name: str):
    measure = PAIRS[name][0] if name in PAIRS else info.pointwise_mutual_information
    for bad in (-0.25, np.inf, np.nan):
        got = np.ravel(measure(f32([[bad, 0.5], [0.25, 0.5]])))
        assert np.isnan(got[:3]).all()  # every entry whose marginals hold the bad one


def test_counts_are_not_probabilities():
    counts = np.array([[50, 10], [20, 40]])
    for measure in (info.mutual_information, info.normalized_mutual_information, info.pointwise_mutual_information):
        with pytest.raises(TypeError, match=r"floating dtype .*`counts / counts.sum\(\)`\), got int64\[2,2\]"):
            measure(counts)
    np.testing.assert_allclose(info.mutual_information(counts / counts.sum()), 0.13565558, rtol=1e-5)


def test_bad_input():
    p = np.full((2, 2), 0.25, np.float32)
    with pytest.raises(
        ValueError, match=r"normalized_mutual_information: `normalizer` must be one of 'mean', .* got 'm'"
    ):
        info.normalized_mutual_information(p, normalizer="m")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"conditional_mutual_information: `pxyz` must have three class axes, got float"
    ):
        info.conditional_mutual_information(p)
