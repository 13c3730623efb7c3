"""The diagonal of the Gauss-Newton matrix of a linear layer, against the dense matrix in float64."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from cases import COMBINED, OPTIONS, covering, draw_labels, precision, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from test_linear_costs import like

import jaxent

# Untyped: tables of arguments are dictionaries.
linear_ggn_diagonal: Any = jaxent.linear_ggn_diagonal
linear_ggn_vector_product: Any = jaxent.linear_ggn_vector_product
softmax_cross_entropy: Any = jaxent.softmax_cross_entropy

ROWS, FEATURES, COUNT = 5, 3, 4


def dense(hidden: Any, kernel: Any, bias: Any, weights: Any, soft_cap: float | None = None) -> tuple[np.ndarray, ...]:
    """`J^T A J` in NumPy, `A = w (diag p - p p^T)`, as a whole; its diagonal."""
    h, w = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    raw = h @ w + np.asarray(bias, np.float64)
    z = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    slope = np.ones_like(raw) if soft_cap is None else np.cosh(raw / soft_cap) ** -2.0
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    by_hidden, by_kernel, by_bias = np.zeros_like(h), np.zeros_like(w), np.zeros(w.shape[1])
    for n, weight in enumerate(weights):
        a = weight * np.outer(slope[n], slope[n]) * (np.diag(p[n]) - np.outer(p[n], p[n]))
        jacobian = np.einsum("j,kl->ljk", h[n], np.eye(w.shape[1]))
        by_kernel += np.einsum("ljk,lm,mjk->jk", jacobian, a, jacobian)
        by_hidden[n] = np.einsum("jl,lm,jm->j", w, a, w)
        by_bias += np.diag(a)
    return by_hidden, by_kernel, by_bias


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", [o if o in COMBINED else pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS])
def test_it_is_the_diagonal_of_the_hessian(option: str, rng: np.random.Generator):
    arguments = OPTIONS[option](rng, (ROWS, COUNT))
    head = tuple(rng.normal(size=s) for s in ((ROWS, FEATURES), (FEATURES, COUNT), (COUNT,)))

    def loss(hidden: Any, kernel: Any, bias: Any) -> Any:
        return softmax_cross_entropy((hidden @ kernel + bias[None]) / 0.75, **arguments)

    hessian = jax.jit(jax.hessian(loss, argnums=(0, 1, 2)))(*head)
    options = {**arguments, "temperature": 0.75, "chunk_rows": 2}
    got = linear_ggn_diagonal(head[0], head[1], bias=head[2], **options)
    for i, (a, x) in enumerate(zip(got, head, strict=True)):
        want = np.diagonal(np.reshape(hessian[i][i], (x.size, x.size))).reshape(x.shape)
        np.testing.assert_allclose(a, want, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize(("soft_cap", "reduction"), covering([2.0, None], ["sum", "mean"]))
def test_it_is_the_diagonal_of_the_dense_matrix(soft_cap: float | None, reduction: Any, rng: np.random.Generator):
    hidden, kernel, bias = (rng.normal(size=s) for s in ((ROWS, FEATURES), (FEATURES, COUNT), (COUNT,)))
    labels = np.array([0, -100, 1, 2, 3])
    hidden[1] = np.nan
    weights = np.array([1.0, 1.0, 2.0, 0.5, 1.0])
    options = {"bias": bias, "weights": weights, "soft_cap": soft_cap, "reduction": reduction, "chunk_rows": 2}
    with jax.enable_x64(True):
        got = linear_ggn_diagonal(hidden, kernel, labels, **options)
    divisor = weights[[0, 2, 3, 4]].sum() if reduction == "mean" else 1
    by_hidden, *shared = dense(np.nan_to_num(hidden), kernel, bias, weights * (labels >= 0), soft_cap)
    for a, b in zip(got, (by_hidden, *shared), strict=True):
        np.testing.assert_allclose(a, b / divisor, rtol=1e-12, atol=1e-16)
    np.testing.assert_array_equal(got.hidden[1], 0)


@pytest.mark.parametrize("gap", [20.0, 41.0, 80.0])
def test_tiny_diagonals_keep_their_digits(gap: float):
    kernel = np.array([[0.0, -gap, -gap - 1], [2.0, 1.0, 0.5]], np.float32)
    hidden = np.array([[1.0, 0.0]], np.float32)
    got = linear_ggn_diagonal(hidden, kernel)
    e = np.exp(kernel[0].astype(np.float64))
    p = e / e.sum()
    of_logits = p * np.array([p[1] + p[2], p[0] + p[2], p[0] + p[1]])
    centred = kernel.astype(np.float64) - kernel[:, :1]
    variance = (p[1:] * centred[:, 1:] ** 2).sum(-1) - (p[1:] * centred[:, 1:]).sum(-1) ** 2
    np.testing.assert_allclose(got.bias, of_logits, rtol=2e-6, atol=1e-37)
    np.testing.assert_allclose(got.hidden[0], variance, rtol=4e-6)


@pytest.mark.parametrize(("batch", "dtype"), covering([(2, 3), (), (0,)], [ml_dtypes.bfloat16, np.float16, np.float32]))
def test_dtypes_and_batches(batch: tuple[int, ...], dtype: Any, rng: np.random.Generator):
    with precision(dtype):
        hidden, kernel = ((rng.integers(-8, 9, s) / 8).astype(dtype) for s in ((*batch, FEATURES), (FEATURES, COUNT)))
        got = linear_ggn_diagonal(hidden, kernel, reduction="sum")
        flat = hidden.reshape(-1, FEATURES)
        want = dense(flat, kernel, np.zeros(COUNT), np.ones(len(flat)))
        assert got.hidden.shape == hidden.shape
        for a, b in zip(got, want, strict=True):
            assert a.dtype == np.float32  # squares of narrow operands are exact, whatever their dtype
            np.testing.assert_allclose(a, b.reshape(a.shape), rtol=4e-6, atol=1e-6)


def test_labels_out_of_range_and_infinite_rows():
    kernel = np.ones((FEATURES, COUNT), np.float32)
    hidden = np.ones((2, FEATURES), np.float32)
    assert np.isnan(linear_ggn_diagonal(hidden, kernel, np.array([0, COUNT])).kernel).all()
    hidden[1] = np.inf
    got = linear_ggn_diagonal(hidden, kernel)
    assert np.isnan(got.hidden[1]).all()
    assert np.isfinite(got.hidden[0]).all()
    removed = linear_ggn_diagonal(hidden[:1], kernel, bias=np.array([0, 0, -np.inf, 0], np.float32))
    deleted = linear_ggn_diagonal(hidden[:1], kernel[:, :3])
    np.testing.assert_allclose(removed.kernel[:, [0, 1, 3]], deleted.kernel, rtol=1e-6)
    np.testing.assert_array_equal(removed.kernel[:, 2], 0)


@pytest.mark.parametrize("kind", ["manual", "explicit", "automatic"])
def test_meshes(kind: str, rng: np.random.Generator):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(axis_type, axis_type))
    arguments = tuple(rng.normal(size=s).astype(np.float32) for s in ((8, 3), (3, 12), (12,)))
    specs = P("data"), P(None, "vocab"), P("vocab")

    def diagonal(hidden: Any, kernel: Any, bias: Any, **options: Any) -> Any:
        return linear_ggn_diagonal(hidden, kernel, bias=bias, chunk_rows=2, reduction="sum", **options)

    want = diagonal(*arguments)
    if kind == "manual":
        split = jax.shard_map(
            lambda *a: tuple(diagonal(*a, vocab_axis="vocab")), mesh=mesh, in_specs=specs, out_specs=specs
        )
        got = run(split, *arguments)
    else:
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments, specs, strict=True)]
            got = run(diagonal, *placed)
        if kind == "explicit":
            assert jax.typeof(got.kernel).sharding.spec == P(None, "vocab")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives(rng: np.random.Generator):
    hidden, kernel = rng.normal(size=(3, 2)), rng.normal(size=(2, COUNT))
    labels = draw_labels(rng, (3,), COUNT)

    def diagonal(hidden: Any, kernel: Any) -> Any:
        return linear_ggn_diagonal(hidden, kernel, labels, soft_cap=3.0, chunk_rows=2)

    check_grads(jax.jit(diagonal), (hidden, kernel), order=1, modes=("fwd", "rev"))
    mapped = jax.vmap(lambda h: linear_ggn_diagonal(h, kernel, reduction="sum").hidden)(hidden)
    np.testing.assert_allclose(mapped, linear_ggn_diagonal(hidden, kernel, reduction="sum").hidden, rtol=1e-13)


def test_products_and_memory():
    def compiled(rows: int, field: slice) -> Any:
        program = jax.jit(lambda h, w: linear_ggn_diagonal(h, w, chunk_rows=128)[field])
        return program.lower(like(rows, 16), like(16, 2048)).compile()

    assert compiled(512, slice(0, 3)).as_text().count(" dot(") == 4
    assert compiled(512, slice(1, 3)).as_text().count(" dot(") == 2
    few, many = (compiled(rows, slice(0, 3)).memory_analysis().temp_size_in_bytes for rows in (512, 2048))
    assert many - few <= 4 * (16 + 4) * (2048 - 512)


@pytest.mark.usefixtures("x64")
def test_labels_drawn_from_the_model_give_unbiased_estimates(rng: np.random.Generator):
    """Over all labels, each as likely as the model makes it: Gauss-Newton-Bartlett, and the Monte-Carlo Fisher."""
    hidden, kernel, v = (rng.normal(size=s) for s in ((2, FEATURES), (FEATURES, 3), (FEATURES, 3)))
    labels = np.stack(np.meshgrid(np.arange(3), np.arange(3)), axis=-1).reshape(9, 2)
    p = np.asarray(jax.nn.softmax(hidden @ kernel, axis=-1))
    likelihood = p[0, labels[:, 0]] * p[1, labels[:, 1]]

    @jax.jit
    @jax.vmap
    def estimates(labels: jax.Array) -> Any:
        gradient = jax.grad(jaxent.linear_softmax_cross_entropy, argnums=1)(hidden, kernel, labels)
        return 2 * gradient**2, jaxent.linear_fisher_vector_product(hidden, kernel, labels, (None, v))[1]

    bartlett, fisher = (np.tensordot(likelihood, x, axes=1) for x in estimates(labels))
    np.testing.assert_allclose(bartlett, linear_ggn_diagonal(hidden, kernel).kernel, rtol=1e-12)
    np.testing.assert_allclose(fisher, linear_ggn_vector_product(hidden, kernel, (None, v))[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "parts"),
    [({"reduction": "none"}, ["`reduction`", "'none'"]), ({"bias": np.ones(3)}, ["`bias`", "(4,)", "float32[3]"])],
)
def test_bad_input(options: dict[str, Any], parts: list[str]):
    with pytest.raises(ValueError, match=r"^jaxent.linear_ggn_diagonal: ") as caught:
        linear_ggn_diagonal(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32), **options)
    for part in parts:
        assert part in str(caught.value)
