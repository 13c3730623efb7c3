"""Every weight, option, kind of targets and reduction in half precision, with a loss scale: no worse than dense code.

Value, gradient and Hessian product against float64 NumPy, each alongside dense code in the same dtypes. What is small
counts as much as what is large: errors are those of each feature and each class relative to itself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles_linear
import pytest
from meshes import run

import jaxent

BF16, FP16 = ml_dtypes.bfloat16, np.float16
ROWS, FEATURES, CLASSES, SCALE = 96, 6, 40, 2.0**15
# Untyped: what is returned depends on `reduction`.
loss: Any = jaxent.linear_softmax_cross_entropy
dense: Any = jaxent.softmax_cross_entropy


@dataclasses.dataclass(frozen=True)
class Case:
    """`options` are those of the dense loss, `transform` what is done to the logits before it."""

    reduction: str
    targets: str
    options: tuple[str, ...] = ()
    transform: tuple[str, ...] = ()
    scaled_by: str = "cotangent"


# Each weight, option and kind of targets with each reduction, most of them together with others.
CASES = (
    Case("mean", "labels"),
    Case("mean", "labels", ("weights", "label_smoothing", "z_loss"), ("bias", "soft_cap"), "denominator"),
    Case("mean", "probabilities", ("class_weights", "label_smoothing", "where"), ("temperature",)),
    Case("mean", "sparse", ("weights", "z_loss"), ("bias", "soft_cap"), "denominator"),
    Case("sum", "labels", ("class_weights", "label_smoothing", "where"), ("temperature",)),
    Case("sum", "probabilities", ("weights", "z_loss"), ("bias", "soft_cap")),
    Case("sum", "sparse", ("label_smoothing", "where"), ("temperature", "soft_cap")),
    Case("none", "labels", ("weights", "class_weights", "z_loss"), ("bias", "temperature")),
    Case("none", "probabilities", ("label_smoothing", "where"), ("soft_cap",)),
    Case("none", "sparse", ("weights", "label_smoothing", "z_loss"), ("bias", "temperature")),
    Case("sum_and_weight", "labels", ("label_smoothing", "z_loss", "weights"), ("soft_cap", "temperature")),
    Case("sum_and_weight", "sparse", ("where",), ("bias",)),
)


def arguments(rng: np.random.Generator) -> dict[str, Any]:
    labels = rng.integers(0, CLASSES // 2, ROWS)  # the other half have small gradients alone
    labels[::7] = -100
    probabilities = rng.exponential(size=(ROWS, CLASSES)) ** 2
    classes = np.argsort(rng.random((ROWS, CLASSES // 2)))[:, :2]
    share = rng.uniform(0.5, 1.0, ROWS)
    mixed = np.zeros((ROWS, CLASSES))
    np.put_along_axis(mixed, classes, np.stack([share, 1 - share], -1), -1)
    return {
        "labels": labels.astype(np.int32),
        "probabilities": (probabilities / probabilities.sum(-1, keepdims=True)).astype(np.float32),
        "sparse": (classes.astype(np.int32), np.stack([share, 1 - share], -1).astype(np.float32)),
        "mixed": mixed.astype(np.float32),
        "weights": rng.choice([0, 0.25, 1, 3], ROWS).astype(np.float32),
        "where": rng.random(ROWS) < 0.7,
        "class_weights": rng.uniform(0.25, 2, CLASSES).astype(np.float32),
        "bias": rng.normal(size=CLASSES).astype(np.float32),
        "label_smoothing": 0.125,
        "z_loss": 0.0625,
        "soft_cap": 6.0,
        "temperature": 1.5,
        "cotangent": rng.uniform(0.5, 2, ROWS).astype(np.float32),
    }


def reduced(case: Case, given: dict[str, Any], found: Any) -> jax.Array:
    """A scalar, in units of the loss scale."""
    if case.reduction == "none":
        found = jnp.sum(given["cotangent"] * found) / ROWS
    elif case.reduction == "sum":
        found = found / ROWS
    elif case.reduction == "sum_and_weight":
        found = found.mean()
    return found if case.scaled_by == "denominator" else SCALE * found


def keywords(case: Case, given: dict[str, Any], *names: str) -> dict[str, Any]:
    scale = {"denominator": np.float32(ROWS / SCALE)} if case.scaled_by == "denominator" else {}
    return {"reduction": case.reduction, **scale, **{name: given[name] for name in names}}


def fused(case: Case, given: dict[str, Any], dtype: Any, h: jax.Array, w: jax.Array) -> jax.Array:
    targets = jaxent.SparseTargets(*given["sparse"]) if case.targets == "sparse" else given[case.targets]
    options = keywords(case, given, *case.options, *case.transform)
    return reduced(case, given, loss(h, w, targets, dtype=dtype, chunk_rows=16, **options))


def plain(case: Case, given: dict[str, Any], dtype: Any, h: jax.Array, w: jax.Array) -> jax.Array:
    z = (h.astype(dtype) @ w.astype(dtype)).astype(np.float32)
    z = z + given["bias"][None] if "bias" in case.transform else z
    z = given["soft_cap"] * jnp.tanh(z / given["soft_cap"]) if "soft_cap" in case.transform else z
    z = z / given["temperature"] if "temperature" in case.transform else z
    targets = given["mixed" if case.targets == "sparse" else case.targets]
    return reduced(case, given, dense(z, targets, **keywords(case, given, *case.options)))


def exact(case: Case, given: dict[str, Any], h: np.ndarray, w: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """Value and gradients in float64, without the loss scale."""
    options: Any = {name: given[name] for name in (*case.options, *case.transform)}
    options["reduction"] = "mean" if case.reduction == "sum_and_weight" else case.reduction
    if case.scaled_by == "denominator":
        options["denominator"] = float(ROWS)
    share = {"none": given["cotangent"] / np.float64(ROWS), "sum": 1 / ROWS}.get(case.reduction, 1.0)
    targets = given["mixed" if case.targets == "sparse" else case.targets]
    found = oracles_linear.softmax_cross_entropy(h, w, targets, cotangent=share, **options)
    return np.sum(share * found.value), found.gradients["hidden"], found.gradients["kernel"]


def errors(found: Any, want: tuple[Any, ...]) -> list[float]:
    """Of a value, and of arrays by their last axis: the mean of each column's relative error."""
    out = []
    for a, b in zip(found, want, strict=True):
        a = np.asarray(a, np.float64).reshape(-1, np.shape(b)[-1] if np.ndim(b) else 1) / SCALE
        b = np.asarray(b).reshape(a.shape)
        out.append(float(np.mean(np.linalg.norm(a - b, axis=0) / np.linalg.norm(b, axis=0))))
    return out


