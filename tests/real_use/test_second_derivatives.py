"""Second and third derivatives keep their relative accuracy where they are tiny, and their finite limits at p = 0."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference as ref
from cases import covering, marked

# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
Call = Callable[..., Any]
mpf = mpmath.mpf


def close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 0.0) -> None:
    np.testing.assert_allclose(ref.wide(got), ref.wide(want), rtol=rtol, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# The binary loss: p (1 - p) far from 0


def logistic_slopes(z: float) -> tuple[float, float, float]:
    """The curvature p (1 - p) and its first two derivatives."""
    with mpmath.workdps(60):
        p = 1 / (1 + mpmath.exp(-mpf(z)))
        s = p * (1 - p)
        return float(s), float(s * (1 - 2 * p)), float(s * (1 - 6 * s))


BINARY: dict[str, Call] = {
    "dense": jaxent.sigmoid_cross_entropy,
    "twin": nn.binary_cross_entropy_with_logits,
    "twin module": lambda z, t: nn.BCEWithLogitsLoss()(z, t),
    "pos_weight": lambda z, t: jaxent.sigmoid_cross_entropy(z, t, pos_weight=1.0),
    "weights": lambda z, t: jaxent.sigmoid_cross_entropy(z, t, weights=2.0, where=True),
}
MODES: dict[str, Call] = {
    "hessian": jax.hessian,
    "jit hessian": lambda f: jax.jit(jax.hessian(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over reverse": lambda f: jax.grad(jax.grad(f)),
    "vmap": lambda f: lambda z: jax.vmap(jax.grad(jax.grad(f)))(z[None])[0],
    "product": lambda f: lambda z: jax.jvp(jax.grad(f), (z,), (jnp.ones_like(z),))[1],
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_curvature(name: str) -> None:
    second = jax.jit(jax.vmap(jax.hessian(BINARY[name]), (0, None)))
    z = np.array([0.0, 1.0, 10.0, 15.0, 17.0, 20.0, 40.0, 80.0], np.float32)
    for sign, target in itertools.product((1, -1), (0.0, 0.25, 1.0)):
        got = second(jnp.asarray(sign * z), jnp.float32(target))
        close(got, [logistic_slopes(sign * float(x))[0] for x in z], rtol=2e-6)


@pytest.mark.parametrize(("mode", "name"), covering(MODES, ["dense", "twin"]))
def test_binary_curvature_in_every_mode(name: str, mode: str) -> None:
    transformed = MODES[mode](lambda z: BINARY[name](z, jnp.float32(0)))
    close(transformed(jnp.float32(20)), 2.061e-9, rtol=1e-3)
    close(transformed(jnp.float32(20)), logistic_slopes(20)[0], rtol=2e-6)


def test_binary_curvature_of_python_numbers() -> None:
    close(jax.hessian(jaxent.sigmoid_cross_entropy)(20.0, 0.0), 2.0611537e-9)
    close(jax.hessian(nn.binary_cross_entropy_with_logits)(15.0, 1.0), 3.0590213e-7)


@pytest.mark.parametrize("name", ["dense", "twin", "pos_weight"])
def test_third_and_fourth_derivatives_of_the_binary_loss(name: str) -> None:
    f = lambda z: BINARY[name](z, jnp.float32(0.5))  # noqa: E731
    third = jax.jit(jax.vmap(jax.jacfwd(jax.hessian(f))))
    fourth = jax.jit(jax.vmap(jax.hessian(jax.hessian(f))))
    z = np.array([2.0, 15.0, 20.0, -20.0, 60.0], np.float32)
    close(third(jnp.asarray(z)), [logistic_slopes(float(x))[1] for x in z])
    close(fourth(jnp.asarray(z)), [logistic_slopes(float(x))[2] for x in z])


def test_curvature_with_a_positive_weight_and_mixed_derivatives() -> None:
    z, c, t = jnp.array([18.0, -18.0, 3.0]), jnp.array([3.0, 0.5, 2.0]), jnp.array([1.0, 0.25, 0.0])
    s = np.array([logistic_slopes(float(x))[0] for x in z])
    f = lambda z, c, t: jaxent.sigmoid_cross_entropy(z, t, pos_weight=c, reduction="sum")  # noqa: E731
    hessian, by_weight, by_target = jax.jit(lambda *x: [jax.jacfwd(jax.grad(f), i)(*x) for i in (0, 1, 2)])(z, c, t)
    close(np.diag(hessian), (ref.wide(c) * t + 1 - ref.wide(t)) * s)
    p_low = np.exp(-np.logaddexp(0, ref.wide(z)))  # 1 - p
    close(np.diag(by_weight), -ref.wide(t) * p_low)
    close(np.diag(by_target), -ref.wide(c) * p_low - (1 - p_low))


def test_binary_curvature_in_other_dtypes() -> None:
    got = jax.hessian(jaxent.sigmoid_cross_entropy)(jnp.bfloat16(20), jnp.bfloat16(0))
    close(got, logistic_slopes(20)[0], rtol=1e-2)
    with jax.enable_x64(True):
        second = jax.jit(jax.hessian(jaxent.sigmoid_cross_entropy))
        for z in (20.0, 40.0, -30.0):
            got = second(np.float64(z), np.float64(0))
            close(got, logistic_slopes(z)[0], rtol=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# The same curvature from two classes

TWO = np.array([20.0, 0.0], np.float32)
EYE = np.eye(2, dtype=np.float32)
CURVED: dict[str, Call] = {
    "softmax_cross_entropy": lambda z: jaxent.softmax_cross_entropy(z, np.int32(0)),
    "of probabilities": lambda z: jaxent.softmax_cross_entropy(z, np.array([0.25, 0.75], np.float32)),
    "smoothed": lambda z: jaxent.softmax_cross_entropy(z, np.int32(1), label_smoothing=0.5),
    "log_normalizer": lambda z: jaxent.token_statistics(z).log_normalizer,
    "log_prob": lambda z: -jaxent.token_statistics(z, np.int32(1)).log_prob,
    "cross_entropy_with_logits": lambda z: jaxent.cross_entropy_with_logits(TWO / 4, z),
    "kl_divergence_with_logits": lambda z: jaxent.kl_divergence_with_logits(TWO / 4, z),
    "linear": lambda z: jaxent.linear_softmax_cross_entropy(z, EYE, np.int32(0)),
    "linear_token_statistics": lambda z: -jaxent.linear_token_statistics(z, EYE, np.int32(0)).log_prob,
    "linear_kl_divergence": lambda z: jaxent.linear_kl_divergence(TWO / 4, EYE, z, EYE),
    "torch_compat": lambda z: nn.cross_entropy(z, np.int32(1)),
}


# The twin is the smoothed loss; the linear losses stream the row losses of the dense ones.
ROW_LOSSES = (
    *("softmax_cross_entropy", "of probabilities", "smoothed", "log_normalizer", "log_prob"),
    *("kl_divergence_with_logits", "linear", "linear_kl_divergence"),
)


@pytest.mark.parametrize("name", marked(CURVED, ROW_LOSSES))
def test_curvature_of_two_classes(name: str) -> None:
    s = logistic_slopes(20)[0]
    close(jax.jit(jax.hessian(CURVED[name]))(jnp.asarray(TWO)), [[s, -s], [-s, s]])


def test_closed_curvature_of_two_classes() -> None:
    s = logistic_slopes(20)[0]
    close(jaxent.logit_hessian(TWO), [[s, -s], [-s, s]])
    close(jaxent.logit_hessian_product(TWO, np.array([1.0, 0.0], np.float32)), [s, -s])
    close(jax.jacfwd(lambda z: jaxent.softmax_cross_entropy_gradient(z, np.int32(0)))(TWO), [[s, -s], [-s, s]])
    close(jaxent.ggn_vector_product(lambda z: z, TWO, np.array([1.0, 0.0], np.float32)), [s, -s])


def test_curvature_of_an_entropy_of_two_classes() -> None:
    s, slope, _ = logistic_slopes(20)
    want = -s - 20 * slope
    close(jax.hessian(jaxent.entropy_with_logits)(jnp.asarray(TWO)), [[want, -want], [-want, want]])


# ----------------------------------------------------------------------------------------------------------------------
# Measures with small and with zero probabilities

SMALL = np.array([1.0, 1e-7, 1e-8], np.float32)


def diagonal(f: Call, p: Any) -> np.ndarray:
    return np.diag(ref.wide(jax.jit(jax.hessian(f))(jnp.asarray(p))))


def power(x: Any, e: float) -> np.ndarray:
    """`x ** e` with 0 ** 0 = 1, in float64; an infinite limit is left infinite."""
    with np.errstate(divide="ignore"):
        return np.power(ref.wide(x), e)


def test_the_gini_impurity_of_the_issue() -> None:
    close(diagonal(lambda p: jaxent.tsallis_entropy(p, 2), SMALL), [-2, -2, -2])


AT_ZERO = ([0.5, 0.5, 0.0], [0.25, 1e-20, 0.75], [1.0, 0.0, 0.0])


# `test_information_derivatives.py` compares more orders and measures with mpmath; here are those of closed form.


@pytest.mark.parametrize("order", marked([2, 2.5, 3, 4], [2, 2.5]))
def test_tsallis_curvature(order: float) -> None:
    f = lambda p: jaxent.tsallis_entropy(p, order)  # noqa: E731
    ways = jax.jit(lambda p: (jax.grad(f)(p), jax.hessian(f)(p)))
    for p in (SMALL, *AT_ZERO, [1.0, 2e-38, 1e-3]):
        p = np.asarray(p, np.float32)
        gradient, hessian = ways(p)
        close(hessian, np.diag(-order * power(p, order - 2)), atol=1e-37)
        close(gradient, (1 - order * power(p, order - 1)) / (order - 1), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("order", marked([0.5, 1, 1.5, 1 + 1e-6], [1 + 1e-6]))
def test_tsallis_curvature_of_small_probabilities(order: float) -> None:
    """At p = 0 it is infinite."""
    close(diagonal(lambda p: jaxent.tsallis_entropy(p, order), SMALL), -order * power(SMALL, order - 2))


def test_gini_curvature_in_every_mode() -> None:
    f, p = (lambda p: jaxent.tsallis_entropy(p, 2)), jnp.array([1.0, 1e-8, 0.0])

    @jax.jit
    def ways(p: jax.Array) -> Any:
        product = jax.jvp(jax.grad(f), (p,), (jnp.ones(3),))[1]
        return product, [
            jax.vmap(jax.hessian(f))(p[None])[0],
            jax.jacrev(jax.jacrev(f))(p),
            jax.jacfwd(jax.jacfwd(f))(p),
        ]

    product, hessians = ways(p)
    close(product, [-2, -2, -2])
    for hessian in hessians:
        close(hessian, -2 * np.eye(3))


def test_further_derivatives_of_the_gini_impurity_are_0() -> None:
    """At 1e-30 too, where a power of -2 is infinite and 0 times it is nan."""
    third = jax.jacfwd(jax.hessian(lambda p: jaxent.tsallis_entropy(p, 2)))
    for derivative in jax.jit(lambda p: (third(p), jax.jacfwd(third)(p)))(jnp.array([0.5, 1e-30, 0.0, 0.5])):
        assert not np.any(derivative)


def renyi_curvature(p: Any, a: float) -> np.ndarray:
    """Of log(sum p^a / sum p) / (1 - a), with the limits at p = 0 of orders from 2 on."""
    p = ref.wide(p)
    s, m = power(p, a).sum(), p.sum()
    first = a * power(p, a - 1)
    second = np.diag(a * (a - 1) * power(p, a - 2))
    return (second / s - np.outer(first, first) / s**2 + 1 / m**2) / (1 - a)


@pytest.mark.parametrize("order", marked([2, 2.5, 3, 5], [2.5]))
def test_renyi_entropy_curvature(order: float) -> None:
    hessian = jax.jit(jax.hessian(lambda p: jaxent.renyi_entropy(p, order)))
    for p in (SMALL, *AT_ZERO):
        p = np.asarray(p, np.float32)
        close(hessian(p), renyi_curvature(p, order), atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("order", [0.5, 1.5])
def test_renyi_entropy_curvature_of_small_probabilities(order: float) -> None:
    want = renyi_curvature(SMALL, order)
    close(jax.jit(jax.hessian(lambda p: jaxent.renyi_entropy(p, order)))(SMALL), want, rtol=2e-5)


def renyi_divergence_curvature(p: Any, q: Any, a: float) -> np.ndarray:
    """With respect to p, of log(sum p^a q^(1-a) / (a sum p + (1 - a) sum q)) / (a - 1)."""
    p, q = ref.wide(p), ref.wide(q)
    s, m = (power(p, a) * power(q, 1 - a)).sum(), a * p.sum() + (1 - a) * q.sum()
    first = a * power(p, a - 1) * power(q, 1 - a)
    second = np.diag(a * (a - 1) * power(p, a - 2) * power(q, 1 - a))
    return (second / s - np.outer(first, first) / s**2 + a**2 / m**2) / (a - 1)


@pytest.mark.parametrize("order", marked([2, 3], [2]))
def test_renyi_divergence_curvature(order: float) -> None:
    q = np.array([0.5, 0.25, 0.25], np.float32)
    hessian = jax.jit(jax.hessian(lambda p: jaxent.renyi_divergence(p, q, order)))
    for p in (SMALL, *AT_ZERO):
        p = np.asarray(p, np.float32)
        close(hessian(p), renyi_divergence_curvature(p, q, order), rtol=3e-5, atol=1e-4)


OTHERS = ["entropy", "self_information", "perplexity", "cross_entropy", "kl", "kl of q", "js"]


@pytest.mark.parametrize("name", marked(OTHERS, ["self_information"]))
def test_curvature_of_other_measures_of_small_probabilities(name: str) -> None:
    p, q = ref.wide(SMALL), np.array([0.5, 0.25, 0.25])
    q32 = q.astype(np.float32)
    pp, grad = np.exp(ref.entropy(p)), -np.log(p) - 1
    table: dict[str, tuple[Call, Any]] = {
        "entropy": (jaxent.entropy, -1 / p),
        "self_information": (lambda p: jaxent.self_information(p).sum(), 1 / p**2),
        "perplexity": (jaxent.perplexity, pp * (grad**2 - 1 / p)),
        "cross_entropy": (lambda p: jaxent.cross_entropy(q32, p), q / p**2),
        "kl": (lambda p: jaxent.kl_divergence(p, q32), 1 / p),
        "kl of q": (lambda p: jaxent.kl_divergence(q32, p), q / p**2),
        "js": (lambda p: jaxent.jensen_shannon_divergence(p, q32), 1 / (2 * p) - 1 / (2 * (p + q))),
    }
    f, want = table[name]
    close(diagonal(f, SMALL), want, rtol=5e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Renyi's orders: infinite gradients are not nan, large orders are the min-entropy


@pytest.mark.parametrize("order", marked([1, 1.000001, 2, 0.999999], [1, 1.000001, 0.999999]))
def test_gradient_of_an_infinite_renyi_divergence(order: float) -> None:
    f = lambda p, q: jaxent.renyi_divergence(p, q, order)  # noqa: E731
    for by_p, by_q in jax.jit(lambda *x: (jax.grad(f, (0, 1))(*x), jax.jacfwd(f, (0, 1))(*x)))(
        jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])
    ):
        if order >= 1:
            assert np.isposinf(by_p[1])
            assert np.isneginf(by_q[1])
        assert np.all(np.isfinite([by_p[0], by_q[0]])), (by_p, by_q)
        assert not np.any(np.isnan([by_p, by_q]))


def test_gradient_of_other_infinite_divergences() -> None:
    p, q = jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])
    for f in (jaxent.kl_divergence, jaxent.cross_entropy, lambda p, q: jaxent.renyi_divergence(p, q, float("inf"))):
        by_p, by_q = jax.jit(jax.grad(f, (0, 1)))(p, q)
        assert np.isposinf(by_p[1])
        assert np.isneginf(by_q[1])
        assert np.isfinite(by_p[0])
        assert np.isfinite(by_q[0])


ORDERS = [1e6, 1e30, 1e38, 3e38, 1e39, 1e300, float("inf")]


@pytest.mark.parametrize("order", marked(ORDERS, [1e6, 1e39]), ids=str)
def test_large_orders(order: float) -> None:
    p = jnp.array([0.5, 0.25, 0.25])

    @jax.jit
    def ways(p: jax.Array, q: jax.Array) -> Any:
        entropy, of_entropy = jax.value_and_grad(jaxent.renyi_entropy)(p, order)
        divergence, of_divergence = jax.value_and_grad(jaxent.renyi_divergence, (0, 1))(p, q, order)
        return (entropy, divergence), of_entropy, of_divergence

    values, of_entropy, (by_p, by_q) = ways(p, p[::-1])
    close(values, [np.log(2)] * 2, rtol=3e-6)
    close(of_entropy, [-2, 0, 0], rtol=1e-4, atol=3e-6)
    # The sum is taken relative to order * sum(p) + (1 - order) * sum(q), which adds a constant to every entry.
    close(by_p - by_p[1], [2, 0, 0], rtol=1e-3, atol=1e-3)
    close(by_q - by_q[1], [-4, 0, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("order", [1e38, 1e39, 1e300])
def test_large_orders_in_float64(order: float) -> None:
    p = np.array([0.5, 0.25, 0.25])
    close((jaxent.renyi_entropy(p, order), jaxent.renyi_divergence(p, p[::-1], order)), [np.log(2)] * 2, rtol=1e-14)
