"""Every transformation of JAX through every loss from hidden states, against the same transformation of dense code.

In float64, so that agreement means the same formula and not luck; with rows that the chunk does not divide.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import both, norm2, run, stacked
from jax.test_util import check_grads

import jaxent

# Untyped: what is returned depends on `reduction`.
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
softmax_cross_entropy: Any = jaxent.softmax_cross_entropy

ROWS, FEATURES, CLASSES = 5, 2, 3
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.25, 1.0])
OPTIONS: dict[str, Any] = {"label_smoothing": 0.125, "z_loss": 0.25, "weights": WEIGHTS}
TEACHER = (
    np.random.default_rng(1).normal(size=(ROWS, FEATURES)),
    np.random.default_rng(2).normal(size=(FEATURES, CLASSES)),
)

Loss = Callable[[Any, Any, Any], Any]


def focal(logits: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


def capped(h: Any, w: Any) -> jax.Array:
    return 2.0 * jnp.tanh(h @ w / 2.0) / 0.75


def statistics_sum(got: Any) -> jax.Array:
    return jnp.sum(got.log_prob * WEIGHTS + got.log_normalizer**2 + got.entropy)


# (hidden, kernel, labels) -> a scalar, streamed and dense.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "mean": (
        lambda h, w, y: linear_softmax_cross_entropy(h, w, y, soft_cap=2.0, temperature=0.75, chunk_rows=2, **OPTIONS),
        lambda h, w, y: softmax_cross_entropy(capped(h, w), y, **OPTIONS),
    ),
    "one chunk": (
        lambda h, w, y: linear_softmax_cross_entropy(h, w, y, **OPTIONS),
        lambda h, w, y: softmax_cross_entropy(h @ w, y, **OPTIONS),
    ),
    "none": (
        lambda h, w, y: jnp.sum(linear_softmax_cross_entropy(h, w, y, chunk_rows=2, reduction="none") ** 2),
        lambda h, w, y: jnp.sum(softmax_cross_entropy(h @ w, y, reduction="none") ** 2),
    ),
    "statistics": (
        lambda h, w, y: statistics_sum(jaxent.linear_token_statistics(h, w, y, chunk_rows=2)),
        lambda h, w, y: statistics_sum(jaxent.token_statistics(h @ w, y)),
    ),
    "divergence": (
        lambda h, w, y: jaxent.linear_kl_divergence(*TEACHER, h, w, chunk_rows=2, reduction="sum"),
        lambda h, w, y: jnp.sum(jaxent.kl_divergence_with_logits(TEACHER[0] @ TEACHER[1], h @ w)),
    ),
    "row loss": (
        lambda h, w, y: jaxent.linear_loss(focal, h, w, y, reduction="sum", chunk_rows=2),
        lambda h, w, y: jnp.sum(focal(h @ w, y)),
    ),
}


def scanned(f: Loss, h: Any, w: Any, y: Any) -> Any:
    def step(w: Any, x: Any) -> Any:
        value, slope = jax.value_and_grad(f, argnums=1)(x, w, y)
        return w - 0.1 * slope, value

    return jax.lax.scan(step, w, stacked(h))


def through_a_scan(f: Loss, h: Any, w: Any, y: Any) -> Any:
    def total(h: Any, w: Any) -> Any:
        return jax.lax.scan(lambda c, x: (c + f(x, w, y), None), jnp.zeros(()), stacked(h))[0]

    return jax.grad(total, argnums=(0, 1))(h, w)


# name -> what is computed of a loss `f(hidden, kernel, labels)`
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "value_and_grad": lambda f, h, w, y: jax.value_and_grad(f, argnums=(0, 1))(h, w, y),
    "jvp": lambda f, h, w, y: jax.jvp(lambda h, w: f(h, w, y), (h, w), (w.sum() * h, w + 1)),
    "jvp, one argument": lambda f, h, w, y: jax.jvp(lambda w: f(h, w, y), (w,), (w + 1,)),
    "linearize": lambda f, h, w, y: jax.linearize(lambda h, w: f(h, w, y), h, w)[1](h, w + 1),
    "jacfwd": lambda f, h, w, y: jax.jacfwd(f, argnums=(0, 1))(h, w, y),
    "jacrev": lambda f, h, w, y: jax.jacrev(f, argnums=(0, 1))(h, w, y),
    "hessian": lambda f, h, w, y: jax.hessian(f, argnums=(0, 1))(h, w, y),
    "hessian, reverse": lambda f, h, w, y: jax.jacrev(jax.grad(f, argnums=1), argnums=(0, 1))(h, w, y),
    "jvp of grad": lambda f, h, w, y: jax.jvp(lambda h, w: both(f)(h, w, y), (h, w), (h + 1, w + 1)),
    "grad of jvp": lambda f, h, w, y: jax.grad(lambda w: jax.jvp(lambda h: f(h, w, y), (h,), (h + 1,))[1])(w),
    "grad of grad": lambda f, h, w, y: both(lambda h, w, y: norm2(both(f)(h, w, y)))(h, w, y),
    "third order": lambda f, h, w, y: jax.jvp(
        lambda w: jax.jvp(lambda w: jax.grad(f, argnums=1)(h, w, y), (w,), (w + 1,))[1], (w,), (w - 1,)
    ),
    "grad of jvp of grad": lambda f, h, w, y: jax.grad(
        lambda w: norm2(jax.jvp(lambda w: jax.grad(f, argnums=1)(h, w, y), (w,), (w + 1,))[1])
    )(w),
    "vmap of hidden": lambda f, h, w, y: jax.vmap(f, (0, None, None))(stacked(h), w, y),
    "vmap of kernel": lambda f, h, w, y: jax.vmap(f, (None, 0, None))(h, stacked(w), y),
    "vmap of labels": lambda f, h, w, y: jax.vmap(f, (None, None, 0))(h, w, jnp.stack([y, (y + 1) % CLASSES])),
    "vmap of all": lambda f, h, w, y: jax.vmap(f)(stacked(h), stacked(w), jnp.stack([y, (y + 1) % CLASSES, y])),
    "vmap of grad": lambda f, h, w, y: jax.vmap(both(f), (0, None, None))(stacked(h), w, y),
    "grad of vmap": lambda f, h, w, y: both(lambda h, w, y: norm2(jax.vmap(f, (0, None, None))(stacked(h), w, y)))(
        h, w, y
    ),
    "scan": scanned,
    "grad through scan": through_a_scan,
    "checkpoint": lambda f, h, w, y: both(jax.checkpoint(f))(h, w, y),
    "map": lambda f, h, w, y: jax.lax.map(lambda x: both(f)(x, w, y), stacked(h)),
    "cond": lambda f, h, w, y: both(
        lambda h, w, y: jax.lax.cond(w[0, 0] < 9, f, lambda h, w, y: 0.0 * w[0, 0], h, w, y)
    )(h, w, y),
}

# The rule of the sum takes all, and the rule for rows what meets it in another way; the other losses pass through one
# of the two rules.
ALWAYS = ("jvp", "jvp of grad", "vmap of grad")
OF_ROWS = (*ALWAYS, "hessian", "grad of jvp of grad", "vmap of all", "grad through scan")
# What these run is part of another.
PARTS = {
    "hessian": ("jacfwd", "jacrev", "hessian, reverse"),
    "jvp": ("linearize", "jvp, one argument"),
    "vmap of all": ("vmap of hidden", "vmap of kernel", "vmap of labels"),
    "grad of jvp of grad": ("grad of jvp",),
    "scan": ("map",),
}


def grid() -> list[Any]:
    parts = {name for names in PARTS.values() for name in names}
    of = {"mean": [t for t in TRANSFORMS if t not in parts], "none": OF_ROWS}
    usual = {(loss, t) for loss in LOSSES for t in of.get(loss, ALWAYS)}
    return [
        pytest.param(loss, transform, marks=() if (loss, transform) in usual else pytest.mark.slow)
        for loss in LOSSES
        for transform in TRANSFORMS
    ]


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = rng.integers(0, CLASSES, size=ROWS).astype(np.int32)
    return rng.normal(size=(ROWS, FEATURES)), rng.normal(size=(FEATURES, CLASSES)), labels


def assert_equal(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("loss", "transform"), grid())
def test_transform(loss: str, transform: str, rng: np.random.Generator):
    arguments = draw(rng)
    got, want = (run(functools.partial(TRANSFORMS[transform], f), *arguments) for f in LOSSES[loss])
    assert_equal(got, want)


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", ["mean", "none", "statistics"])
def test_eager(loss: str, rng: np.random.Generator):
    got, want = (jax.value_and_grad(f, argnums=(0, 1))(*draw(rng)) for f in (LOSSES[loss][0], jax.jit(LOSSES[loss][0])))
    assert jax.tree.structure(got) == jax.tree.structure(want)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES)
def test_finite_differences(loss: str, rng: np.random.Generator):
    h, w, y = draw(rng)
    check_grads(jax.jit(lambda h, w: LOSSES[loss][0](h, w, y)), (h, w), order=2, modes=("fwd", "rev"), atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_finite_differences_with_respect_to_the_other_arguments(rng: np.random.Generator):
    h, w, y = draw(rng)
    others = {
        "bias": rng.normal(size=CLASSES),
        "weights": WEIGHTS,
        "class_weights": np.array([0.5, 1.0, 2.0]),
        "soft_cap": np.array(2.0),
        "temperature": np.array(0.75),
        "label_smoothing": np.array(0.25),
        "z_loss": np.array(0.5),
        "denominator": np.array(3.0),
    }

    def loss(others: Any) -> Any:
        return linear_softmax_cross_entropy(h, w, y, chunk_rows=2, **others)

    check_grads(jax.jit(loss), (others,), order=2, modes=("fwd", "rev"), atol=1e-4)


def draw32(rng: np.random.Generator, rows: int, features: int, classes: int) -> tuple[Any, Any, Any]:
    hidden, kernel = rng.normal(size=(rows, features)), rng.normal(size=(features, classes))
    return hidden.astype(np.float32), kernel.astype(np.float32), rng.integers(0, classes, rows).astype(np.int32)


@pytest.mark.grid
@pytest.mark.parametrize("loss", ["one chunk", "none", "row loss"])
def test_donated_inputs(loss: str, rng: np.random.Generator):
    f = jax.value_and_grad(LOSSES["one chunk" if loss == "one chunk" else loss][0], argnums=(0, 1))
    h, w, y = draw32(rng, ROWS, FEATURES, CLASSES)
    want = jax.jit(f)(h, w, y)
    h, w = jnp.asarray(h), jnp.asarray(w)
    got = jax.jit(f, donate_argnums=(0, 1))(h, w, y)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    assert h.is_deleted()
    assert w.is_deleted()


@pytest.mark.grid
@pytest.mark.parametrize("loss", ["mean", "none", "statistics", "row loss"])
def test_no_nan_on_the_way(loss: str, rng: np.random.Generator):
    h, w, y = draw32(rng, ROWS, FEATURES, CLASSES)
    if loss in ("mean", "none"):
        y[1] = -100
    with jax.debug_nans(True):
        f = LOSSES[loss][0] if loss != "statistics" else lambda h, w, y: linear_softmax_cross_entropy(h, w, y)
        for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(h, w, y)):
            assert np.all(np.isfinite(leaf))
        jax.value_and_grad(f, argnums=(0, 1))(h, w, y)


@pytest.mark.parametrize(("devices", "dtype"), [(8, jnp.bfloat16), (8, None), (1, None), (1, jnp.bfloat16)])
def test_third_derivatives_by_reverse_mode_do_not_depend_on_chunks(
    devices: int, dtype: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """Where all rows count, too, and where XLA may have split them: JAX drops derivative rules of a scan's body."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    hidden, kernel, labels = draw32(rng, 16, 3, 5)
    step = jnp.cos(kernel)

    def third(chunk_rows: int) -> Any:
        def directional(f: Any) -> Any:
            return lambda kernel: jnp.vdot(jax.grad(f)(kernel), step)

        def loss(kernel: jax.Array) -> jax.Array:
            return linear_softmax_cross_entropy(
                hidden, kernel, labels, ignore_index=None, dtype=dtype, chunk_rows=chunk_rows
            )

        return jax.jit(jax.grad(directional(directional(loss))))(kernel)

    np.testing.assert_allclose(third(8), third(16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_hessian_products_of_a_sum_over_microbatches(dtype: Any, rng: np.random.Generator):
    """Through a scan of the user's own, where JAX drops rules before 0.12: right, or an error with what to write."""
    hidden, kernel, labels = draw32(rng, 16, 3, 5)

    def parts(kernel: jax.Array) -> list[tuple[Any, Any]]:
        h, y = hidden.reshape(2, 8, 3), labels.reshape(2, 8)
        fused = functools.partial(linear_softmax_cross_entropy, dtype=dtype, chunk_rows=4)
        losses = [lambda h, y: fused(h, kernel, y)]
        if dtype is None:
            losses.append(lambda h, y: softmax_cross_entropy(h @ kernel, y))
        scanned = [
            jax.lax.scan(lambda c, x, f=f: (c + f(*x), None), jnp.zeros(()), (h, y))[0]  # type: ignore[misc]
            for f in losses
        ]
        return list(zip(scanned, [f(h[0], y[0]) + f(h[1], y[1]) for f in losses], strict=True))

    def products(i: int) -> Any:
        both = jax.jacrev(lambda kernel: jnp.stack([pair[i] for pair in parts(kernel)]))
        return jax.jit(lambda kernel: jax.jvp(both, (kernel,), (jnp.cos(kernel),))[1])(kernel)

    if dtype is not None and jax.__version_info__ < (0, 12):
        with pytest.raises(NotImplementedError, match="Differentiate inside the scan"):
            products(0)
    else:
        np.testing.assert_allclose(products(0), products(1), rtol=1e-5, atol=1e-5)