# Half a minute each; `real_use/test_half_precision.py` has a float32 kernel of float16 hidden states.
NARROW = [(FP16, np.float32), (BF16, BF16)]


@pytest.mark.grid
@pytest.mark.parametrize(
    ("dtype", "kernel_dtype"),
    [(FP16, FP16), (BF16, np.float32), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in NARROW)],
)
def test_no_worse_than_dense(dtype: Any, kernel_dtype: Any, rng: np.random.Generator):
    given = arguments(rng)
    h, w = 2 * rng.normal(size=(ROWS, FEATURES)), rng.normal(size=(FEATURES, CLASSES))
    h[:, 0], w[0, CLASSES // 2 :] = 2, -5  # classes without a label have probabilities of 1e-5
    h, w = h.astype(dtype), w.astype(dtype).astype(kernel_dtype)
    steps = rng.normal(size=h.shape).astype(dtype), rng.normal(size=w.shape).astype(dtype).astype(kernel_dtype)

    def everything(h: jax.Array, w: jax.Array) -> Any:
        def of(f: Any, case: Case) -> Any:
            both = jax.value_and_grad(lambda h, w: f(case, given, dtype, h, w), argnums=(0, 1))
            (value, gradients), (_, products) = jax.jvp(both, (h, w), steps)
            return (value, *gradients, *products)

        return [(of(fused, case), of(plain, case)) for case in CASES]

    wide, small = (h.astype(np.float64), w.astype(np.float64)), 1e-6
    for case, (mine, theirs) in zip(CASES, run(everything, h, w), strict=True):
        ahead, behind = (
            exact(case, given, *(x + sign * small * k.astype(np.float64) for x, k in zip(wide, steps, strict=True)))
            for sign in (1, -1)
        )
        products = [(a - b) / (2 * small) for a, b in zip(ahead[1:], behind[1:], strict=True)]
        want = (*exact(case, given, *wide), *products)
        assert [x.dtype for x in mine[1:]] == 2 * [h.dtype, w.dtype]
        own, peer = errors(mine, want), errors(theirs, want)
        # Of results that are rounded alike the errors differ by chance; what is lost is not lost by half.
        assert all(a <= 1.5 * b + 1e-6 for a, b in zip(own, peer, strict=True)), (case, own, peer)


@pytest.mark.parametrize("size", [1e-7, 1e5])
def test_gauss_newton_steps_of_any_size(size: float, rng: np.random.Generator):
    """float16 holds neither 1e-7 nor 1e5: steps are rounded in units of their own."""
    h, w = (rng.normal(size=shape).astype(FP16) for shape in ((ROWS, FEATURES), (FEATURES, CLASSES)))
    v = tuple((size * rng.normal(size=shape)).astype(np.float32) for shape in (h.shape, w.shape, (CLASSES,)))
    bias = np.zeros(CLASSES, FP16)

    def product(h: Any, w: Any, bias: Any, v: Any) -> Any:
        return jaxent.linear_ggn_vector_product(h, w, v, bias=bias, chunk_rows=16)

    got = run(product, h, w, bias, v)
    want = run(product, *(x.astype(np.float32) for x in (h, w, bias)), v)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * float(np.abs(b).max()))
