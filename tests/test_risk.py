"""The empirical risk: exact sums of a billion losses, weights of every kind, units, and bad arguments."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxent import WeightedSum
from jaxent.risk import EmpiricalRisk

ULP = 2.0**-23


def exact(part) -> float:
    """`hi + lo` without rounding to float32."""
    return float(part.hi) + float(part.lo)


def test_a_billion_additions(rng: np.random.Generator):
    """A scan adds one chunk of 10,000 losses 100,000 times."""
    chunk = rng.exponential(2.3, 10_000).astype(np.float32)
    steps = 100_000
    once = EmpiricalRisk().update(chunk)
    assert exact(once._total) == pytest.approx(np.sum(chunk, dtype=np.float64), rel=1e-12)

    @jax.jit
    def many(step: EmpiricalRisk) -> EmpiricalRisk:
        return jax.lax.scan(lambda risk, _: (risk.merge(step), None), EmpiricalRisk(), length=steps)[0]

    risk = many(once)
    assert exact(risk._weight) == 1e9
    assert exact(risk._total) == pytest.approx(steps * np.sum(chunk, dtype=np.float64), rel=1e-10)
    assert float(risk.mean()) == pytest.approx(np.mean(chunk, dtype=np.float64), rel=1e-7)
    assert float(risk.bits_per(3 * 10**9)) == pytest.approx(np.mean(chunk, dtype=np.float64) / np.log(2) / 3, rel=3e-7)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 10_000, 99_991])
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_one_update_is_compensated(size: int, order: str, rng: np.random.Generator):
    """A plain float32 sum of these is up to 1e-4 off."""
    x = np.exp(rng.normal(0, 4, size)).astype(np.float32)
    x = {"rising": np.sort(x), "falling": np.sort(x)[::-1], "random": x}[order]
    risk = jax.jit(EmpiricalRisk().update)(x)
    assert exact(risk._total) == pytest.approx(np.sum(x, dtype=np.float64), rel=1e-12)


def test_updates_in_a_scan(rng: np.random.Generator):
    x = rng.exponential(1.0, (500, 1000)).astype(np.float32)
    w = (rng.random(x.shape) < 0.3).astype(np.float32)

    @jax.jit
    def evaluate(x: jax.Array, w: jax.Array) -> EmpiricalRisk:
        return jax.lax.scan(lambda r, b: (r.update(*b), None), EmpiricalRisk(), (x, w))[0]

    risk = evaluate(x, w)
    wide = x.astype(np.float64) * w
    assert exact(risk._total) == pytest.approx(wide.sum(), rel=1e-12)
    assert float(risk.mean()) == pytest.approx(wide.sum() / w.sum(dtype=np.float64), rel=ULP)
    assert float(risk.perplexity()) == pytest.approx(np.exp(wide.sum() / w.sum(dtype=np.float64)), rel=4 * ULP)


def test_merging_is_independent_of_order(rng: np.random.Generator):
    parts = [EmpiricalRisk().update(rng.exponential(10.0**k, 777).astype(np.float32)) for k in range(-3, 2)]
    results = set()
    for order in itertools.permutations(parts):
        merged = functools.reduce(EmpiricalRisk.merge, order)
        folded = order[0].merge(order[1]).merge(order[2].merge(order[3]).merge(order[4]))
        results |= {float(merged.mean()), float(folded.mean())}
    assert max(results) - min(results) <= ULP * max(results)


def test_the_mean_is_within_an_ulp(rng: np.random.Generator):
    """The quotient of the rounded sums would be 2 ulp off."""
    x = rng.exponential(1.0, (2000, 3)).astype(np.float32)
    w = rng.random(x.shape).astype(np.float32)
    means = np.asarray(jax.vmap(lambda x, w: EmpiricalRisk().update(x, w).mean())(x, w), np.float64)
    expected = np.sum(x * w, axis=1, dtype=np.float64) / np.sum(w, axis=1, dtype=np.float64)
    assert np.max(np.abs(means - expected) / np.spacing(expected.astype(np.float32))) <= 1


def test_merging_commutes_exactly(rng: np.random.Generator):
    a, b = (EmpiricalRisk().update(rng.exponential(s, 1000).astype(np.float32)) for s in (1e-3, 1e4))
    jax.tree.map(np.testing.assert_array_equal, a.merge(b), b.merge(a))


def test_merge_takes_a_weighted_sum():
    risk = EmpiricalRisk().update(jnp.array([1.0])).merge(WeightedSum(jnp.float32(6.0), jnp.float32(3.0)))
    assert float(risk.mean()) == 7 / 4
    with pytest.raises(TypeError, match=r"EmpiricalRisk\.merge: `other`"):
        risk.merge(3.0)  # pyright: ignore


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_zero_silences(bad: float):
    def mean(x: jax.Array) -> jax.Array:
        return EmpiricalRisk().update(x, jnp.array([1.0, 0.0, 3.0])).mean()

    value, gradient = jax.value_and_grad(mean)(jnp.array([2.0, bad, 6.0]))
    assert float(value) == 5.0
    np.testing.assert_array_equal(gradient, [0.25, 0, 0.75])
    np.testing.assert_array_equal(jax.jacfwd(mean)(jnp.array([2.0, bad, 6.0])), [0.25, 0, 0.75])


def test_nan_and_inf_show():
    assert np.isnan(EmpiricalRisk().update(jnp.array([1.0, jnp.nan])).mean())
    assert np.isposinf(EmpiricalRisk().update(jnp.array([1.0, jnp.inf])).update(jnp.array([1.0])).mean())


def weighted_mean_derivatives(x: np.ndarray, w: np.ndarray) -> tuple[Any, ...]:
    """Gradients and Hessian blocks of `sum(w x) / sum(w)` with respect to `x` and `w`, in float64."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    total, weight, one = np.sum(w * x), np.sum(w), np.ones_like(w)
    mean = total / weight
    by_x, by_w = w / weight, (x - mean) / weight
    mixed = np.eye(len(x)) / weight - np.outer(w, one) / weight**2
    twice_w = -(np.add.outer(x, x) - 2 * mean) / weight**2
    return mean, (by_x, by_w), ((np.zeros((len(x),) * 2), mixed), (mixed.T, twice_w))


