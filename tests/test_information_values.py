"""The information measures: values and derivatives against the oracle, shapes, units."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles_information as oracle
import pytest
from cases import DTYPES, covering, draw_probabilities, precision
from measures import CASES, LOGITS, NAN, Case, compiled, draw_close, draw_grid, draw_positive, f32
from oracles import assert_close

import jaxent as info

# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, rng: np.random.Generator):
    case = CASES[name]
    arrays = [draw_probabilities(rng, (24, 5)) for _ in range(case.operands)]
    got = compiled(case.measure)(*arrays)
    assert got.dtype == np.float32
    assert_close(got, oracle.by_row(case.oracle, *arrays), ulp=case.ulp, dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    covering(
        ["entropy(p)", "cross_entropy(p, q)", "kl(p, q)", "js(p, q)", "renyi_2(p, q)"],
        [d for d in DTYPES if d != "float32"],
    ),
)
def test_dtypes(name: str, dtype: str, rng: np.random.Generator):
    case = CASES[name]
    kind, result = DTYPES[dtype][:2]
    with precision(kind):
        arrays = [draw_probabilities(rng, (4, 5)).astype(kind) for _ in range(case.operands)]
        got = jax.jit(case.measure)(*arrays)
        assert got.dtype == result
        assert_close(got, oracle.by_row(case.oracle, *arrays), ulp=case.ulp, dtype=result)


@pytest.mark.parametrize("name", [n for n in CASES if "renyi_0(" not in n])
def test_probabilities_from_1e_30_to_1(name: str, rng: np.random.Generator):
    """Off the simplex by rounding only: the documented formulas. `p**a` costs |log p| ulp of its own."""
    case = CASES[name]
    arrays = [np.exp(rng.uniform(-69, 0, (24, 5))) for _ in range(case.operands)]
    arrays = [(a / a.sum(axis=-1, keepdims=True)).astype(np.float32) for a in arrays]
    assert_close(
        compiled(case.measure)(*arrays), oracle.by_row(case.oracle, *arrays), ulp=max(case.ulp, 40), dtype=np.float32
    )


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in CASES
        if "p, q" in n and not any(part in n for part in ("cross", "tv", "hell", "_0(", "_inf(", "_1000("))
    ],
)
@pytest.mark.parametrize("steps", [1, 2**6, 2**12])
def test_nearly_equal_distributions(name: str, steps: int, rng: np.random.Generator):
    case = CASES[name]
    p, q = draw_close(rng, (24, 5), steps)
    want = oracle.by_row(case.oracle, p, q)
    assert want.min() < {1: 1e-12, 2**6: 1e-8, 2**12: 1e-4}[steps]
    assert_close(compiled(case.measure)(p, q), want, ulp=8, dtype=np.float32)


@pytest.mark.parametrize("steps", [1, 2**6, 2**12])
def test_the_hellinger_distance_of_nearly_equal_distributions(steps: int, rng: np.random.Generator):
    p, q = draw_close(rng, (24, 5), steps)
    want = oracle.by_row(oracle.hellinger_distance, p, q)
    assert want.min() < {1: 1e-7, 2**6: 1e-5, 2**12: 1e-3}[steps]
    assert_close(info.hellinger_distance(p, q), want, ulp=4, dtype=np.float32)


def test_kl_of_7e_15():
    p = np.array([0.5, 0.5], np.float32)
    q = np.array([0.5 - 2.0**-24, 0.5 + 2.0**-24], np.float32)
    want = float(oracle.value(oracle.kl_divergence, p, q))
    assert 7e-15 < want < 7.2e-15
    assert float(info.kl_divergence(p, q)) == pytest.approx(want, rel=1e-6)
    assert float(info.jensen_shannon_divergence(p, q)) == pytest.approx(want / 4, rel=1e-6)


def test_kl_of_measures_whose_quotient_is_no_float32():
    p, q = f32([1e20, 1e-20]), f32([1e-20, 1e20])
    want = oracle.value(oracle.kl_divergence, p, q)
    assert_close(info.kl_divergence(p, q), want, ulp=4, dtype=np.float32)


def test_kl_of_a_thousand_classes(rng: np.random.Generator):
    p, q = draw_close(rng, (2, 1000), 8)
    want = oracle.by_row(oracle.kl_divergence, p, q)
    assert_close(info.kl_divergence(p, q), want, ulp=8, dtype=np.float32)
    textbook = np.asarray(jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1))
    assert np.all(np.abs(textbook - want) > want / 10), "the textbook sum is noise"


@pytest.mark.parametrize("scale", [0.1, 1, 10, 40])
@pytest.mark.parametrize("shift", [(0, 0), (-64, 8192), (8192, -8192)])
@pytest.mark.parametrize("name", LOGITS)
def test_logits(name: str, shift: tuple[int, int], scale: float, rng: np.random.Generator):
    case = LOGITS[name]
    logits = [draw_grid(rng, (8, 6), scale) for _ in range(case.operands)]
    if scale == 0.1 and case.operands == 2:
        logits[1] = logits[0] + draw_grid(rng, (8, 6), 0.01)
    moved = [z + np.float32(s) for z, s in zip(logits, shift, strict=False)]
    for z, m, s in zip(logits, moved, shift, strict=False):
        np.testing.assert_array_equal(m - np.float32(s), z)
    want = oracle.by_row(case.oracle, *moved)
    assert_close(compiled(case.measure)(*moved), want, ulp=6, dtype=np.float32)


def test_self_information_with_logits(rng: np.random.Generator):
    z = draw_grid(rng, (6, 5), 30)
    want = oracle.by_row(oracle.of_logits(oracle.self_information), z)
    assert_close(info.self_information_with_logits(z), want, ulp=4, dtype=np.float32)
    assert info.self_information_with_logits(f32([0, -20, -25]))[0] == pytest.approx(2.0750e-9, rel=1e-4)


def test_the_worked_example():
    p, q = np.array([0.0, 0.0, 1.0]), np.array([0.3, 0.3, 0.4])
    with jax.enable_x64(True):
        assert float(info.cross_entropy(p, q)) == pytest.approx(0.9162907318741551, rel=1e-15)
        assert float(info.cross_entropy(p, q, base=2)) == pytest.approx(1.3219280948873624, rel=1e-15)
        assert float(info.kl_divergence(p, q)) == pytest.approx(0.9162907318741551, rel=1e-15)
        assert float(info.self_information(q)[2]) == pytest.approx(0.9162907318741551, rel=1e-15)
    assert_close(
        info.cross_entropy(np.float32(p), np.float32(q)), -np.log(np.float64(np.float32(0.4))), ulp=1, dtype="f4"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Shapes, classes, units


SHAPES = [((7,), 0), ((1,), -1), ((0, 3), -1), ((3, 0), 0), ((2, 1, 5), 2), ((2, 5, 3), 1), ((5, 2, 3), -3)]


@pytest.mark.parametrize(("of", "name"), covering(SHAPES, ["renyi_2(p)", "kl(p, q)", "kl_divergence_with_logits"]))
def test_shapes_and_axes(of: tuple[tuple[int, ...], int], name: str, rng: np.random.Generator):
    shape, axis = of
    case = {**CASES, **LOGITS}[name]
    last = (*(n for i, n in enumerate(shape) if i != axis % len(shape)), shape[axis])
    arrays = [draw_probabilities(rng, last) for _ in range(case.operands)]
    moved = [np.moveaxis(a, -1, axis) for a in arrays]
    got = jax.jit(lambda *x: case.measure(*x, axis=axis))(*moved)
    assert got.shape == last[:-1]
    assert_close(got, oracle.by_row(case.oracle, *arrays), ulp=8, dtype=np.float32, size=1e-6 if name in LOGITS else 0)


# One for each way in which measures reduce over classes.
REDUCED = [
    *("entropy(p)", "renyi_2(p)", "renyi_inf(p)", "tsallis_0.5(p)", "cross_entropy(p, q)", "kl(p, q)", "js(p, q)"),
    *("tv(p, q)", "hellinger(p, q)", "renyi_2(p, q)", "renyi_inf(p, q)", *LOGITS),
]


@pytest.mark.parametrize("name", REDUCED)
def test_several_class_axes_are_one_flat_axis(name: str, rng: np.random.Generator):
    case = {**CASES, **LOGITS}[name]
    flat = [draw_positive(rng, 12)[None].repeat(2, 0) for _ in range(case.operands)]
    spread = [np.moveaxis(x.reshape(2, 3, 4), (0, 1, 2), (1, 2, 0)) for x in flat]
    mask = rng.random(12) < 0.7

    @jax.jit
    def every_way(flat: list, spread: list) -> Any:
        where = jnp.moveaxis(jnp.asarray(mask).reshape(1, 3, 4), (0, 1, 2), (1, 2, 0))
        return (
            case.measure(*flat, keepdims=True, where=mask),
            case.measure(*spread, axis=(2, 0), keepdims=True, where=where),
            case.measure(*spread, axis=(-3, -1), where=where),
        )

    want, kept, got = every_way(flat, spread)
    assert want.shape == (2, 1)
    assert kept.shape == (1, 2, 1)
    np.testing.assert_allclose(kept.ravel(), want.ravel(), rtol=1e-6)
    np.testing.assert_array_equal(got, kept[0, :, 0])


def test_all_classes_of_several_axes_have_their_self_information(rng: np.random.Generator):
    z = draw_grid(rng, (2, 3, 4), 3)
    got = info.self_information_with_logits(z, axis=(0, 2))
    want = info.self_information_with_logits(np.moveaxis(z, 1, 0).reshape(3, 8)).reshape(3, 2, 4)
    np.testing.assert_array_equal(jnp.moveaxis(got, 1, 0), want)


@pytest.mark.parametrize("name", ["kl(p, q)", "renyi_2(p, q)", "kl_divergence_with_logits"])
def test_batch_dimensions_broadcast(name: str, rng: np.random.Generator):
    measure = {**CASES, **LOGITS}[name].measure
    p = rng.dirichlet(np.ones(4), size=(3, 1)).astype(np.float32)
    q = rng.dirichlet(np.ones(4), size=5).astype(np.float32)
    want = np.array([[compiled(measure)(a[0], b) for b in q] for a in p])
    together, one, moved = jax.jit(
        lambda p, q: (measure(p, q), measure(p[0, 0], q), measure(p.transpose(2, 0, 1), q.T[:, None, :], axis=0))
    )(p, q)
    np.testing.assert_allclose(together, want, rtol=1e-6)
    np.testing.assert_allclose(one, want[0], rtol=1e-6)
    np.testing.assert_allclose(moved, want, rtol=1e-6)


@pytest.mark.parametrize("name", [*REDUCED, "self_information_with_logits"])
def test_a_masked_class_is_a_deleted_class(name: str, rng: np.random.Generator):
    case = {
        **CASES,
        **LOGITS,
        "self_information_with_logits": Case(info.self_information_with_logits, oracle.self_information),
    }[name]
    mask = np.array([True, False, True, True, False])
    operands = [rng.dirichlet(np.ones(5), size=3).astype(np.float32) for _ in range(case.operands)]
    dirty = [np.where(mask, x, NAN).astype(np.float32) for x in operands]
    got = jax.jit(lambda *x: case.measure(*x, where=mask))(*dirty)
    want = compiled(case.measure)(*(x[:, mask] for x in operands))
    if name == "self_information_with_logits":
        assert np.all(np.isposinf(got[:, ~mask]))
        got = got[:, mask]
    np.testing.assert_allclose(got, want, rtol=2e-6)
    if name in ("kl(p, q)", "renyi_2(p)", "kl_divergence_with_logits"):
        gradient = jax.jit(jax.grad(lambda *x: case.measure(*x, where=mask).sum()))(*dirty)
        assert np.all(gradient[:, ~mask] == 0)
        assert np.all(np.isfinite(gradient))


UNITS = [
    (info.self_information, 1),
    (info.entropy, 1),
    (CASES["renyi_2(p)"].measure, 1),
    (info.cross_entropy, 2),
    (info.kl_divergence, 2),
    (info.jensen_shannon_divergence, 2),
    (lambda p, q, **options: info.generalized_jensen_shannon_divergence(np.stack([p, q]), **options), 2),
    (CASES["renyi_2(p, q)"].measure, 2),
    (info.self_information_with_logits, 1),
    (info.entropy_with_logits, 1),
    (info.cross_entropy_with_logits, 2),
    (info.kl_divergence_with_logits, 2),
]


@pytest.mark.parametrize(("measure", "operands"), UNITS)
def test_units(measure: Any, operands: int, rng: np.random.Generator):
    arrays = rng.dirichlet(np.ones(4), size=(operands, 3)).astype(np.float32)
    traced = jax.jit(lambda base: (measure(*arrays), measure(*arrays, base=2), measure(*arrays, base=base)))
    nats, bits, traced_bits = traced(2.0)
    nats = np.asarray(nats, np.float64)
    for base in (2, 10.0, np.float32(3), 0.5, jnp.int32(2), np.e) if measure is info.entropy else ():
        assert_close(measure(*arrays, base=base), nats / math.log(base), ulp=2, dtype=np.float32)
    for got in (bits, traced_bits):
        assert_close(got, nats / math.log(2), ulp=2, dtype=np.float32)
    for base in (1.0, 0.0, -2.0, math.inf, NAN):
        assert np.all(np.isnan(traced(base)[2]))
        with pytest.raises(ValueError, match="`base` must be positive, finite and not 1, got"):
            measure(*arrays, base=base)


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures


@pytest.mark.grid
@pytest.mark.parametrize("weights", [None, [1, 0, 2], [0.25, 0.5, 0.25]])
def test_the_divergence_of_several_distributions(weights: Any, rng: np.random.Generator):
    p = draw_probabilities(rng, (3, 4, 5))
    exact = functools.partial(oracle.generalized_jensen_shannon_divergence, weights=weights or [1, 1, 1])
    want = oracle.by_row(exact, *p)
    got = info.generalized_jensen_shannon_divergence(p, weights=weights)
    assert_close(got, want, ulp=8, dtype=np.float32)
    moved = np.moveaxis(p, (0, 1, 2), (1, 2, 0))
    options = {"weights": weights, "distribution_axis": -2, "axis": 0}
    np.testing.assert_array_equal(info.generalized_jensen_shannon_divergence(moved, **options), got)
    assert info.generalized_jensen_shannon_divergence(moved, **options, keepdims=True).shape == (1, 1, 4)
    joint = np.moveaxis(p, 0, 1) * np.asarray(weights or [1, 1, 1], np.float32)[:, None]
    table = joint / joint.sum(axis=(1, 2), keepdims=True)
    assert_close(info.mutual_information(table), want, ulp=8, dtype=np.float32, size=1)
    two = info.generalized_jensen_shannon_divergence(p[:2], weights=f32([1, 3]))
    np.testing.assert_array_equal(info.jensen_shannon_divergence(*p[:2], weight=0.25), two)


def test_distributions_that_differ_in_one_bit():
    p = np.full(4, 0.25, np.float32)
    q = p + f32([2.0**-24, -(2.0**-24), 0, 0])
    for arrays, weights in (((p, q), [1, 1]), ((p, q, p), [1, 1, 1]), ((q, p, p, p, p, p, p), [1] * 7)):
        want = oracle.value(functools.partial(oracle.generalized_jensen_shannon_divergence, weights=weights), *arrays)
        assert 0 < want < 1e-14
        got = info.generalized_jensen_shannon_divergence(np.stack(arrays), weights=f32(weights))
        assert_close(got, want, ulp=16, dtype=np.float32)
    assert info.generalized_jensen_shannon_divergence(np.stack([q] * 7)) == 0


@pytest.mark.grid
def test_the_derivative_with_respect_to_shares():
    p, q = f32([0.5, 0.25, 0.25]), f32([0.125, 0.125, 0.75])

    def divergence(w: jax.Array) -> jax.Array:
        return info.jensen_shannon_divergence(p, q, weight=w)

    slope, curvature = jax.jit(jax.grad(divergence)), jax.jit(jax.hessian(divergence))
    for w in (0.0, 0.25, 1.0):
        m = w * p + (1 - w) * q
        want = info.kl_divergence(p, m) - info.kl_divergence(q, m)
        np.testing.assert_allclose(slope(w), want, rtol=1e-5)
        want = -np.sum((p - q) ** 2 / m)
        np.testing.assert_allclose(curvature(w), want, rtol=1e-5)
    # Of what P has and Q has not, a first share of P costs infinitely much.
    p = f32([0.5, 0.5, 0])
    assert np.isposinf(jax.grad(lambda w: info.jensen_shannon_divergence(f32([1, 0, 0]), p, weight=1 - w))(0.0))
    stacked = np.stack([p, q, q])
    several = jax.jit(jax.grad(lambda w: info.generalized_jensen_shannon_divergence(stacked, weights=w)))
    slopes = several(f32([1, 1, 2]))
    total = info.generalized_jensen_shannon_divergence(stacked, weights=f32([1, 1, 2]))
    m = (p + 3 * q) / 4
    np.testing.assert_allclose(slopes, [(info.kl_divergence(x, m) - total) / 4 for x in stacked], atol=1e-7)
