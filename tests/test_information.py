"""The information measures: values and derivatives against the oracle, the edges, shapes, units, bad input."""

import collections
import dataclasses
import functools
import heapq
import inspect
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles_information as oracle
import pytest
from cases import DTYPES, draw_probabilities, precision
from jax.test_util import check_grads
from oracles import assert_close

import jaxent as info

INF, NAN = math.inf, math.nan


def f32(x: Any) -> np.ndarray:
    return np.array(x, np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A measure of one or two vectors, its oracle, and the ulp that a float32 value may be off."""

    measure: Callable[..., Any]
    oracle: Callable[..., Any]
    operands: int = 1
    ulp: float = 4


class Derivatives(NamedTuple):
    """Of a measure by each operand; the Hessian has a row and a column of blocks."""

    value: Any
    gradient: Any
    forward: Any
    hessian: Any


@functools.cache
def compiled(measure: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(measure)


@functools.cache
def differentiated(measure: Callable[..., Any], operands: int) -> Callable[..., Derivatives]:
    """Value and derivatives by all operands in one program, compiled once for all tests of three classes."""
    every = tuple(range(operands))

    def of(*x: jax.Array) -> Derivatives:
        derivatives = (d(measure, every)(*x) for d in (jax.grad, jax.jacfwd, jax.hessian))
        return Derivatives(measure(*x), *derivatives)

    return jax.jit(of)


def order_case(name: str, order: float, operands: int, ulp: float) -> Case:
    measure, exact = (functools.partial(getattr(module, name), order=order) for module in (info, oracle))
    return Case(measure, exact, operands, ulp)


ONE = {
    "entropy": Case(info.entropy, oracle.entropy),
    "perplexity": Case(info.perplexity, oracle.perplexity),
    **{f"renyi_{a:g}": order_case("renyi_entropy", a, 1, 8) for a in (0, 0.25, 0.5, 1, 1.5, 2, 7, INF)},
    **{f"tsallis_{a:g}": order_case("tsallis_entropy", a, 1, 6) for a in (0, 0.25, 0.5, 1, 1.5, 2, 7)},
    **{f"renyi_1{e:+g}": order_case("renyi_entropy", 1 + e, 1, 6) for e in (-1e-6, 1e-6)},
    **{f"tsallis_1{e:+g}": order_case("tsallis_entropy", 1 + e, 1, 6) for e in (-1e-6, 1e-6)},
}
TWO = {
    "cross_entropy": Case(info.cross_entropy, oracle.cross_entropy, 2),
    "kl": Case(info.kl_divergence, oracle.kl_divergence, 2),
    "js": Case(info.jensen_shannon_divergence, oracle.jensen_shannon_divergence, 2),
    **{f"renyi_{a:g}": order_case("renyi_divergence", a, 2, 8) for a in (0, 0.25, 0.5, 1, 1.5, 2, 7, INF)},
    **{f"renyi_1{e:+g}": order_case("renyi_divergence", 1 + e, 2, 6) for e in (-1e-6, 1e-6)},
}
CASES = {f"{name}({'p' if c.operands == 1 else 'p, q'})": c for d in (ONE, TWO) for name, c in d.items()}
LOGITS = {
    "entropy_with_logits": Case(info.entropy_with_logits, oracle.of_logits(oracle.entropy)),
    "cross_entropy_with_logits": Case(info.cross_entropy_with_logits, oracle.of_logits(oracle.cross_entropy), 2),
    "kl_divergence_with_logits": Case(info.kl_divergence_with_logits, oracle.of_logits(oracle.kl_divergence), 2),
}
# Every order is a program of its own; these stand for the others where derivatives are compiled too.
FEW = [
    "entropy(p)", "perplexity(p)", "renyi_0.5(p)", "renyi_2(p)", "renyi_inf(p)", "renyi_1+1e-06(p)", "tsallis_0.5(p)",
    "tsallis_2(p)", "cross_entropy(p, q)", "kl(p, q)", "js(p, q)", "renyi_0.25(p, q)", "renyi_0.5(p, q)",
    "renyi_2(p, q)", "renyi_inf(p, q)", "renyi_1+1e-06(p, q)",
]  # fmt: skip
D = {a: CASES[f"renyi_{a:g}(p, q)"].measure for a in (0, 0.25, 0.5, 2, INF)}
H = {a: CASES[f"renyi_{a:g}(p)"].measure for a in (0.5, 2, INF)}
S = {a: CASES[f"tsallis_{a:g}(p)"].measure for a in (0.5, 2)}


def draw_close(rng: np.random.Generator, shape: tuple[int, ...], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Two positive distributions of multiples of 2**-24, all of whose entries differ by up to `steps` of those."""
    count = shape[-1]
    p = 1 + rng.multinomial(2**24 - count, rng.dirichlet(np.full(count, 5.0), size=shape[:-1]))
    change = rng.integers(-steps, steps + 1, size=shape)
    change = np.where(p > 4 * steps * count, change, 0)
    change[..., 0] -= change.sum(axis=-1)
    return (p / 2**24).astype(np.float32), ((p + change) / 2**24).astype(np.float32)


def draw_positive(rng: np.random.Generator, count: int) -> np.ndarray:
    return ((1 + rng.multinomial(2**12 - count, np.full(count, 1 / count))) / 2**12).astype(np.float32)


def draw_grid(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Logits on a grid of 2**-10, whose differences are exact."""
    return (np.round(rng.normal(size=shape) * scale * 1024) / 1024).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("name", CASES)
def test_values(name: str, rng: np.random.Generator):
    case = CASES[name]
    arrays = [draw_probabilities(rng, (24, 5)) for _ in range(case.operands)]
    got = compiled(case.measure)(*arrays)
    assert got.dtype == np.float32
    assert_close(got, oracle.by_row(case.oracle, *arrays), ulp=case.ulp, dtype=np.float32)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float32"])
@pytest.mark.parametrize("name", ["entropy(p)", "cross_entropy(p, q)", "kl(p, q)", "js(p, q)", "renyi_2(p, q)"])
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
    "name", [n for n in CASES if "p, q" in n and "cross" not in n and "_0(" not in n and "_inf(" not in n]
)
@pytest.mark.parametrize("steps", [1, 2**6, 2**12])
def test_nearly_equal_distributions(name: str, steps: int, rng: np.random.Generator):
    case = CASES[name]
    p, q = draw_close(rng, (24, 5), steps)
    want = oracle.by_row(case.oracle, p, q)
    assert want.min() < {1: 1e-12, 2**6: 1e-8, 2**12: 1e-4}[steps]
    assert_close(compiled(case.measure)(p, q), want, ulp=8, dtype=np.float32)


def test_kl_of_7e_15():
    p = np.array([0.5, 0.5], np.float32)
    q = np.array([0.5 - 2.0**-24, 0.5 + 2.0**-24], np.float32)
    want = float(oracle.value(oracle.kl_divergence, p, q))
    assert 7e-15 < want < 7.2e-15
    assert float(info.kl_divergence(p, q)) == pytest.approx(want, rel=1e-6)
    assert float(info.jensen_shannon_divergence(p, q)) == pytest.approx(want / 4, rel=1e-6)


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
# Two variables


def draw_joint(rng: np.random.Generator) -> np.ndarray:
    return draw_probabilities(rng, (12,)).reshape(3, 4)


def test_joint_measures(rng: np.random.Generator):
    for _ in range(6):
        p = draw_joint(rng)
        flat = p.ravel()
        assert_close(info.joint_entropy(p), oracle.value(oracle.entropy, flat), ulp=4, dtype=np.float32)
        want = oracle.value(oracle.mutual_information, flat, columns=4)
        assert_close(info.mutual_information(p), want, ulp=8, dtype=np.float32)
        for axis, known in ((-2, 0), (0, 0), (-1, 1), (1, 1)):
            want = oracle.value(oracle.conditional_entropy, flat, columns=4, known=known)
            assert_close(info.conditional_entropy(p, axis=axis), want, ulp=4, dtype=np.float32)


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


@pytest.mark.parametrize(
    ("measure", "exact"),
    [
        (info.joint_entropy, oracle.entropy),
        (
            functools.partial(info.conditional_entropy, axis=-1),
            functools.partial(oracle.conditional_entropy, columns=3, known=1),
        ),
        (
            functools.partial(info.conditional_entropy, axis=-2),
            functools.partial(oracle.conditional_entropy, columns=3, known=0),
        ),
        (info.mutual_information, functools.partial(oracle.mutual_information, columns=3)),
    ],
)
def test_derivatives_of_joint_measures(measure: Any, exact: Any, rng: np.random.Generator):
    p = draw_positive(rng, 6)

    def of(flat):
        return measure(flat.reshape(2, 3))

    want, curved = oracle.gradient(exact, p), oracle.hessian(exact, p)
    got = differentiated(of, 1)
    gradient, forward, hessian = (np.asarray(jax.tree.leaves(x)[0]) for x in got(p)[1:])
    assert_close(forward, gradient, ulp=2, dtype=np.float32, size=np.abs(want).max())
    # Mutual information leaves out the constant that the direction off the simplex adds.
    tangent = np.eye(6) - 1 / 6
    assert_close(tangent @ gradient, tangent @ want, ulp=8, dtype=np.float32, size=np.abs(want).max())
    assert_close(
        tangent @ hessian @ tangent,
        tangent @ curved @ tangent,
        ulp=16,
        dtype="f4",
        size=np.abs(curved).max(),
    )
    zero = f32([0.5, 0, 0, 0, 0.25, 0.25])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got(zero)))
    assert np.all(got(zero).gradient[0][zero == 0] == 0)


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("name", [*FEW, *LOGITS])
def test_derivatives(name: str, rng: np.random.Generator):
    case = {**CASES, **LOGITS}[name]
    draw = (lambda: draw_grid(rng, (3,), 1)) if name in LOGITS else (lambda: draw_positive(rng, 3))
    vectors = [draw() for _ in range(case.operands)]
    got = differentiated(case.measure, case.operands)(*vectors)
    want, curved = oracle.gradient(case.oracle, *vectors), oracle.hessian(case.oracle, *vectors)
    for gradient in (got.gradient, got.forward):
        assert_close(np.concatenate(gradient), want, ulp=8, dtype=np.float32, size=np.abs(want).max())
    assert_close(np.block([list(row) for row in got.hessian]), curved, ulp=16, dtype="f4", size=np.abs(curved).max())


@pytest.mark.parametrize("name", ["kl(p, q)", "js(p, q)", "renyi_0.5(p, q)", "renyi_2(p, q)"])
def test_the_gradient_of_nearly_equal_distributions_keeps_its_digits(name: str):
    case = CASES[name]
    p = f32([0.5, 0.25, 0.25])
    q = p + f32([3 * 2.0**-24, -(2.0**-23), -(2.0**-24)])
    want = oracle.gradient(case.oracle, p, q)
    assert 0 < np.abs(want).max() < 1e-6
    assert_close(np.concatenate(differentiated(case.measure, 2)(p, q).gradient), want, ulp=8, dtype=np.float32)


def test_the_gradient_of_kl_between_logits_keeps_its_digits(rng: np.random.Generator):
    case = LOGITS["kl_divergence_with_logits"]
    z = draw_grid(rng, (3,), 1)
    pairs = [
        (z, z + draw_grid(rng, (3,), 0.01)),
        (z, f32([60, 0, 1])),
        # P has its mass at class 0, Q a little less of it there: what is missing to one is all that is left.
        (f32([40, 0, -5]), f32([30, 0, -5])),
        (f32([40, 0, -5]), f32([0, 30, 5])),
    ]
    for p, q in pairs:
        want = oracle.gradient(case.oracle, p, q)
        got = np.concatenate(differentiated(case.measure, 2)(p, q).gradient)
        assert_close(got, want, ulp=24, dtype=np.float32)


@pytest.mark.parametrize("name", ["kl(p, q)", "kl_divergence_with_logits"])
def test_check_grads(name: str):
    case = {**CASES, **LOGITS}[name]
    with jax.enable_x64(True):
        point = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.125, 0.5, 0.375])
        check_grads(jax.jit(case.measure), point, order=2, modes=("fwd", "rev"), rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The edges: value, derivative by p, derivative by q; None is "finite, not looked at"

L2, E = math.log(2), math.e
EDGES = {
    "entropy: p = 0": (info.entropy, [[0.5, 0.5, 0]], L2, [[L2 - 1, L2 - 1, 0]]),
    "entropy: certain": (info.entropy, [[0, 1, 0]], 0, [[0, -1, 0]]),
    "kl: p = 0": (info.kl_divergence, [[0, 1, 0], [0.5, 0.5, 0]], L2, [[0, L2, 0], [1, -1, 1]]),
    "kl: q = 0": (info.kl_divergence, [[0.5, 0.5, 0], [0, 1, 0]], INF, [[INF, -L2, 0], [-INF, 0.5, 1]]),
    "ce: p = 0": (info.cross_entropy, [[0, 1, 0], [0.5, 0.5, 0]], L2, [[L2, L2, 0], [0, -2, 0]]),
    "ce: q = 0": (info.cross_entropy, [[0.5, 0.5, 0], [0, 1, 0]], INF, [[INF, 0, 0], [-INF, -0.5, 0]]),
    "ce: q = 1e-20": (info.cross_entropy, [[0, 1, 0], [1e-20, 1, 0]], 0, [[20 * math.log(10), 0, 0], [0, -1, 0]]),
    "js: 0": (info.jensen_shannon_divergence, [[0, 1, 0], [1, 0, 0]], L2, [[0, L2 / 2, 0], [L2 / 2, 0, L2 / 2]]),
    "H_1/2: p = 0": (H[0.5], [[0.5, 0.5, 0]], L2, [[-1, -1, 0]]),
    "H_2: p = 0": (H[2], [[0.5, 0.5, 0]], L2, [[-1, -1, 1]]),
    "H_inf: p = 0": (H[INF], [[0.5, 0.25, 0]], L2, [[-2, 0, 0]]),
    "S_1/2: p = 0": (S[0.5], [[1, 0, 0]], 0, [[-1, 0, 0]]),
    "S_2: p = 0": (S[2], [[1, 0, 0]], 0, [[-1, 1, 1]]),
    "D_0: p = 0": (D[0], [[0, 1, 0], [0.5, 0.5, 0]], L2, [[0, 0, 0], [1, -1, 1]]),
    "D_1/4: p = q = 0": (D[0.25], [[0, 1, 0], [0, 1, 0]], 0, [[0, 0, 0], [0, 0, 0]]),
    "D_1/2: p = 0": (D[0.5], [[0, 1, 0], [0.75, 0.25, 0]], 2 * L2, [[0, 0, 0], [1, -3, 0]]),
    "D_1/2: q = 0": (D[0.5], [[0.75, 0.25, 0], [0, 1, 0]], 2 * L2, [[1, -3, 0], [0, 0, 0]]),
    "D_1/2: disjoint": (D[0.5], [[0, 1, 0], [1, 0, 0]], INF, None),
    "D_2: p = 0": (D[2], [[0, 1, 0], [0.5, 0.5, 0]], L2, [[-2, 0, -2], [1, -1, 1]]),
    "D_2: q = 0": (D[2], [[0.5, 0.5, 0], [0, 1, 0]], INF, [[INF, 0, 0], [-INF, 0, 0]]),
    "D_inf: p = 0": (D[INF], [[0, 1, 0], [0.5, 0.5, 0]], L2, [[0, 1, 0], [0, -2, 0]]),
    "D_inf: q = 0": (D[INF], [[0.5, 0.5, 0], [0, 1, 0]], INF, [[INF, 0, 0], [-INF, 0, 0]]),
    "H(z): -inf": (info.entropy_with_logits, [[0, -INF, 0]], L2, [[0, 0, 0]]),
    "H(z): +inf": (info.entropy_with_logits, [[0, INF, 0]], NAN, [[NAN] * 3]),
    "H(z): only -inf": (info.entropy_with_logits, [[-INF] * 3], NAN, [[NAN] * 3]),
    "H(z, z): p = q = 0": (info.cross_entropy_with_logits, [[0, -INF, 0]] * 2, L2, [[0, 0, 0]] * 2),
    "H(z, z): q = 0": (
        info.cross_entropy_with_logits, [[0, 0, -INF], [0, -INF, -INF]], INF, [[-INF, INF, 0], [0.5, -0.5, 0]],
    ),
    "D(z, z): p = q = 0": (info.kl_divergence_with_logits, [[0, -INF, 0]] * 2, 0, [[0, 0, 0]] * 2),
    "D(z, z): p = 0": (
        info.kl_divergence_with_logits, [[0, -INF, -INF], [0, 0, -INF]], L2, [[0, 0, 0], [-0.5, 0.5, 0]],
    ),
    "D(z, z): q = 0": (
        info.kl_divergence_with_logits, [[0, 0, 1], [0, -INF, 1]], INF,
        [[-INF, INF, -INF], [1 / (1 + E) - 1 / (2 + E), -1 / (2 + E), E / (1 + E) - E / (2 + E)]],
    ),
    "D(z, z): nan": (info.kl_divergence_with_logits, [[0, 0, 0], [0, NAN, 0]], NAN, [[NAN] * 3] * 2),
    "D(z, z): far": (
        info.kl_divergence_with_logits, [[1e30, 0, -1e30], [0, 1e4, 0]], 1e4, [[0, 0, 0], [-1, 1, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str):
    measure, operands, value, slopes = EDGES[name]
    got = differentiated(measure, len(operands))(*(f32(x) for x in operands))
    near = {"ulp": 4, "dtype": np.float32, "size": 1.0}
    assert_close(got.value, value, **near)
    if slopes is not None:
        assert_close(got.gradient, slopes, **near)
        assert_close(got.forward, slopes, **near)
    if math.isfinite(value):
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got.hessian))


def test_second_derivatives_at_a_pole():
    p, q = f32([0.5, 0.5, 0]), f32([0, 1, 0])
    for measure in (info.kl_divergence, info.cross_entropy):
        (_, pq), (qp, qq) = differentiated(measure, 2)(p, q).hessian
        np.testing.assert_array_equal(pq, np.diag([-INF, -1, 0]))
        np.testing.assert_array_equal(qp, pq)
        np.testing.assert_array_equal(qq, np.diag([INF, 0.5, 0]))
    z_p, z_q = f32([0, 0, 1]), f32([0, -INF, 0])
    _, (_, qq) = differentiated(info.kl_divergence_with_logits, 2)(z_p, z_q).hessian
    np.testing.assert_allclose(qq, [[0.25, 0, -0.25], [0, 0, 0], [-0.25, 0, 0.25]], atol=1e-7)


def test_self_information_edges():
    x = f32([0, 0.5, 1])
    np.testing.assert_allclose(info.self_information(x), [INF, L2, 0], rtol=1e-7)
    want = np.diag([-INF, -2, -1])
    for derivative in (jax.jacfwd, jax.jacrev):
        np.testing.assert_array_equal(derivative(info.self_information)(x), want)
    assert jnp.isnan(info.self_information(jnp.float32(-0.5)))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("bad", [-0.25, -1e-30, NAN])
def test_no_plausible_number_for_what_is_no_probability(name: str, bad: float):
    case = CASES[name]
    good, wrong = f32([0.25, 0.25, 0.5]), f32([bad, 0.5, 0.5])
    for at in range(case.operands):
        got = differentiated(case.measure, case.operands)(*(wrong if i == at else good for i in range(case.operands)))
        assert np.isnan(got.value)
        # Order infinity looks at one entry only; its derivative by the others is 0.
        assert np.isnan(got.gradient[at][0]) or name == "renyi_inf(p)"


def test_no_plausible_number_for_what_is_no_joint_distribution():
    for bad in (-0.25, NAN):
        p = f32([[bad, 0.5], [0.25, 0.5]])
        for measure in (info.joint_entropy, info.mutual_information, info.conditional_entropy):
            assert np.isnan(measure(p))


# ----------------------------------------------------------------------------------------------------------------------
# Shapes, classes, units


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((7,), 0), ((1,), -1), ((0, 3), -1), ((3, 0), 0), ((2, 1, 5), 2), ((2, 5, 3), 1), ((5, 2, 3), -3)],
)
@pytest.mark.parametrize("name", ["renyi_2(p)", "kl(p, q)", "kl_divergence_with_logits"])
def test_shapes_and_axes(name: str, shape: tuple[int, ...], axis: int, rng: np.random.Generator):
    case = {**CASES, **LOGITS}[name]
    last = (*(n for i, n in enumerate(shape) if i != axis % len(shape)), shape[axis])
    arrays = [draw_probabilities(rng, last) for _ in range(case.operands)]
    moved = [np.moveaxis(a, -1, axis) for a in arrays]
    got = jax.jit(lambda *x: case.measure(*x, axis=axis))(*moved)
    assert got.shape == last[:-1]
    assert_close(got, oracle.by_row(case.oracle, *arrays), ulp=8, dtype=np.float32, size=1e-6 if name in LOGITS else 0)


@pytest.mark.parametrize("name", ["kl(p, q)", "renyi_2(p, q)", "kl_divergence_with_logits"])
def test_batch_dimensions_broadcast(name: str, rng: np.random.Generator):
    measure = {**CASES, **LOGITS}[name].measure
    p = rng.dirichlet(np.ones(4), size=(3, 1)).astype(np.float32)
    q = rng.dirichlet(np.ones(4), size=5).astype(np.float32)
    want = np.array([[compiled(measure)(a[0], b) for b in q] for a in p])
    np.testing.assert_allclose(measure(p, q), want, rtol=1e-6)
    np.testing.assert_allclose(measure(p[0, 0], q), want[0], rtol=1e-6)
    np.testing.assert_allclose(measure(p.transpose(2, 0, 1), q.T[:, None, :], axis=0), want, rtol=1e-6)


@pytest.mark.parametrize("name", [*FEW, *LOGITS, "self_information_with_logits"])
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
    want = jax.jit(case.measure)(*(x[:, mask] for x in operands))
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
    (CASES["renyi_2(p, q)"].measure, 2),
    (info.self_information_with_logits, 1),
    (info.entropy_with_logits, 1),
    (info.cross_entropy_with_logits, 2),
    (info.kl_divergence_with_logits, 2),
]


@pytest.mark.parametrize(("measure", "operands"), UNITS)
def test_units(measure: Any, operands: int, rng: np.random.Generator):
    arrays = rng.dirichlet(np.ones(4), size=(operands, 3)).astype(np.float32)
    nats = np.asarray(measure(*arrays), np.float64)
    for base in (2, 10.0, np.float32(3), 0.5, jnp.int32(2), np.e) if measure is info.entropy else (2,):
        assert_close(measure(*arrays, base=base), nats / math.log(base), ulp=2, dtype=np.float32)
    traced = jax.jit(lambda base: measure(*arrays, base=base))
    assert_close(traced(2.0), nats / L2, ulp=2, dtype=np.float32)
    for base in (1.0, 0.0, -2.0, INF, NAN):
        assert np.all(np.isnan(traced(base)))
        with pytest.raises(ValueError, match="`base` must be positive, finite and not 1, got"):
            measure(*arrays, base=base)


def test_units_of_two_variables(rng: np.random.Generator):
    p = draw_joint(rng)
    for measure in (info.joint_entropy, info.conditional_entropy, info.mutual_information):
        assert_close(measure(p, base=2), np.array(measure(p), float) / L2, ulp=2, dtype=np.float32)
        assert measure(np.stack([p, p])).shape == (2,)


# ----------------------------------------------------------------------------------------------------------------------
# The empirical distribution


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_empirical_distribution(dtype: Any, rng: np.random.Generator):
    labels = rng.integers(0, 100, size=(30, 41)).astype(dtype)
    got = info.empirical_distribution(labels, 1000)
    assert_close(got, np.bincount(labels.ravel(), minlength=1000) / labels.size, ulp=1, dtype=np.float32)
    assert got.dtype == np.float32


def test_empirical_distribution_with_weights(rng: np.random.Generator):
    labels, weights = rng.integers(0, 5, size=64), (rng.integers(0, 9, size=64) / 8).astype(np.float32)
    want = np.bincount(labels, weights, minlength=5) / weights.sum()
    assert_close(info.empirical_distribution(labels, 5, weights=weights), want, ulp=2, dtype=np.float32)
    slope = jax.jacfwd(lambda w: info.empirical_distribution(labels, 5, weights=w))(weights)
    np.testing.assert_allclose(slope, (np.eye(5)[labels].T - want[:, None]) / weights.sum(), atol=1e-7)
    stacked = jax.vmap(lambda y: info.empirical_distribution(y, 5))(labels.reshape(4, 16))
    np.testing.assert_allclose(stacked.mean(axis=0), info.empirical_distribution(labels, 5), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3, 127, -128])
def test_labels_out_of_range_have_no_distribution(label: int):
    labels = np.array([0, 1, label], np.int8)
    assert np.all(np.isnan(info.empirical_distribution(labels, 3)))
    np.testing.assert_array_equal(info.empirical_distribution(labels, 3, weights=f32([1, 1, 0])), [0.5, 0.5, 0])
    slope = jax.jacfwd(lambda w: info.empirical_distribution(labels, 3, weights=w))(f32([1, 1, 0]))
    np.testing.assert_array_equal(slope[:, 2], [0, 0, 0])
    assert np.all(np.isnan(info.empirical_distribution(labels[:2], 3, weights=f32([2, -1]))))
    assert np.all(np.isnan(info.empirical_distribution(labels[:0], 3)))
    assert np.all(np.isnan(info.empirical_distribution(labels[:2], 3, weights=f32([0, 0]))))


# ----------------------------------------------------------------------------------------------------------------------
# What entropy means


def huffman_lengths(counts: dict[int, int]) -> dict[int, int]:
    heap = [(n, i, {symbol: 0}) for i, (symbol, n) in enumerate(counts.items())]
    heapq.heapify(heap)
    while len(heap) > 1:
        (n_a, i, a), (n_b, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (n_a + n_b, i, {s: depth + 1 for s, depth in (a | b).items()}))
    return heap[0][2]


@pytest.mark.parametrize("module", [heapq, string, inspect])
def test_no_code_is_shorter_than_the_entropy(module: Any):
    """Shannon's source coding theorem on real bytes: H <= L < H + 1, for Huffman's code and for Shannon's lengths."""
    data = inspect.getsource(module).encode()
    p = info.empirical_distribution(np.frombuffer(data, np.uint8), 256)
    bits = float(info.entropy(p, base=2))
    lengths = huffman_lengths(collections.Counter(data))
    assert sum(2.0**-n for n in lengths.values()) == 1, "Kraft: a complete prefix code"
    huffman = sum(lengths[b] for b in data) / len(data)
    used = np.asarray(p) > 0
    shannon_lengths = np.ceil(info.self_information(p[used], base=2))
    assert np.sum(2.0**-shannon_lengths) <= 1, "Kraft: a prefix code with these lengths exists"
    shannon = float(np.sum(p[used] * shannon_lengths))
    assert bits <= huffman <= shannon < bits + 1
    uniform = np.full(256, 1 / 256, np.float32)
    assert float(info.cross_entropy(p, uniform, base=2)) == pytest.approx(8, rel=1e-6)
    assert float(info.kl_divergence(p, uniform, base=2)) == pytest.approx(8 - bits, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input

P3, P4 = np.full(3, 1 / 3, np.float32), np.full(4, 0.25, np.float32)
BAD = {
    "integers": (info.entropy, ([1, 0],), {}, TypeError, r"jaxent\.entropy: `p` must have a floating dtype, got int"),
    "q of integers": (info.kl_divergence, (P3, [1, 0, 0]), {}, TypeError, r"`q` must have a floating dtype"),
    "text": (info.self_information, ("half",), {}, TypeError, r"self_information: `p` must have a floating dtype"),
    "a scalar": (info.entropy, (0.5,), {}, ValueError, r"entropy: `p` must have a class axis at -1, got float"),
    "no classes": (info.entropy, (P3[:0],), {}, ValueError, r"entropy: `p` must have at least one class"),
    "axis": (info.entropy, (P3,), {"axis": 1}, ValueError, r"entropy: `axis` must lie in \[-1, 1\)"),
    "axis of bool": (info.entropy, (P3,), {"axis": True}, TypeError, r"entropy: `axis` must be an int"),
    "where": (info.entropy, (P3,), {"where": P3}, TypeError, r"entropy: `where` must have dtype bool"),
    "where's shape": (
        info.kl_divergence, (P3, P3), {"where": [True, False]}, ValueError,
        r"`where` must broadcast to shape \(3,\), that of `p` and `q`, got bool\[2\]",
    ),
    "classes": (
        info.kl_divergence, (P3, P4), {}, ValueError,
        r"kl_divergence: `q` must have 3 classes at axis -1, as `p` has, got float32\[4\]",
    ),
    "one class is not broadcast": (info.kl_divergence, (P3, P3[:1]), {}, ValueError, r"`q` must have 3 classes"),
    "batch": (
        info.cross_entropy, (np.ones((2, 3), "f4"), np.ones((4, 3), "f4")), {}, ValueError,
        r"cross_entropy: `q` must broadcast against `p`, float32\[2,3\], got float32\[4,3\]",
    ),
    "logits": (info.kl_divergence_with_logits, (P3, P4), {}, ValueError, r"`q_logits` must have 3 classes"),
    "base of text": (info.entropy, (P3,), {"base": "two"}, TypeError, r"entropy: `base` must have a floating dtype"),
    "base of two numbers": (info.entropy, (P3,), {"base": [2, 3]}, ValueError, r"entropy: `base` must be a scalar"),
    "order": (info.renyi_entropy, (P3, -1), {}, ValueError, r"renyi_entropy: `order` must lie in \[0, inf\], got -1"),
    "order nan": (info.renyi_divergence, (P3, P3, NAN), {}, ValueError, r"renyi_divergence: `order` must lie in"),
    "order inf": (info.tsallis_entropy, (P3, INF), {}, ValueError, r"`order` must lie in \[0, inf\), got inf"),
    "order array": (
        info.renyi_entropy, (P3, jnp.float32(2)), {}, TypeError,
        r"renyi_entropy: `order` must be a Python number, known when the function is traced, got float32\[\]",
    ),
    "one variable": (info.joint_entropy, (P3,), {}, ValueError, r"joint_entropy: `pxy` must have two class axes"),
    "batch axis": (
        info.conditional_entropy, (np.ones((2, 3, 4), "f4"),), {"axis": 0}, ValueError,
        r"conditional_entropy: `axis` must be one of the last two of 3, got -3",
    ),
    "float labels": (info.empirical_distribution, (P3, 3), {}, TypeError, r"`labels` must have an integer dtype"),
    "num_classes": (info.empirical_distribution, ([0], 0), {}, ValueError, r"`num_classes` must be at least 1, got 0"),
    "num_classes of float": (info.empirical_distribution, ([0], 3.0), {}, TypeError, r"`num_classes` must be an int"),
    "weights": (info.empirical_distribution, ([0], 3), {"weights": P3}, ValueError, r"must have shape \(1,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    function, arguments, options, error, match = BAD[name]
    with pytest.raises(error, match=match):
        function(*arguments, **options)