SIGNED = np.array([1.0, 0.0, -0.5, 2.0], np.float32)


@pytest.mark.parametrize("how", ["update", "merge", "WeightedSum"])
def test_every_derivative_at_weights_of_zero_and_below(how: str):
    """A weight of 0 has the derivative of any other: leaving its loss out of the sum would lose it."""

    def mean(x: jax.Array, w: jax.Array) -> jax.Array:
        if how == "WeightedSum":
            return (
                WeightedSum(jnp.sum(x[:2] * w[:2]), jnp.sum(w[:2])) + WeightedSum(x[2:] @ w[2:], jnp.sum(w[2:]))
            ).mean()
        if how == "merge":
            return EmpiricalRisk().update(x[:2], w[:2]).merge(EmpiricalRisk().update(x[2:], w[2:])).mean()
        return EmpiricalRisk().update(x, w).mean()

    x = np.array([1.0, 2.0, 3.0, -1.5], np.float32)
    value, gradient, hessian = weighted_mean_derivatives(x, SIGNED)

    @jax.jit
    def derivatives(x: jax.Array, w: jax.Array) -> tuple[Any, ...]:
        f, both = mean, (0, 1)
        return f(x, w), jax.grad(f, both)(x, w), jax.jacfwd(f, both)(x, w), jax.hessian(f, both)(x, w)

    got = derivatives(jnp.asarray(x), jnp.asarray(SIGNED))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((value, gradient, gradient, hessian)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_derivative_with_respect_to_a_silenced_weight():
    def mean(w: jax.Array) -> jax.Array:
        return EmpiricalRisk().update(jnp.array([1.0, 2.0]), w).mean()

    np.testing.assert_array_equal(jax.grad(mean)(jnp.array([1.0, 0.0])), [0, 1])
    np.testing.assert_array_equal(jax.grad(mean)(jnp.zeros(2)), [0, 0])

    def with_bad_losses(w: jax.Array) -> jax.Array:
        return EmpiricalRisk().update(jnp.array([3.0, jnp.nan, jnp.inf]), w).mean()

    np.testing.assert_array_equal(jax.grad(with_bad_losses)(jnp.array([1.0, 0.0, 0.0])), [0, 0, 0])


def test_weights_that_cancel_are_a_mean_of_nothing():
    x, w = jnp.array([1.0, 3.0]), jnp.array([1.0, -1.0])
    assert EmpiricalRisk().update(x, w).mean() == 0
    assert WeightedSum(jnp.sum(x * w), jnp.sum(w)).mean() == 0


@pytest.mark.parametrize("losses", [np.zeros((0,), np.float32), np.ones((2, 3), np.float32)])
def test_mean_of_nothing_is_zero(losses: np.ndarray):
    def mean(x: jax.Array) -> jax.Array:
        return EmpiricalRisk().update(x, jnp.zeros(x.shape)).mean()

    value, gradient = jax.value_and_grad(mean)(losses)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(losses))
    assert float(EmpiricalRisk().perplexity()) == 1
    assert float(EmpiricalRisk().bits_per(0)) == 0


