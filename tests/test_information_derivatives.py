"""Derivatives of the information measures up to the third, and the edges, where a probability is 0 or tiny.

They are in one file because they share one program for each measure, which takes a second to trace.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles_information as oracle
import pytest
from cases import marked
from jax.test_util import check_grads
from measures import CASES, FEW, INF, LOGITS, NAN, differentiated, draw_grid, draw_positive, f32, third_derivative
from oracles import assert_close

import jaxent as info

# ----------------------------------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("name", [*FEW, *LOGITS])
def test_derivatives(name: str, rng: np.random.Generator):
    case = {**CASES, **LOGITS}[name]
    draw = (lambda: draw_grid(rng, (3,), 1)) if name in LOGITS else (lambda: draw_positive(rng, 3))
    vectors = [draw() for _ in range(case.operands)]
    while case.operands == 2 and np.any(vectors[0] == vectors[1]):  # where a distance has no derivative
        vectors[1] = draw()
    got = differentiated(case.measure, case.operands)(*vectors)
    want, curved = oracle.gradient(case.oracle, *vectors), oracle.hessian(case.oracle, *vectors)
    for gradient in (got.gradient, got.forward):
        assert_close(np.concatenate(gradient), want, ulp=8, dtype=np.float32, size=np.abs(want).max())
    assert_close(np.block([list(row) for row in got.hessian]), curved, ulp=16, dtype="f4", size=np.abs(curved).max())


@pytest.mark.parametrize("name", ["kl(p, q)", "js(p, q)", "js_1/8(p, q)", "renyi_0.5(p, q)", "renyi_2(p, q)"])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl(p, q)", "kl_divergence_with_logits"])
def test_finite_differences(name: str):
    case = {**CASES, **LOGITS}[name]
    with jax.enable_x64(True):
        point = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.125, 0.5, 0.375])
        check_grads(jax.jit(case.measure), point, order=2, modes=("fwd", "rev"), rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The edges: value, derivative with respect to p, to q; None is "not looked at"

L2, E = math.log(2), math.e
D = {a: CASES[f"renyi_{a:g}(p, q)"].measure for a in (0, 0.25, 0.5, 1, 2, 1e3, INF)}
H = {a: CASES[f"renyi_{a:g}(p)"].measure for a in (0.5, 1, 2, 1e38, INF)}
S = {a: CASES[f"tsallis_{a:g}(p)"].measure for a in (0.5, 2)}
PP, JS, TV, HELLINGER = (
    CASES[f"{name}"].measure for name in ("perplexity(p)", "js(p, q)", "tv(p, q)", "hellinger(p, q)")
)
EDGES = {
    "entropy: p = 0": (info.entropy, [[0.5, 0.5, 0]], L2, [[L2 - 1, L2 - 1, 0]]),
    "entropy: certain": (info.entropy, [[0, 1, 0]], 0, [[0, -1, 0]]),
    "kl: p = 0": (info.kl_divergence, [[0, 1, 0], [0.5, 0.5, 0]], L2, [[0, L2, 0], [1, -1, 1]]),
    "kl: q = 0": (info.kl_divergence, [[0.5, 0.5, 0], [0, 1, 0]], INF, [[INF, -L2, 0], [-INF, 0.5, 1]]),
    "ce: p = 0": (info.cross_entropy, [[0, 1, 0], [0.5, 0.5, 0]], L2, [[L2, L2, 0], [0, -2, 0]]),
    "ce: q = 0": (info.cross_entropy, [[0.5, 0.5, 0], [0, 1, 0]], INF, [[INF, 0, 0], [-INF, -0.5, 0]]),
    "ce: q = 1e-20": (info.cross_entropy, [[0, 1, 0], [1e-20, 1, 0]], 0, [[20 * math.log(10), 0, 0], [0, -1, 0]]),
    "js: 0": (info.jensen_shannon_divergence, [[0, 1, 0], [1, 0, 0]], L2, [[0, L2 / 2, 0], [L2 / 2, 0, 0]]),
    "js: p = q = 0": (JS, [[0, 1], [0, 1]], 0, [[0, 0], [0, 0]]),
    "perplexity: p = 0": (PP, [[0.5, 0.5, 0]], 2, [[2 * (L2 - 1), 2 * (L2 - 1), 0]]),
    "tv: 0": (TV, [[0, 1, 0], [0, 0.5, 0.5]], 0.5, [[0, 0.5, -0.5], [0, -0.5, 0.5]]),
    "tv: p = q": (TV, [[0.5, 0.5], [0.5, 0.5]], 0, [[0, 0], [0, 0]]),
    "hellinger: 0": (HELLINGER, [[0, 1, 0], [1, 0, 0]], 1, [[0, 0.25, 0], [0.25, 0, 0]]),
    "hellinger: p = q": (HELLINGER, [[0, 1, 0], [0, 1, 0]], 0, [[0, 0, 0], [0, 0, 0]]),
    "H_1: p = 0": (H[1], [[0.5, 0.5, 0]], L2, [[-1, -1, 0]]),
    "H_1e38: p = 0": (H[1e38], [[0.5, 0.25, 0]], L2, [[-2, 0, 0]]),
    "D_1: p = 0": (D[1], [[0, 1, 0], [0.5, 0.5, 0]], L2, [[0, 0, 0], [1, -1, 1]]),
    "D_1: q = 0": (D[1], [[0.5, 0.5, 0], [0, 1, 0]], INF, [[INF, 0, 0], [-INF, 0, 0]]),
    "D_1000: p = 0": (D[1e3], [[0, 1, 0], [0.5, 0.5, 0]], L2, [[-1e3 / 999, 0, -1e3 / 999], [1, -1, 1]]),
    "H_1/2: p = 0": (H[0.5], [[0.5, 0.5, 0]], L2, [[-1, -1, 0]]),
    "H_2: p = 0": (H[2], [[0.5, 0.5, 0]], L2, [[-1, -1, 1]]),
    "H_inf: p = 0": (H[INF], [[0.5, 0.25, 0]], L2, [[-2, 0, 0]]),
    "S_1/2: p = 0": (S[0.5], [[1, 0, 0]], 0, [[-1, 0, 0]]),
    "S_2: p = 0": (S[2], [[1, 0, 0]], 0, [[-1, 1, 1]]),
    "D_0: p = 0": (D[0], [[0, 1, 0], [0.5, 0.5, 0]], L2, [[0, 0, 0], [1, -1, 1]]),
    "D_1/4: p = q = 0": (D[0.25], [[0, 1, 0], [0, 1, 0]], 0, [[0, 0, 0], [0, 0, 0]]),
    "D_1/2: p = 0": (D[0.5], [[0, 1, 0], [0.75, 0.25, 0]], 2 * L2, [[0, 0, 0], [1, -3, 0]]),
    "D_1/2: q = 0": (D[0.5], [[0.75, 0.25, 0], [0, 1, 0]], 2 * L2, [[1, -3, 0], [0, 0, 0]]),
    "D_1/2: disjoint": (D[0.5], [[0, 1, 0], [1, 0, 0]], INF, [[0, 0, 0], [0, 0, 0]]),
    "D_0: disjoint": (D[0], [[0, 1, 0], [1, 0, 0]], INF, [[0, 0, 0], [0, 0, 0]]),
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


@pytest.mark.grid
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


@pytest.mark.parametrize("mode", [(jax.jacfwd, jax.jacfwd), (jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacrev)])
def test_the_second_derivative_at_a_pole_spoils_no_other(mode: tuple[Callable[..., Any], Callable[..., Any]]):
    outer, inner = mode
    p, q = f32([0.5, 0.25, 0.25]), f32([0.5, 0, 0.25])
    # A factor above 1 is one that twice the largest number does not survive.
    got = jax.jit(outer(inner(lambda q: 3 * info.cross_entropy(p, q))))(q)
    np.testing.assert_array_equal(got, np.diag([6, INF, 12]))
    got = jax.jit(outer(inner(info.self_information)))(q)
    want = np.zeros((3, 3, 3))
    want[range(3), range(3), range(3)] = [4, INF, 16]
    np.testing.assert_array_equal(got, want)
    z_p, z_q = f32([0, -INF, 1]), f32([0, 0, -INF])
    got = jax.jit(outer(inner(lambda z: 3 * info.kl_divergence_with_logits(z, z_q))))(z_p)
    np.testing.assert_array_equal(got, [[-INF, 0, INF], [0, 0, 0], [INF, 0, -INF]])


OVERFLOWING: dict[str, tuple[Callable[..., Any], Any]] = {
    "share": (info.normalized_mutual_information, [[[1, 0], [0, 1e-30]], [[0.25, 0.25], [0.125, 0.375]]]),
    "renyi_0": (lambda q: info.renyi_divergence(f32([0, 0, 1]), q, 0), [[0, 1, 1e-20], [0.25, 0.25, 0.5]]),
    "tsallis_0.5": (functools.partial(info.tsallis_entropy, order=0.5), [[1, 0, 1e-30], [0.25, 0.25, 0.5]]),
}


@pytest.mark.parametrize("name", OVERFLOWING)
def test_a_row_whose_second_derivative_overflows_spoils_no_other(name: str):
    measure, rows = OVERFLOWING[name]
    rows = f32(rows)
    for outer in (jax.jacfwd, jax.jacrev):
        got = jax.jit(outer(jax.grad(lambda p: measure(p).sum())))(rows)
        blocks = np.asarray(got).reshape(2, rows[0].size, 2, rows[0].size)
        assert not blocks[0, :, 1].any()
        assert not blocks[1, :, 0].any()
        assert np.isfinite(blocks[1, :, 1]).all()
        assert blocks[1, :, 1].any()


def test_self_information_edges():
    x = f32([0, 0.5, 1])
    np.testing.assert_allclose(info.self_information(x), [INF, L2, 0], rtol=1e-7)
    want = np.diag([-INF, -2, -1])
    for derivative in (jax.jacfwd, jax.jacrev):
        np.testing.assert_array_equal(derivative(info.self_information)(x), want)
    assert jnp.isnan(info.self_information(jnp.float32(-0.5)))


@pytest.mark.parametrize("name", FEW)
def test_invalid_probabilities_give_nan(name: str):
    case = CASES[name]
    good = f32([0.25, 0.25, 0.5])
    for bad, at in itertools.product((-0.25, -1e-30, INF, NAN), range(case.operands)):
        vectors = [f32([bad, 0.5, 0.5]) if i == at else good for i in range(case.operands)]
        got = differentiated(case.measure, case.operands)(*vectors)
        assert np.isnan(got.value), (bad, at)
        # Order infinity looks at one entry only, and the derivative of a distance is a sign.
        assert np.isnan(got.gradient[at][0]) or name == "renyi_inf(p)", (bad, at)


# ----------------------------------------------------------------------------------------------------------------------
# Second and third derivatives

# Of orders whose derivatives at 0 have a finite limit, as far as they are looked at here.
AT_ZERO = [
    ("renyi_0.5(p)", 3), ("renyi_1(p)", 3), ("renyi_2(p)", 3), ("renyi_2.5(p)", 2), ("renyi_3(p)", 3),
    ("tsallis_0.5(p)", 3), ("tsallis_1(p)", 3), ("tsallis_2(p)", 3), ("tsallis_2.5(p)", 2), ("tsallis_3(p)", 3),
    ("tsallis_7(p)", 3), ("entropy(p)", 3), ("perplexity(p)", 3), ("cross_entropy(p, q)", 3), ("kl(p, q)", 3),
    ("js(p, q)", 3), ("js_1/8(p, q)", 3), ("hellinger(p, q)", 3), ("renyi_0.25(p, q)", 3), ("renyi_0.5(p, q)", 3),
    ("renyi_1(p, q)", 3), ("renyi_2(p, q)", 3), ("renyi_2.5(p, q)", 2), ("renyi_3(p, q)", 3),
]  # fmt: skip
# Up to order 1 the first derivative with respect to `p = 0` has an infinite limit, and so `p` is a constant there.
CONSTANT = [n for n, _ in AT_ZERO if any(s in n for s in ("_0.", "_1(", "entropy(p)", "perpl", "kl", "js", "hell"))]


# A third derivative takes up to 15 seconds to trace; these have the formulas of others, with another order or weight.
ALIKE = (
    *("renyi_1(p)", "renyi_3(p)", "tsallis_1(p)", "tsallis_3(p)", "js_1/8(p, q)"),
    *(f"renyi_{order}(p, q)" for order in (0.25, 0.5, 1, 2.5, 3)),
)
ORDERS = dict(AT_ZERO)


@pytest.mark.grid
@pytest.mark.parametrize("name", marked(ORDERS, set(ORDERS) - set(ALIKE)))
def test_derivatives_at_zero(name: str):
    case, order = CASES[name], ORDERS[name]
    vectors = [f32([0.625, 0.375, 0]), f32([0.25, 0.25, 0.5])][: case.operands]
    above = oracle.above_zero(*vectors)
    kept = np.ones(3 * case.operands, bool)
    kept[2] = name not in CONSTANT
    kept = np.outer(kept, kept)
    got = differentiated(case.measure, case.operands)(*vectors).hessian
    want = oracle.hessian(case.oracle, *above)
    got = np.block([list(row) for row in got])
    assert_close(got, np.where(kept, want, 0), ulp=16, dtype="f4", size=np.abs(want[kept]).max())
    if order == 3:
        for at in (0, 2):
            want = oracle.third(case.oracle, at, *above)
            want = np.where(kept & (name not in CONSTANT or at != 2), want, 0)
            got = third_derivative(case.measure, case.operands)(jnp.int32(at), *vectors)
            assert_close(got, want, ulp=32, dtype="f4", size=max(np.abs(want).max(), 1))


@pytest.mark.grid
@pytest.mark.parametrize("order", marked([1.5, 1.75], [1.5]))
def test_infinite_terms_are_left_out(order: float):
    """Between orders 1 and 2 the slope at 0 is finite, and the curvature is not."""
    p, q = f32([0.625, 0.375, 0]), f32([0.25, 0.25, 0.5])
    got = jax.jit(jax.hessian(functools.partial(info.tsallis_entropy, order=order)))(p)
    want = np.diag([-order * 0.625 ** (order - 2), -order * 0.375 ** (order - 2), 0])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for measure, vectors in ((info.renyi_entropy, (p,)), (info.renyi_divergence, (p, q))):
        exact = functools.partial(getattr(oracle, measure.__name__), order=order)
        got = np.asarray(jax.jit(jax.hessian(functools.partial(measure, order=order)))(*vectors))
        want = oracle.hessian(exact, *oracle.above_zero(*vectors))[:3, :3]
        finite = ~np.diag([False, False, True])
        assert_close(got[finite], want[finite], ulp=64, dtype="f4", size=np.abs(want[finite]).max())
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, got.T, rtol=1e-5)


# Their exact third derivatives take mpmath seconds.
SELDOM = (*ALIKE, *(f"{name}_{a}(p)" for name in ("renyi", "tsallis") for a in (1.5, 2.5)), "renyi_1.5(p, q)")
TINY = [*ORDERS, "renyi_1.5(p)", "tsallis_1.5(p)", "renyi_1.5(p, q)"]


@pytest.mark.parametrize("name", marked(TINY, [n for n in TINY if n not in SELDOM]))
def test_derivatives_at_tiny_probabilities(name: str):
    case = CASES[name]
    vectors = [f32([1, 1e-7, 1e-10]), f32([0.5, 0.5, 1e-9])][: case.operands]
    got = differentiated(case.measure, case.operands)(*vectors)
    want = oracle.hessian(case.oracle, *vectors)
    got = np.block([list(row) for row in got.hessian])
    # The entries differ by factors of 1e10; each is measured against the terms of its row and column.
    scale = np.sqrt(np.abs(np.diag(want)))
    assert_close(got, want, ulp=64, dtype="f4", size=np.maximum(np.outer(scale, scale), np.abs(want)))
    third = third_derivative(case.measure, case.operands)(jnp.int32(1), *vectors)
    want = oracle.third(case.oracle, 1, *vectors)
    assert_close(np.diag(third), np.diag(want), ulp=128, dtype="f4", size=1e-3 * np.abs(np.diag(want)).max())


@pytest.mark.parametrize("name", ["renyi_2(p, q)", "renyi_0.5(p)", "renyi_0.5(p, q)", "hellinger(p, q)", "kl(p, q)"])
def test_an_entry_beyond_float32_spoils_no_other(name: str):
    """A second derivative of 1e60 is infinite; those next to it are neither nan nor another number."""
    case = CASES[name]
    vectors = [f32([0.5, 0.5, 1e-30]), f32([1e-30, 0.75, 0.25])][: case.operands]
    got = np.block([list(row) for row in differentiated(case.measure, case.operands)(*vectors).hessian])
    want = oracle.hessian(case.oracle, *vectors)
    held = np.abs(want) < np.finfo("f4").max
    assert not np.any(np.isnan(got))
    assert np.all(np.abs(got[~held]) > 1e38)
    scale = np.sqrt(np.abs(np.diag(want)))
    assert_close(got[held], want[held], ulp=64, dtype="f4", size=np.maximum(np.outer(scale, scale), np.abs(want))[held])


@pytest.mark.parametrize("name", LOGITS)
def test_second_derivatives_where_one_logit_dominates(name: str):
    """An entry of 2e-9 is as exact as one of 1: none is a difference of two probabilities near 1."""
    case = LOGITS[name]
    for logits in (([20, 0, -3], [5, 0, 1]), ([5, 0, 1], [20, 0, -3]), ([40, 0, 2], [40, 1, 0])):
        vectors = [f32(z) for z in logits][: case.operands]
        got = differentiated(case.measure, case.operands)(*vectors).hessian
        want = oracle.hessian(case.oracle, *vectors)
        # Across the operands and inside them, each block has entries of its own size.
        for i, j in np.ndindex(case.operands, case.operands):
            block = want[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            assert_close(got[i][j], block, ulp=16, dtype="f4", size=1e-3 * np.abs(block).max(), where=logits)


def test_the_curvature_of_the_gini_impurity():
    hessian = jax.hessian(info.tsallis_entropy)(f32([1, 1e-7, 1e-8]), 2)
    np.testing.assert_array_equal(hessian, np.diag([-2, -2, -2]))


@pytest.mark.grid
# Rescaled from 16 on, infinite from 2**64 on; 1e300 is no float32.
@pytest.mark.parametrize(("order", "shape"), [(17, (50,)), (1e8, (3,)), (1e18, (50,)), (1e300, (3,))])
def test_orders_without_bound(order: float, shape: tuple[int, ...], rng: np.random.Generator):
    p, q = draw_positive(rng, *shape), draw_positive(rng, *shape)
    for measure, vectors in ((info.renyi_entropy, (p,)), (info.renyi_divergence, (p, q))):
        exact = functools.partial(getattr(oracle, measure.__name__), order=order)
        value, gradient = jax.jit(jax.value_and_grad(functools.partial(measure, order=order)))(*vectors)
        # The rounding of a ratio of two probabilities, times the order, is what the weights of near ties can lose.
        assert_close(value, oracle.value(exact, *vectors), ulp=16, dtype="f4")
        assert np.all(np.isfinite(gradient))
        if order < 1e18:
            along = -1 if measure is info.renyi_entropy else 0
            np.testing.assert_allclose(np.sum(gradient * p), along, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Rows without a class

MASKED = {**{n: CASES[n] for n in FEW}, **LOGITS}
# What each does with a sum of nothing: its logarithm, its power, its square root, its reciprocal, its maximum.
OF_NOTHING = (
    *("entropy(p)", "perplexity(p)", "renyi_0.5(p)", "renyi_inf(p)", "tsallis_2(p)", "kl(p, q)", "js(p, q)"),
    *("hellinger(p, q)", "renyi_2(p, q)", "renyi_inf(p, q)", "renyi_1+1e-06(p, q)", "kl_divergence_with_logits"),
)


@pytest.mark.parametrize("name", marked(MASKED, OF_NOTHING))
def test_a_row_without_classes_is_zero(name: str):
    case = MASKED[name]
    mask = np.array([[True, True, False], [False, False, False]])
    vectors = [f32([[0.25, 0.75, NAN], [0.5, NAN, -1]]), f32([[0.5, 0.5, INF], [NAN, 1, 0]])][: case.operands]

    @jax.jit
    def every(*x: jax.Array) -> Any:
        def total(*x: jax.Array) -> jax.Array:
            return case.measure(*x, where=mask).sum()

        return case.measure(*x, where=mask), jax.grad(total, tuple(range(len(x))))(*x), jax.hessian(total)(*x)

    value, gradient, hessian = every(*vectors)
    assert value[1] == 0
    assert value[0] != 0
    for x in gradient:
        np.testing.assert_array_equal(x[1], 0)
        assert np.all(np.isfinite(x))
    assert np.all(np.isfinite(hessian))
    np.testing.assert_array_equal(hessian[1], 0)


def test_the_self_information_of_a_row_without_classes():
    z, mask = f32([[0, 0], [NAN, 1]]), np.array([[True, False], [False, False]])
    got = info.self_information_with_logits(z, where=mask)
    np.testing.assert_array_equal(got, [[0, INF], [0, 0]])
    slope = jax.jacfwd(lambda z: info.self_information_with_logits(z, where=mask)[1])(z)
    np.testing.assert_array_equal(slope, 0)
    stacked = info.generalized_jensen_shannon_divergence(f32([[[0.5, 0.5], [NAN, 1]]] * 2), where=mask)
    np.testing.assert_array_equal(stacked, [0, 0])
