"""Gradient norms of single rows, against `vmap(grad)` of the row losses and exact rows; and the noise scale."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import COMBINED, OPTIONS, covering, draw_labels, precision, run
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from oracles import assert_close
from test_linear_costs import like

import jaxent

# Untyped: tables of arguments are dictionaries.
linear_gradient_norms: Any = jaxent.linear_gradient_norms
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
gradient_noise_scale = jaxent.gradient_noise_scale

ROWS, FEATURES, COUNT = 7, 3, 4


def by_vmap(hidden: Any, kernel: Any, bias: Any, per_row: dict[str, Any], **shared: Any) -> list[np.ndarray]:
    """The norms of the gradients that `vmap(grad)` holds: hidden state, kernel, bias."""

    def loss(hidden: Any, kernel: Any, bias: Any, per_row: Any) -> Any:
        one = {k: v[None] for k, v in per_row.items()}
        return linear_softmax_cross_entropy(hidden[None], kernel, bias=bias, **one, **shared, reduction="sum")

    gradients = run(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), (0, None, None, 0)), hidden, kernel, bias, per_row)
    return [np.linalg.norm(np.reshape(g, (len(hidden), -1)), axis=-1) for g in gradients]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", [o if o in COMBINED else pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS])
def test_norms_are_those_of_vmap_grad(option: str, rng: np.random.Generator):
    hidden, kernel, bias = (rng.normal(size=s) for s in ((ROWS, FEATURES), (FEATURES, COUNT), (COUNT,)))
    arguments = OPTIONS[option](rng, (ROWS, COUNT))
    arguments.pop("denominator", None)
    head = {"soft_cap": 2.0, "temperature": 0.75}
    per_row = {k: jnp.asarray(v) for k, v in arguments.items() if k in ("targets", "where", "weights")}
    shared = {k: v for k, v in arguments.items() if k not in per_row}
    got = linear_gradient_norms(hidden, kernel, bias=bias, **arguments, **head, chunk_rows=3)
    want = by_vmap(hidden, kernel, bias, per_row, **shared, **head)
    for a, b in zip(got[1:4], want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-16)
    z = 2 * np.tanh((hidden @ kernel + bias) / 2) / 0.75
    residual = np.linalg.norm(oracles.softmax_cross_entropy(z, **arguments).gradient, axis=-1)
    np.testing.assert_allclose(got.residual, residual, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("dtype", "batch"),
    covering([np.float32, ml_dtypes.bfloat16, np.float16, np.float64], [(2, 3), (1,), (0,)]),
)
def test_dtypes_and_batches(batch: tuple[int, ...], dtype: Any, rng: np.random.Generator):
    with precision(dtype):
        # Multiples of 1/8, so that the logits are exact in every dtype.
        hidden, kernel = ((rng.integers(-8, 9, s) / 8).astype(dtype) for s in ((*batch, FEATURES), (FEATURES, COUNT)))
        labels = draw_labels(rng, batch, COUNT)
        got = linear_gradient_norms(hidden, kernel, labels, chunk_rows=4)
        h, w = hidden.astype(np.float64), kernel.astype(np.float64)
        d = oracles.softmax_cross_entropy(h @ w, labels).gradient
        size = np.linalg.norm(d, axis=-1)
        want = size, np.linalg.norm(d @ w.T, axis=-1), size * np.linalg.norm(h, axis=-1), size
        wide = np.float64 if dtype == np.float64 else np.float32
        for name, a, b in zip(got._fields, got[:4], want, strict=False):
            assert a.dtype == wide
            # Only the product with the kernel sees its operands rounded.
            least = 4 * float(ml_dtypes.finfo(dtype).eps) if name == "hidden" else 1e-6
            np.testing.assert_allclose(a, b, rtol=max(least, 1e-6), atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_tiny_norms_keep_their_digits(dtype: Any):
    hidden = np.ones((2, 1), dtype)
    hidden[1] = 0.5
    for gap in (5.0, 20.0, 41.0, 80.0, 86.0):
        # One feature: the logits are the kernel's row, and so is the direction of the hidden state's gradient.
        kernel = np.array([[0.0, -gap, -gap - 1]], dtype)
        z = hidden.astype(np.float64) @ kernel.astype(np.float64)
        d = oracles.softmax_cross_entropy(z, np.zeros(2, np.int32)).gradient
        size = np.linalg.norm(d, axis=-1)
        by_hidden = np.abs(d @ kernel.astype(np.float64)[0])
        got = linear_gradient_norms(hidden, kernel, np.zeros(2, np.int32))
        for a, b in ((got.residual, size), (got.kernel, size * hidden[:, 0].astype(np.float64)), (got.bias, size)):
            assert_close(a, b, ulp=8, dtype=np.float32, where=gap)
        tolerance = 2 * float(ml_dtypes.finfo(dtype).eps) / float(np.finfo(np.float32).eps)
        assert_close(got.hidden, by_hidden, ulp=8 if dtype == np.float32 else tolerance, dtype=np.float32, where=gap)


@pytest.mark.grid
def test_rows_at_the_edges(rng: np.random.Generator):
    hidden, kernel = (rng.normal(size=s).astype(np.float32) for s in ((ROWS, FEATURES), (FEATURES, COUNT)))
    labels = np.array([0, -100, COUNT, 1, 2, 3, 0])
    hidden[[1, 3, 4]] = np.nan
    options = {"where": np.arange(ROWS) != 4, "weights": np.array([2, 1, 1, 1, 1, 0, 1], np.float32), "chunk_rows": 3}

    def norms(hidden: Any) -> Any:
        return linear_gradient_norms(hidden, kernel, labels, **options)

    slopes = jax.grad(lambda h: jnp.sum(sum(x[jnp.array([0, 1, 4, 5, 6])] for x in norms(h))))(hidden)
    for x in norms(hidden):
        np.testing.assert_array_equal(np.isnan(x), [False, False, True, True, False, False, False])
        np.testing.assert_array_equal(np.asarray(x)[[1, 4, 5]], 0)
        assert np.all(np.asarray(x)[[0, 6]] > 0)
    np.testing.assert_array_equal(slopes[np.array([1, 4, 5])], 0)
    assert np.isfinite(slopes[np.array([0, 6])]).all()
    unweighted = linear_gradient_norms(hidden[:1], kernel, labels[:1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:1], 2 * b, rtol=1e-6), norms(hidden), unweighted)


@pytest.mark.parametrize("per", ["row", "sequence"])
def test_no_features(per: Any):
    bias = np.arange(3, dtype=np.float32)
    got = linear_gradient_norms(np.zeros((2, 1, 0)), np.zeros((0, 3)), np.array([[0], [2]]), bias=bias, per=per)
    p = np.exp(bias.astype(np.float64)) / np.exp(bias.astype(np.float64)).sum()
    want = np.linalg.norm(p - np.eye(3)[[0, 2]], axis=-1).reshape(got.bias.shape)
    for x in (got.residual, got.bias):
        np.testing.assert_allclose(x, want, rtol=1e-6)
    for x in (got.hidden, got.kernel, got.survived):
        np.testing.assert_array_equal(x, 0 * want)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_of_norms(rng: np.random.Generator):
    hidden, kernel, bias = (rng.normal(size=s) for s in ((3, 2), (2, COUNT), (COUNT,)))
    labels = np.array([0, 3, 1])

    def norms(hidden: Any, kernel: Any, bias: Any) -> Any:
        return linear_gradient_norms(hidden, kernel, labels, bias=bias, soft_cap=3.0, chunk_rows=2)

    check_grads(jax.jit(norms), (hidden, kernel, bias), order=1, modes=("fwd", "rev"))
    mapped = jax.vmap(lambda h, y: linear_gradient_norms(h, kernel, y, bias=bias, soft_cap=3.0))(hidden, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), mapped, norms(hidden, kernel, bias))


@pytest.mark.grid
def test_norms_with_the_classes_split(rng: np.random.Generator):
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto, AxisType.Auto))
    hidden, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((8, 3), (3, 12), (12,)))
    arguments = hidden, kernel, bias, draw_labels(rng, (8,), 12)

    def norms(hidden: Any, kernel: Any, bias: Any, labels: Any, **options: Any) -> Any:
        return linear_gradient_norms(hidden, kernel, labels, bias=bias, label_smoothing=0.25, chunk_rows=2, **options)

    specs = P("data"), P(None, "vocab"), P("vocab"), P("data")
    split = jax.jit(
        jax.shard_map(lambda *a: norms(*a, vocab_axis="vocab"), mesh=mesh, in_specs=specs, out_specs=P("data"))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), split(*arguments), norms(*arguments))


@pytest.mark.grid
@pytest.mark.compiled
def test_the_memory_of_norms_does_not_grow_with_the_rows():
    def temporaries(rows: int) -> int:
        arguments = like(rows, 16), like(16, 4096), like(rows, dtype=np.int32)
        program = jax.jit(lambda *a: linear_gradient_norms(*a, chunk_rows=128))
        compiled: Any = program.lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(1024), temporaries(4096)
    # What grows are the rows: hidden states without the ignored ones, and a few numbers for each.
    assert many - few <= 4 * (16 + 4) * (4096 - 1024)
    assert many <= 4 * 4 * 128 * 4096


# ----------------------------------------------------------------------------------------------------------------------
# The noise scale


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weighted", [False, True])
def test_the_noise_scale_of_uniform_logits_is_known(weighted: bool):
    """One hidden state, logits of 0, labels drawn from `q`: `g = (1/C - e_y) h^T`, `G = (1/C - q) h^T`.

    Then `tr Sigma = |h|^2 (1 - |q|^2)` and `|G|^2 = |h|^2 |1/C - q|^2`. Both estimates are averaged over all data sets
    of four examples, each as likely as `q` makes it: being unbiased, they give these numbers, not near them.
    """
    q, h = np.array([0.5, 0.25, 0.25]), np.array([0.5, -1.0, 2.0])
    weights = np.array([1.0, 2.0, 0.5, 1.0]) if weighted else None
    kernel, hidden = np.zeros((3, 3)), np.tile(h, (4, 1))
    data = np.array(list(itertools.product(range(3), repeat=4)))

    @jax.jit
    @jax.vmap
    def noise(labels: jax.Array) -> Any:
        norms = linear_gradient_norms(hidden, kernel, labels)
        gradient = jax.grad(lambda w: linear_softmax_cross_entropy(hidden, w, labels, weights=weights))(kernel)
        return gradient_noise_scale(norms.kernel, jnp.linalg.norm(gradient), weights=weights)

    got, likelihood = noise(data), q[data].prod(axis=-1)
    trace, squared_norm = h @ h * (1 - q @ q), h @ h * np.sum((1 / 3 - q) ** 2)
    np.testing.assert_allclose(likelihood @ got.trace, trace, rtol=1e-12)
    np.testing.assert_allclose(likelihood @ got.squared_norm, squared_norm, rtol=1e-12)
    plain = np.ptp(data, axis=-1) > 0
    np.testing.assert_allclose(got.scale[plain], (got.trace / got.squared_norm)[plain], rtol=1e-12)


def test_the_noise_scale_at_the_edges():
    norms = np.array([3.0, 3.0, np.nan, 7.0], np.float32)
    kept = np.array([True, True, False, False])
    got = gradient_noise_scale(norms, 2.5, where=kept)
    np.testing.assert_allclose(got, (11 / 7, 5.5, 3.5), rtol=1e-6)
    # Squares of 1e-30 underflow; the quotient does not see the scale.
    tiny = gradient_noise_scale(norms * np.float32(1e-30), 2.5e-30, where=kept)
    np.testing.assert_allclose(tiny.scale, 11 / 7, rtol=1e-5)
    for few in (gradient_noise_scale(np.ones(1), 1.0), gradient_noise_scale(np.ones(2), 1.0, where=np.zeros(2, bool))):
        assert np.isnan(few).all()
    slope = jax.grad(lambda n: gradient_noise_scale(n, 2.5, where=kept).trace)(norms)
    np.testing.assert_allclose(slope, [6.0, 6.0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: gradient_noise_scale(np.ones(3), np.ones(2)), ValueError, ["`mean_norm`", "scalar", "float32[2]"]),
        (lambda: gradient_noise_scale(np.ones(3, np.complex64), 1.0), TypeError, ["`norms`", "floating", "complex64"]),
        (lambda: gradient_noise_scale(np.ones(3), 1.0, where=np.ones(2, bool)), ValueError, ["`where`", "(3,)"]),
        (
            lambda: linear_gradient_norms(np.ones((2, 3)), np.ones((3, 4)), np.zeros(3, np.int32)),
            ValueError,
            ["linear_gradient_norms", "`targets`", "(2,)", "int32[3]"],
        ),
        (
            lambda: linear_gradient_norms(np.ones((2, 3)), np.ones((4, 4)), np.zeros(2, np.int32)),
            ValueError,
            ["linear_gradient_norms", "`kernel`", "3 features"],
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], parts: list[str]):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
