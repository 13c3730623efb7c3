"""Numbers from the host never wrap, and a Python number is checked inside jit as it is outside.

JAX without 64-bit types takes a Python int or an int64 modulo 2^32: 2^31 becomes negative, 2^32 becomes 0.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from cases import covering, marked

Z = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], np.float32)
Y = np.array([2, 0], np.int32)
H = np.array([[1.0, 0.5], [-0.5, 2.0]], np.float32)
W = np.array([[1.0, 0.0, -1.0], [0.5, 1.0, 0.25]], np.float32)
T = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.25]], np.float32)
PXY = np.array([[0.125, 0.25], [0.5, 0.125]], np.float32)
P, Q = np.array([0.5, 0.25, 0.25], np.float32), np.array([0.25, 0.25, 0.5], np.float32)
ROWS, BINARY = ref.nll(Z, Y), ref.sigmoid_nll(Z, T)
LINEAR, DIVERGENCE = ref.nll(H @ W, Y), ref.kl(H @ W, 2 * H @ W)


def close(got: Any, want: Any, rtol: float = 2e-6) -> None:
    np.testing.assert_allclose(ref.wide(got), ref.wide(want), rtol=rtol, atol=0)


def user_rows(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jaxent.softmax_cross_entropy(logits, labels, reduction="none")


# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
Call = Callable[..., Any]
# ----------------------------------------------------------------------------------------------------------------------
# Divisors

BIG: list[Any] = [2**31, 2**32, 2**64, np.int64(2**33 + 2**10), np.array(2**63, np.uint64)]

# Each as a function of the options, and the sum that is divided.
DIVIDED: dict[str, tuple[Call, Any]] = {
    "softmax_cross_entropy": (lambda **o: jaxent.softmax_cross_entropy(Z, Y, **o), ROWS.sum()),
    "of probabilities": (
        lambda **o: jaxent.softmax_cross_entropy(Z, np.full_like(Z, 1 / 3), **o),
        -ref.log_softmax(Z).sum() / 3,
    ),
    "nll_loss": (lambda **o: jaxent.nll_loss(-Z, Y, **o), 3.0),
    "sigmoid_cross_entropy": (lambda **o: jaxent.sigmoid_cross_entropy(Z, T, **o), BINARY.sum()),
    "linear_softmax_cross_entropy": (lambda **o: jaxent.linear_softmax_cross_entropy(H, W, Y, **o), LINEAR.sum()),
    "linear_kl_divergence": (lambda **o: jaxent.linear_kl_divergence(H, W, H, 2 * W, **o), DIVERGENCE.sum()),
    "linear_loss": (lambda **o: jaxent.linear_loss(user_rows, H, W, Y, **o), LINEAR.sum()),
    "softmax_cross_entropy_gradient": (
        lambda **o: jaxent.softmax_cross_entropy_gradient(Z, Y, **o),
        ref.softmax(Z) - ref.onehot(Y, 3),
    ),
    "ggn_vector_product": (
        lambda **o: jaxent.ggn_vector_product(lambda z: z, Z, T, **o),
        ref.hessian_product(Z, T),
    ),
    "linear_ggn_vector_product": (
        lambda **o: jaxent.linear_ggn_vector_product(H, W, (np.ones_like(H), None), **o)[0],
        ref.hessian_product(H @ W, np.ones_like(H) @ W) @ W.T,
    ),
}


@pytest.mark.parametrize(("name", "number"), covering(DIVIDED, BIG), ids=repr)
def test_denominator(name: str, number: Any) -> None:
    f, total = DIVIDED[name]
    close(f(denominator=number), total / float(number))


@pytest.mark.parametrize("name", DIVIDED)
def test_denominator_inside_jit(name: str) -> None:
    f, total = DIVIDED[name]
    close(jax.jit(lambda: f(denominator=2**31))(), total / 2**31)


@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd", "vmap"])
def test_denominator_of_derivatives(transform: str) -> None:
    want = (ref.softmax(Z) - ref.onehot(Y, 3)) / 2**31

    def loss(z: jax.Array) -> jax.Array:
        return jaxent.softmax_cross_entropy(z, Y, denominator=2**31)

    if transform == "jvp":
        close(jax.jvp(loss, (Z,), (T,))[1], (want * T).sum())
    elif transform == "vmap":
        close(jax.vmap(jax.grad(loss))(np.stack([Z, Z]))[1], want)
    else:
        close(getattr(jax, transform)(loss)(jnp.asarray(Z)), want)


# ----------------------------------------------------------------------------------------------------------------------
# Weights

HEAVY: list[Any] = [np.array([2**31, 2**33]), [2**32, 5], np.array([2**63, 2**62], np.uint64)]


def weighted(rows: np.ndarray, w: Any) -> Any:
    return (rows * ref.wide(w)).sum() / ref.wide(w).sum()


def grid(w: Any) -> np.ndarray:
    """Weights of the entries of `Z`: the same in each row."""
    return np.repeat(np.asarray(w)[:, None], 3, axis=1)


WEIGHTED: dict[str, tuple[Call, Call]] = {
    "softmax_cross_entropy": (
        lambda w: jaxent.softmax_cross_entropy(Z, Y, weights=w),
        lambda w: weighted(ROWS, w),
    ),
    "reduction none": (
        lambda w: jaxent.softmax_cross_entropy(Z, Y, weights=w, reduction="none"),
        lambda w: ROWS * ref.wide(w),
    ),
    "of probabilities": (
        lambda w: jaxent.softmax_cross_entropy(Z, ref.onehot(Y, 3).astype(np.float32), weights=w),
        lambda w: weighted(ROWS, w),
    ),
    "nll_loss": (
        lambda w: jaxent.nll_loss(ref.log_softmax(Z).astype(np.float32), Y, weights=w),
        lambda w: weighted(ROWS, w),
    ),
    "sigmoid_cross_entropy": (
        lambda w: jaxent.sigmoid_cross_entropy(Z, T, weights=grid(w)),
        lambda w: weighted(BINARY, grid(w)),
    ),
    "linear_softmax_cross_entropy": (
        lambda w: jaxent.linear_softmax_cross_entropy(H, W, Y, weights=w),
        lambda w: weighted(LINEAR, w),
    ),
    "linear_kl_divergence": (
        lambda w: jaxent.linear_kl_divergence(H, W, H, 2 * W, weights=w),
        lambda w: weighted(DIVERGENCE, w),
    ),
    "linear_loss": (
        lambda w: jaxent.linear_loss(user_rows, H, W, Y, weights=w),
        lambda w: weighted(LINEAR, w),
    ),
    "softmax_cross_entropy_gradient": (
        lambda w: jaxent.softmax_cross_entropy_gradient(Z, Y, weights=w),
        lambda w: (ref.softmax(Z) - ref.onehot(Y, 3)) * (ref.wide(w) / ref.wide(w).sum())[:, None],
    ),
    "ggn_vector_product": (
        lambda w: jaxent.ggn_vector_product(lambda z: z, Z, T, weights=w),
        lambda w: ref.hessian_product(Z, T) * (ref.wide(w) / ref.wide(w).sum())[:, None],
    ),
    "linear_gradient_norms": (
        lambda w: jaxent.linear_gradient_norms(H, W, Y, weights=w).residual,
        lambda w: np.linalg.norm(ref.softmax(H @ W) - ref.onehot(Y, 3), axis=-1) * ref.wide(w),
    ),
    "EmpiricalRisk.update": (
        lambda w: jaxent.EmpiricalRisk().update(ROWS.astype(np.float32), w).mean(),
        lambda w: weighted(ROWS, w),
    ),
    "EmpiricalRisk.weight": (
        lambda w: jaxent.EmpiricalRisk().update(ROWS.astype(np.float32), w).weight,
        lambda w: ref.wide(w).sum(),
    ),
    "empirical_distribution": (
        lambda w: jaxent.empirical_distribution(np.array([0, 1]), 2, weights=w),
        lambda w: ref.wide(w) / ref.wide(w).sum(),
    ),
    "torch_compat.binary_cross_entropy": (
        lambda w: nn.binary_cross_entropy(np.full_like(Z, 0.5), T, weight=grid(w)),
        lambda w: (np.log(2) * ref.wide(grid(w))).mean(),
    ),
    "torch_compat.binary_cross_entropy_with_logits": (
        lambda w: nn.binary_cross_entropy_with_logits(Z, T, weight=grid(w)),
        lambda w: (BINARY * ref.wide(grid(w))).mean(),
    ),
}


@pytest.mark.parametrize(("name", "w"), covering(WEIGHTED, HEAVY), ids=str)
def test_weights(name: str, w: Any) -> None:
    f, want = WEIGHTED[name]
    close(f(w), want(w))


INSIDE = ("softmax_cross_entropy", "linear_kl_divergence", "linear_gradient_norms", "EmpiricalRisk.update")


@pytest.mark.parametrize("name", marked(WEIGHTED, INSIDE))
def test_weights_inside_jit(name: str) -> None:
    f, want = WEIGHTED[name]
    close(jax.jit(lambda: f(HEAVY[1]))(), want(HEAVY[1]))


def test_heavy_weights_raise_no_finding() -> None:
    assert jaxent.diagnose(Z, Y, weights=np.array([2**31, 2**32]), class_weights=np.array([2**31, 1, 2**33])) == []


CLASS = np.array([2**31, 5, 2**32])
BY_CLASS: dict[str, tuple[Call, Any]] = {
    "softmax_cross_entropy": (
        lambda c: jaxent.softmax_cross_entropy(Z, Y, class_weights=c),
        weighted(ROWS, CLASS[Y]),
    ),
    "smoothed": (
        lambda c: jaxent.softmax_cross_entropy(Z, Y, class_weights=c, label_smoothing=0.5, reduction="sum"),
        (0.5 * ROWS * CLASS[Y] + 0.5 / 3 * (-ref.log_softmax(Z) * CLASS).sum(-1)).sum(),
    ),
    "nll_loss": (lambda c: jaxent.nll_loss(-Z, Y, class_weights=c), weighted(Z[[0, 1], Y], CLASS[Y])),
    "linear_softmax_cross_entropy": (
        lambda c: jaxent.linear_softmax_cross_entropy(H, W, Y, class_weights=c),
        weighted(LINEAR, CLASS[Y]),
    ),
    "softmax_cross_entropy_gradient": (
        lambda c: jaxent.softmax_cross_entropy_gradient(Z, Y, class_weights=c, reduction="sum"),
        (ref.softmax(Z) - ref.onehot(Y, 3)) * CLASS[Y][:, None],
    ),
    "torch_compat.cross_entropy": (lambda c: nn.cross_entropy(Z, Y, c), weighted(ROWS, CLASS[Y])),
    "torch_compat.CrossEntropyLoss": (lambda c: nn.CrossEntropyLoss(c)(Z, Y), weighted(ROWS, CLASS[Y])),
    "torch_compat.nll_loss": (lambda c: nn.nll_loss(-Z, Y, c), weighted(Z[[0, 1], Y], CLASS[Y])),
    "torch_compat.linear_cross_entropy": (
        lambda c: nn.linear_cross_entropy(H, np.ascontiguousarray(W.T), Y, weight=c),
        weighted(LINEAR, CLASS[Y]),
    ),
    "pos_weight": (
        lambda c: jaxent.sigmoid_cross_entropy(Z, T, pos_weight=c),
        ref.sigmoid_nll(Z, T, CLASS).mean(),
    ),
    "torch_compat pos_weight": (
        lambda c: nn.binary_cross_entropy_with_logits(Z, T, pos_weight=c),
        ref.sigmoid_nll(Z, T, CLASS).mean(),
    ),
}


@pytest.mark.parametrize(("name", "kind"), covering(BY_CLASS, ["int64", "list"]))
def test_class_weights(name: str, kind: str) -> None:
    f, want = BY_CLASS[name]
    close(f(CLASS if kind == "int64" else CLASS.tolist()), want)


def test_pos_weight_as_a_python_int() -> None:
    close(jaxent.sigmoid_cross_entropy(Z, T, pos_weight=2**31), ref.sigmoid_nll(Z, T, 2.0**31).mean())


# ----------------------------------------------------------------------------------------------------------------------
# Other scalars


@pytest.mark.parametrize("number", [2**31, 2**32, np.int64(2**33)], ids=repr)
def test_scalar_options(number: Any) -> None:
    close(jaxent.linear_softmax_cross_entropy(H, W, Y, temperature=number), np.log(3))
    close(jaxent.linear_softmax_cross_entropy(H, W, Y, soft_cap=number), LINEAR.mean(), rtol=1e-5)
    close(jaxent.linear_token_statistics(H, W, Y, temperature=number).entropy, np.full(2, np.log(3)))
    lse = Z.astype(np.float64).max(-1) - ref.log_softmax(Z).max(-1)
    close(jaxent.softmax_cross_entropy(Z, Y, z_loss=number), (ROWS + float(number) * lse**2).mean())


@pytest.mark.parametrize("count", [np.int64(5e9), np.array(5 * 10**9), 5 * 10**9, 2**64, np.uint64(2**63)], ids=repr)
def test_bits_per(count: Any) -> None:
    risk = jaxent.EmpiricalRisk().update(jnp.array([1.0, 3.0]))
    close(risk.bits_per(count), 4 / np.log(2) / float(count))
    close(jax.jit(lambda risk: risk.bits_per(count))(risk), 4 / np.log(2) / float(count))


def test_merged_host_numbers() -> None:
    risk = jaxent.EmpiricalRisk().merge(jaxent.WeightedSum(2**33, np.int64(2**34)))
    close(risk.mean(), 0.5)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_plan_counts(kind: Any) -> None:
    rows, features, classes = 2**20, 2**13, 2**18
    plan = jaxent.plan(kind(rows), kind(features), kind(classes))
    assert plan.multiply_adds == 3 * rows * features * classes
    assert plan.dense_logits_bytes == 4 * rows * classes
    wide = jaxent.plan(np.int64(2**40), np.int64(2**13), np.int64(2**18))
    assert wide.multiply_adds == 3 * 2**71


# ----------------------------------------------------------------------------------------------------------------------
# Bases

IN_BASE: dict[str, tuple[Call, tuple[np.ndarray, ...]]] = {
    "self_information": (jaxent.self_information, (P,)),
    "entropy": (jaxent.entropy, (P,)),
    "cross_entropy": (jaxent.cross_entropy, (P, Q)),
    "kl_divergence": (jaxent.kl_divergence, (P, Q)),
    "jensen_shannon_divergence": (jaxent.jensen_shannon_divergence, (P, Q)),
    "renyi_entropy": (lambda p, **o: jaxent.renyi_entropy(p, 2, **o), (P,)),
    "renyi_divergence": (lambda p, q, **o: jaxent.renyi_divergence(p, q, 2, **o), (P, Q)),
    "joint_entropy": (jaxent.joint_entropy, (PXY,)),
    "conditional_entropy": (jaxent.conditional_entropy, (PXY,)),
    "mutual_information": (jaxent.mutual_information, (PXY,)),
    "self_information_with_logits": (jaxent.self_information_with_logits, (Z,)),
    "entropy_with_logits": (jaxent.entropy_with_logits, (Z,)),
    "cross_entropy_with_logits": (jaxent.cross_entropy_with_logits, (Z, 2 * Z)),
    "kl_divergence_with_logits": (jaxent.kl_divergence_with_logits, (Z, 2 * Z)),
    "EmpiricalRisk.mean": (lambda x, **o: jaxent.EmpiricalRisk().update(x).mean(**o), (P,)),
}


@pytest.mark.parametrize(("name", "base"), covering(IN_BASE, [2**32 + 2, 2**40, 2**64, np.int64(2**31)]), ids=repr)
def test_large_base(name: str, base: Any) -> None:
    f, args = IN_BASE[name]
    close(f(*args, base=base), ref.wide(f(*args)) / np.log(float(base)), rtol=1e-6)


def test_the_entropy_of_the_issue() -> None:
    close(jaxent.entropy(P, base=2**32 + 2), 1.5 / 32)


@pytest.mark.parametrize(("name", "base"), covering(IN_BASE, [0, 1.0, -2, float("nan"), np.int64(1)]), ids=repr)
def test_a_bad_base_raises_inside_jit_too(name: str, base: Any) -> None:
    f, args = IN_BASE[name]
    for transform in (lambda g: g, jax.jit):
        with pytest.raises(ValueError, match=rf"jaxent\.{name}.*`base` must"):
            transform(lambda *args: f(*args, base=base))(*args)


@pytest.mark.parametrize("transform", [jax.vmap, jax.grad, jax.jacfwd, jax.checkpoint])
def test_a_bad_base_raises_under_transformations(transform: Call) -> None:
    with pytest.raises(ValueError, match=r"jaxent\.entropy: `base` must"):
        transform(lambda p: jaxent.entropy(p, base=0))(jnp.stack([P, Q]) if transform is jax.vmap else P)


def test_a_bad_base_raises_in_a_scan() -> None:
    with pytest.raises(ValueError, match=r"jaxent\.entropy: `base` must"):
        jax.lax.scan(lambda carry, p: (carry, jaxent.entropy(p, base=1)), 0.0, jnp.stack([P, Q]))


# ----------------------------------------------------------------------------------------------------------------------
# Sums of many weights: a float32 sum stops growing at 2^24


def test_distribution_of_many_weights() -> None:
    labels = np.zeros(24_000_000, np.int8)
    labels[18_000_000:] = 1
    close(jaxent.empirical_distribution(labels, 2, weights=np.ones(labels.size, np.float32)), [0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("mode", "order"), covering(["eager", "jit", "vmap"], ["large first", "large last", "large between"])
)
def test_distribution_of_uneven_weights(order: str, mode: str) -> None:
    small = np.full(4096, 0.5, np.float32)
    at = {"large first": 0, "large last": 4096, "large between": 2000}[order]
    weights = np.append(np.insert(small, at, 2.0**23), np.float32(2.0**23)).astype(np.float32)
    labels = np.append(np.zeros(4097, np.int32), 1)
    total = np.bincount(labels, ref.wide(weights))

    def f(w: Any) -> jax.Array:
        return jaxent.empirical_distribution(labels, 2, weights=w)

    if mode == "vmap":
        close(jax.vmap(f)(jnp.stack([weights, weights]))[1], total / total.sum(), rtol=2e-7)
    else:
        close((jax.jit(f) if mode == "jit" else f)(weights), total / total.sum(), rtol=2e-7)


def test_gradient_of_a_distribution_with_respect_to_weights() -> None:
    labels, w = np.array([0, 1, 1, 2]), jnp.array([1.0, 2.0, 3.0, 4.0])

    def first(w: jax.Array) -> jax.Array:
        return jaxent.empirical_distribution(labels, 3, weights=w)[1]

    want = (np.array([0, 1, 1, 0]) - 0.5) / 10
    close(jax.grad(first)(w), want)
    close(jax.jacfwd(first)(w), want)