@pytest.mark.grid
def test_float64_losses_keep_their_digits(x64: None, rng: np.random.Generator):
    x = rng.exponential(1.0, 1000)
    risk = EmpiricalRisk().update(x, np.ones(1000, np.float32))
    assert exact(risk._total) == pytest.approx(x.sum(), rel=1e-13)
    assert risk.mean().dtype == jnp.float32


def test_low_precision_and_units():
    risk = EmpiricalRisk().update(jnp.full((1000,), np.log(2), jnp.bfloat16), np.ones(1000, bool))
    assert risk.mean().dtype == jnp.float32
    assert float(risk.mean(2)) == pytest.approx(1, rel=4e-3)
    assert float(risk.bits_per(500)) == pytest.approx(2 * float(risk.mean(base=2)), rel=1e-6)


@pytest.mark.parametrize("base", [1, 0, -2, np.inf, np.nan])
def test_bad_base(base: float):
    with pytest.raises(ValueError, match=r"EmpiricalRisk.mean: `base`"):
        EmpiricalRisk().mean(base)
    with pytest.raises(ValueError, match=r"EmpiricalRisk.mean: `base`"):
        jax.jit(lambda risk: risk.mean(base))(EmpiricalRisk())
    assert np.isnan(jax.jit(lambda base: EmpiricalRisk().mean(base))(base))


@pytest.mark.parametrize("number", [2, np.int64(7), 2.5])
def test_traced_bases_and_counts(number: float):
    risk = EmpiricalRisk().update(jnp.array([1.0, 3.0]))
    mean, bits = jax.jit(lambda x: (risk.mean(base=x), risk.bits_per(x)))(number)
    assert float(mean) == pytest.approx(2 / np.log(float(number)), rel=2 * ULP)
    assert float(bits) == pytest.approx(4 / np.log(2) / float(number), rel=2 * ULP)


@pytest.mark.parametrize(
    "count", [2**24 + 1, np.int64(5 * 10**9), 2**64, np.uint64(2**63 + 2**33), np.array(3 * 10**9)]
)
def test_counts_of_the_host(count: Any):
    risk = EmpiricalRisk().update(jnp.array([1.0, 3.0]))
    assert float(risk.bits_per(count)) == pytest.approx(4 / np.log(2) / int(count), rel=ULP)
    assert float(jax.jit(lambda r: r.bits_per(count))(risk)) == pytest.approx(4 / np.log(2) / int(count), rel=ULP)
    merged = risk.merge(WeightedSum(jnp.float32(6.0), count))  # pyright: ignore[reportArgumentType]
    assert exact(merged._weight) == pytest.approx(2 + int(count), rel=2.0**-44)
    added = WeightedSum() + WeightedSum(jnp.float32(6.0), count)  # pyright: ignore[reportArgumentType]
    assert float(added.mean()) == pytest.approx(6 / int(count), rel=ULP)


def test_a_count_is_a_number():
    for bad in ("5", 1j):
        with pytest.raises(TypeError, match=r"EmpiricalRisk.bits_per: `count`"):
            EmpiricalRisk().bits_per(bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"EmpiricalRisk.bits_per: `count` must be a scalar"):
        EmpiricalRisk().bits_per(np.array([1, 2]))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"`losses` must have a floating dtype"):
        EmpiricalRisk().update(jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"`weights` must have shape \(2,\)"):
        EmpiricalRisk().update(jnp.array([1.0, 2.0]), jnp.array(1.0))


def test_weighted_sum_adds_and_means():
    parts = [WeightedSum(jnp.float32(t), jnp.float32(n)) for t, n in ((6.0, 3.0), (1.0, 1.0))]
    assert float(sum(parts).mean()) == 1.75  # pyright: ignore
    assert float(WeightedSum(jnp.float32(0), jnp.float32(0)).mean()) == 0
