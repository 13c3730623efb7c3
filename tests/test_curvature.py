"""Curvature: the Hessian with respect to the logits, Gauss-Newton and Fisher products, dense and streamed.

The oracle knows the Hessian and the gradient of each row w.r.t. its logits; the Jacobians of the linear heads are
written out in NumPy, and those of other models are `jax.jacobian`'s.
"""

import inspect
import itertools
import json.decoder
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import (
    COMBINED,
    FAST,
    OPTIONS,
    covering,
    draw_fractions,
    draw_labels,
    draw_logits,
    draw_probabilities,
    precision,
    run,
    softmax_cross_entropy,
)
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from oracles import assert_close
from test_linear_costs import counted, like

import jaxent

# Untyped: tables of arguments are dictionaries.
ggn_vector_product: Any = jaxent.ggn_vector_product
fisher_vector_product: Any = jaxent.fisher_vector_product
linear_ggn_vector_product: Any = jaxent.linear_ggn_vector_product
linear_fisher_vector_product: Any = jaxent.linear_fisher_vector_product
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
logit_hessian, logit_hessian_product = jaxent.logit_hessian, jaxent.logit_hessian_product
exact: Any = oracles.softmax_cross_entropy

ROWS, FEATURES, COUNT = 5, 2, 3
FEW = [*COMBINED, "probabilities_not_normalised"]
MATRIX_OPTIONS = [o if o in FEW else pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS]


def linear(params: Any) -> jax.Array:
    hidden, kernel, bias = params
    return hidden @ kernel + bias[None, :]


def draw_head(rng: np.random.Generator, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rng.normal(size=(rows, FEATURES)), rng.normal(size=(FEATURES, COUNT)), rng.normal(size=COUNT)


def jacobian(hidden: np.ndarray, count: int = COUNT) -> np.ndarray:
    """`d z_nk / d (W, b)`, `(rows, classes, parameters)`."""
    rows, features = hidden.shape
    by_kernel = np.einsum("nd,kc->nkdc", hidden, np.eye(count)).reshape(rows, count, features * count)
    return np.concatenate([by_kernel, np.broadcast_to(np.eye(count), (rows, count, count))], axis=-1)


def matrices(products: list[Any], example: Any) -> list[np.ndarray]:
    """The matrices of products with pytrees, from their columns, in one program."""
    flat, unravel = ravel_pytree(example)

    @jax.vmap
    def columns(v: jax.Array) -> list[jax.Array]:
        return [ravel_pytree(product(unravel(v)))[0] for product in products]

    return [np.asarray(x).T for x in run(columns, jnp.eye(flat.size))]


def assert_curvature(got: np.ndarray, want: np.ndarray) -> None:
    """The wanted matrix, symmetric, without a negative eigenvalue."""
    size = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14 * size)
    np.testing.assert_allclose(got, got.T, rtol=1e-13, atol=1e-15 * size)
    assert np.linalg.eigvalsh((got + got.T) / 2).min() >= -1e-14 * size


# ----------------------------------------------------------------------------------------------------------------------
# By the logits


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3), (1,), (0, 3)])
def test_logit_hessian(shape: tuple[int, ...], rng: np.random.Generator):
    z, v = draw_logits(rng, shape), draw_logits(rng, shape)
    want = exact(z, np.zeros(shape[:-1], np.int32)).hessian.reshape(*shape, shape[-1])
    got = logit_hessian(z)
    assert_close(got, want, ulp=6, dtype=np.float32)
    np.testing.assert_array_equal(got, np.swapaxes(got, -1, -2))
    size = np.abs(want) @ np.abs(v[..., None])
    assert_close(logit_hessian_product(z, v), (want @ v[..., None])[..., 0], ulp=8, dtype=np.float32, size=size[..., 0])


@pytest.mark.grid
def test_logit_hessian_of_other_axes_and_dtypes(rng: np.random.Generator):
    z, v = draw_logits(rng, (2, 4, 3)), draw_logits(rng, (2, 4, 3))
    moved = np.moveaxis(z, 1, -1), np.moveaxis(v, 1, -1)
    np.testing.assert_array_equal(logit_hessian(z, axis=1), logit_hessian(moved[0]))
    np.testing.assert_allclose(
        logit_hessian_product(z, v, axis=1), np.moveaxis(np.asarray(logit_hessian_product(*moved)), -1, 1), rtol=1e-6
    )
    half = z.astype(ml_dtypes.bfloat16)
    assert logit_hessian(half).dtype == np.float32
    np.testing.assert_allclose(logit_hessian(half), logit_hessian(half.astype(np.float32)), rtol=1e-6)
    with jax.enable_x64(True):
        assert logit_hessian_product(z, v.astype(np.float64)).dtype == np.float64


# exp(-86) is a normal float32; a label may be the class that dominates, or one that does not.
TINY = [[0.0, -20.0, -25.0], [0.0, -41.0, -42.0], [-81.0, -40.0, -82.0], [0.0, -86.0, -86.5], [3.0, -np.inf, -38.0]]
FLAT = [[2.0, 2.0, -30.0], [0.0, 0.0, 0.0], [0.0, -np.inf, -np.inf]]


@jax.jit
def columns_of_a_row(z: jax.Array, targets: jax.Array | None) -> list[jax.Array]:
    """The matrix of one row, from its columns, in three ways."""

    def column(v: jax.Array) -> list[jax.Array]:
        dense = ggn_vector_product(lambda z: z, z[None], v[None], targets=targets)
        streamed = linear_ggn_vector_product(jnp.ones((1, 1)), z[None], (None, v[None]), targets=targets)
        return [logit_hessian_product(z, v), dense[0], streamed[1][0]]

    return jax.vmap(column)(jnp.eye(3))


@pytest.mark.parametrize("row", [*TINY, *FLAT])
def test_curvature_keeps_its_digits(row: list[float]):
    z = np.array(row, np.float32)
    want = exact(z, np.array(0), ignore_index=None).hessian
    assert_close(logit_hessian(z), want, ulp=6, dtype=np.float32)
    for targets in (np.array([0]), np.array([1]), None):
        for got in columns_of_a_row(z, targets):
            assert_close(got, want, ulp=6, dtype=np.float32)


@pytest.mark.parametrize("row", [[0.0, np.nan, 1.0], [0.0, np.inf, 1.0], [-np.inf] * 3])
def test_a_row_without_a_softmax_has_no_curvature(row: list[float]):
    z = np.array([row, [0.0, 0.0, 0.0]], np.float32)
    for got in (logit_hessian(z), logit_hessian_product(z, np.ones_like(z))):
        assert np.isnan(got[0]).all()
        assert np.isfinite(got[1]).all()


# ----------------------------------------------------------------------------------------------------------------------
# Gauss-Newton


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", MATRIX_OPTIONS)
def test_the_gauss_newton_matrix_of_a_linear_head_is_the_hessian(option: str, rng: np.random.Generator):
    hidden, kernel, bias = draw_head(rng)
    arguments = OPTIONS[option](rng, (ROWS, COUNT))
    rows = exact(hidden @ kernel + bias, **arguments)
    j = jacobian(hidden)
    total = np.einsum("nki,nkl,nlj->ij", j, rows.hessian, j)
    reduction = "sum" if option == "everything" else "mean"
    want = total * rows.scale(reduction)
    params = jnp.asarray(kernel), jnp.asarray(bias)

    def loss(params: Any) -> Any:
        return softmax_cross_entropy(linear((hidden, *params)), **arguments, reduction=reduction)

    def dense(v: Any) -> Any:
        return ggn_vector_product(lambda p: linear((hidden, *p)), params, v, **arguments, reduction=reduction)

    def streamed(v: Any) -> Any:
        return linear_ggn_vector_product(
            hidden, kernel, (None, *v), bias=bias, **arguments, reduction=reduction, chunk_rows=2
        )[1:]

    def streamed_loss(params: Any) -> Any:
        return linear_softmax_cross_entropy(
            hidden, params[0], bias=params[1], **arguments, reduction=reduction, chunk_rows=2
        )

    def without_targets(v: Any) -> Any:
        return linear_ggn_vector_product(hidden, kernel, (None, *v), bias=bias)[1:]

    # The z-loss's own term may be indefinite, as its docstring says; here it is small next to the rest.
    hessians = [lambda v, f=f: jax.jvp(jax.grad(f), (params,), (v,))[1] for f in (loss, streamed_loss)]
    # Targets that sum to one do not enter.
    sum_to_one = option in ("plain", "smoothing", "smoothing_1", "probabilities", "one_hot")
    for got in matrices([dense, streamed, *hessians, *[without_targets] * sum_to_one], params):
        assert_curvature(got, want)


def network(params: Any, inputs: Any) -> jax.Array:
    return jnp.tanh(inputs @ params["first"]) @ params["last"][0] + params["last"][1][None, :]


def draw_network(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    inputs = rng.normal(size=(ROWS, 2))
    params = {"first": rng.normal(size=(2, 3)), "last": (rng.normal(size=(3, COUNT)), rng.normal(size=COUNT))}
    return inputs, jax.tree.map(jnp.asarray, params)


FISHER_OPTIONS = (
    "plain",
    "everything",
    "probabilities",
    *(pytest.param(o, marks=pytest.mark.slow) for o in ("smoothing", "ignore_-100", "denominator")),
)


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", FISHER_OPTIONS)
def test_both_matrices_of_a_network(option: str, rng: np.random.Generator):
    inputs, params = draw_network(rng)
    arguments = OPTIONS[option](rng, (ROWS, COUNT))
    z, columns = jax.jit(lambda p: (network(p, inputs), jax.jacobian(lambda p: network(p, inputs))(p)))(params)
    j = np.concatenate([np.asarray(c).reshape(ROWS, COUNT, -1) for c in jax.tree.leaves(columns)], axis=-1)
    rows = exact(np.asarray(z), **arguments)
    gauss_newton = np.einsum("nki,nkl,nlj->ij", j, rows.hessian, j) * rows.scale("mean")
    dense, given = [], dict(arguments)
    if option == "everything":
        arguments = {k: v for k, v in arguments.items() if k not in ("z_loss", "class_weights")}
        del arguments["where"]
        arguments["weights"] = arguments["weights"] + np.float32(0.25)
    else:
        dense = [lambda v: ggn_vector_product(lambda p: network(p, inputs), params, v, **given)]

    weights = arguments.get("weights", np.ones(ROWS))
    alone = exact(np.asarray(z), **{k: v for k, v in arguments.items() if k not in ("weights", "denominator")})
    g = np.einsum("nki,nk->ni", j, alone.gradient)
    want = np.einsum("n,ni,nj->ij", weights * alone.weights, g, g)
    want /= arguments.get("denominator", np.sum(weights * alone.weights))
    labels = arguments.pop("targets")
    # The classes may lie on any axis, as long as labels and probabilities agree.
    turned = labels if np.issubdtype(labels.dtype, np.integer) else labels.T

    def product(v: Any) -> Any:
        return fisher_vector_product(lambda p: network(p, inputs).T, params, turned, v, axis=0, **arguments)

    for got, wanted in zip(matrices([product, *dense], params), (want, gauss_newton), strict=False):
        assert_curvature(got, wanted)


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
def test_the_gauss_newton_matrix_is_the_fisher_matrix_of_labels_from_the_model(rng: np.random.Generator):
    inputs, params = draw_network(rng)
    v = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    p = np.asarray(jax.nn.softmax(network(params, inputs)))
    # Every row once for each label, weighted by the label's probability: the expectation, without drawing.
    repeated, labels = np.repeat(inputs, COUNT, axis=0), np.tile(np.arange(COUNT), ROWS)

    @jax.jit
    def both(v: Any) -> Any:
        return (
            ggn_vector_product(lambda q: network(q, inputs), params, v),
            fisher_vector_product(lambda q: network(q, repeated), params, labels, v, weights=p.reshape(-1)),
            fisher_vector_product(lambda q: network(q, inputs), params, p.argmax(-1), v),
        )

    gauss_newton, expected, empirical = both(v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14), gauss_newton, expected)
    difference = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), gauss_newton, empirical)
    assert max(jax.tree.leaves(difference)) > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Streamed


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rows", "chunk_rows"), [((7,), 3), pytest.param((2, 3), None, marks=pytest.mark.slow), ((0,), None)]
)
def test_streamed_products_are_those_of_the_shaped_head(rows: tuple, chunk_rows: int | None, rng: np.random.Generator):
    hidden, kernel, bias = rng.normal(size=(*rows, 4)), rng.normal(size=(4, 5)), rng.normal(size=5)
    labels, probabilities = draw_labels(rng, rows, 5), draw_probabilities(rng, (*rows, 5))
    labels.flat[:1] = -100 if labels.size > 1 else 0
    v = rng.normal(size=hidden.shape), rng.normal(size=kernel.shape), rng.normal(size=bias.shape)
    head = {"bias": bias, "soft_cap": 3.0, "temperature": 0.75, "chunk_rows": chunk_rows}
    shared = {"weights": rng.random(rows), "where": rng.random(rows) < 0.8, "label_smoothing": 0.25}
    full = {**shared, "class_weights": rng.random(5), "z_loss": 0.125}

    def logits(params: Any) -> jax.Array:
        hidden, kernel, bias = params
        return 3.0 * jnp.tanh((hidden @ kernel + bias) / 3.0) / 0.75

    @jax.jit
    @jax.numpy_rank_promotion("allow")
    def pairs(params: Any, v: Any) -> list[Any]:
        h, w, _ = params
        return [
            (ggn_vector_product(logits, params, v), linear_ggn_vector_product(h, w, v, **head)),
            (
                ggn_vector_product(logits, params, v, targets=labels, **full),
                linear_ggn_vector_product(h, w, v, targets=labels, **head, **full),
            ),
            (
                ggn_vector_product(logits, params, v, targets=probabilities, **full, reduction="sum"),
                linear_ggn_vector_product(h, w, v, targets=probabilities, **head, **full, reduction="sum"),
            ),
            (
                fisher_vector_product(logits, params, labels, v, **shared),
                linear_fisher_vector_product(h, w, labels, v, **head, **shared),
            ),
            (
                fisher_vector_product(logits, params, probabilities, v, denominator=3.0),
                linear_fisher_vector_product(h, w, probabilities, v, **head, denominator=3.0),
            ),
        ]

    for want, got in pairs((hidden, kernel, bias), v):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
def test_what_is_held_fixed(rng: np.random.Generator):
    hidden, kernel, bias = draw_head(rng)
    v = tuple(rng.normal(size=x.shape) for x in (hidden, kernel, bias))
    labels = draw_labels(rng, (ROWS,), COUNT)
    blocks = jax.jit(
        lambda v: [
            linear_fisher_vector_product(
                hidden,
                kernel,
                labels,
                tuple(x if k == i else None for k, x in enumerate(v)),
                bias=bias,
                chunk_rows=2,
            )
            for i in range(3)
        ]
    )(v)
    # Held fixed is a step of 0, whose product is not asked for.
    for i, got in enumerate(blocks):
        steps = tuple(x if k == i else np.zeros_like(x) for k, x in enumerate(v))
        want = fisher_vector_product(linear, (hidden, kernel, bias), labels, steps)
        assert [x is None for x in got] == [k != i for k in range(3)]
        np.testing.assert_allclose(got[i], want[i], rtol=1e-11)
    assert linear_ggn_vector_product(hidden, kernel, (None, None)) == (None, None)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (np.float32, np.float16))]
)
def test_narrow_heads_are_added_in_float32(dtype: Any):
    # 512 chunks of one row, each of which adds 1/1024 to the products; a bf16 sum would stay at 1/4.
    hidden, kernel, bias = np.ones((512, 1), dtype), np.zeros((1, 2), dtype), np.zeros(2, dtype)
    step = np.array([1.0, -1.0], dtype)
    options = {"bias": bias, "chunk_rows": 1, "weights": np.full(512, 1 / 512, np.float32), "reduction": "sum"}
    v = None, step[None], np.zeros_like(step)
    for got in (
        linear_ggn_vector_product(hidden, kernel, v, **options),
        linear_fisher_vector_product(hidden, kernel, np.zeros(512, np.int32), v, **options),
    ):
        assert [None if x is None else x.dtype for x in got] == [None, dtype, dtype]
        np.testing.assert_array_equal(np.asarray(got[1], np.float32), [[0.5, -0.5]])
        np.testing.assert_array_equal(np.asarray(got[2], np.float32), [0.5, -0.5])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_dtypes_of_steps_and_parameters(dtype: Any, rng: np.random.Generator):
    with precision(dtype):
        hidden, kernel, bias = (x.astype(dtype) for x in draw_head(rng))
        v = tuple(rng.normal(size=x.shape).astype(np.float32) for x in (hidden, kernel, bias))
        wide = tuple(x.astype(np.float64) for x in (hidden, kernel, bias))
        steps = tuple(x.astype(dtype).astype(np.float64) for x in v)
        j = np.concatenate(
            [np.einsum("nm,ck->ncmk", np.eye(ROWS), wide[1].T).reshape(ROWS, COUNT, -1), jacobian(wide[0])], -1
        )
        p = np.exp(wide[0] @ wide[1] + wide[2])
        p /= p.sum(axis=-1, keepdims=True)
        u = j @ np.concatenate([x.ravel() for x in steps])
        want = np.einsum("nki,nk->i", j, p * (u - np.sum(p * u, axis=-1, keepdims=True))) / ROWS
        tolerance = {2: 2e-2, 4: 2e-6, 8: 1e-7}[np.dtype(dtype).itemsize]
        for got in (
            jax.jit(lambda v: ggn_vector_product(linear, (hidden, kernel, bias), v))(v),
            jax.jit(lambda v: linear_ggn_vector_product(hidden, kernel, v, bias=bias, chunk_rows=2))(v),
        ):
            assert [x.dtype for x in got] == [np.float32] * 3
            flat = np.concatenate([np.ravel(x) for x in got])
            np.testing.assert_allclose(flat, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


# ----------------------------------------------------------------------------------------------------------------------
# Edges


@pytest.mark.grid
def test_rows_that_do_not_count(rng: np.random.Generator):
    hidden, kernel, _ = (x.astype(np.float32) for x in draw_head(rng))
    labels, v = draw_labels(rng, (ROWS,), COUNT), rng.normal(size=kernel.shape).astype(np.float32)
    broken, marked = hidden.copy(), labels.copy()
    broken[[1, 3]] = np.nan
    marked[1] = -100
    weights = np.array([1, 1, 2, 0, 0], np.float32)
    kept = np.array([0, 2])
    steps = np.full_like(hidden, np.nan)
    steps[kept] = 1
    every, none = np.ones(ROWS, bool), np.zeros(ROWS, bool)

    def ggn(hidden: Any, labels: Any, steps: Any, **options: Any) -> Any:
        return linear_ggn_vector_product(hidden, kernel, (steps, v), targets=labels, chunk_rows=2, **options)

    def fisher(hidden: Any, labels: Any, steps: Any, **options: Any) -> Any:
        return linear_fisher_vector_product(hidden, kernel, labels, (steps, v), chunk_rows=2, **options)

    for product in map(jax.jit, (ggn, fisher)):
        want = product(hidden[kept], labels[kept], np.ones_like(hidden[kept]), weights=weights[kept], where=every[kept])
        steps[4] = 1
        got = product(broken, marked, steps, weights=weights, where=every)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
        np.testing.assert_allclose(got[0][kept], want[0], rtol=1e-6)
        np.testing.assert_array_equal(got[0][np.array([1, 3, 4])], 0)
        for nothing in product(broken, labels, steps, weights=weights, where=none):
            np.testing.assert_array_equal(nothing, 0)
        beyond = np.where(np.arange(ROWS) == 0, COUNT, labels)
        outside = product(hidden, beyond, np.ones_like(hidden), weights=weights, where=every)
        assert np.isnan(outside[1]).all()
        assert np.isnan(outside[0][0]).all()

    def dense(logits: Any, labels: Any) -> Any:
        return ggn_vector_product(lambda z: z, logits, np.ones_like(logits), targets=labels)

    z = draw_logits(rng, (2, COUNT))
    z[0] = np.nan
    np.testing.assert_array_equal(dense(z, np.array([-100, 0]))[0], 0)
    assert np.isnan(dense(z, np.array([0, 0]))[0]).all()


TREE = {"w": np.zeros((2, 3), np.float32)}
BAD = [
    (
        lambda: logit_hessian(np.zeros((2, 3), np.int32)),
        TypeError,
        ["logit_hessian", "`logits`", "floating", "int32[2,3]"],
    ),
    (lambda: logit_hessian_product(np.zeros((2, 3)), np.zeros(3)), ValueError, ["`v`", "(2, 3)", "float32[3]"]),
    (lambda: ggn_vector_product(lambda p: p["w"], TREE, np.zeros((2, 3))), ValueError, ["`v`", "structure", "'w'"]),
    (lambda: ggn_vector_product(lambda p: p["w"], TREE, {"w": np.zeros(2)}), ValueError, ["`v['w']`", "(2, 3)"]),
    (
        lambda: ggn_vector_product(lambda p: p["w"], {"w": np.arange(3)}, {"w": np.zeros(3)}),
        TypeError,
        ["ggn_vector_product", "`params['w']`", "floating"],
    ),
    (lambda: ggn_vector_product(lambda p: p, TREE, TREE), TypeError, ["`logits_fn`", "floating logits", "dict"]),
    (
        lambda: ggn_vector_product(lambda p: p["w"], TREE, TREE, reduction="none"),
        ValueError,
        ["`reduction`", "'mean' or 'sum'", "'none'"],
    ),
    (
        lambda: fisher_vector_product(lambda p: p["w"], TREE, np.zeros(3, np.int32), TREE),
        ValueError,
        ["fisher_vector_product", "(2,)", "int32[3]"],
    ),
    (
        lambda: linear_ggn_vector_product(np.zeros((2, 3)), np.zeros((3, 4)), np.zeros((3, 4))),
        TypeError,
        ["linear_ggn_vector_product", "`v`", "(v_hidden, v_kernel)"],
    ),
    (
        lambda: linear_ggn_vector_product(np.zeros((2, 3)), np.zeros((3, 4)), (None, np.zeros((3, 5)))),
        ValueError,
        ["`v_kernel`", "(3, 4)", "float32[3,5]"],
    ),
    (
        lambda: linear_fisher_vector_product(
            np.zeros((2, 3)), np.zeros((3, 4)), np.zeros(2, np.int32), (None, None, np.zeros(4))
        ),
        ValueError,
        ["linear_fisher_vector_product", "`v_bias`", "no `bias`"],
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int):
    call, error, parts = BAD[case]
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Transformations and meshes


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("of", [pytest.param("ggn", marks=pytest.mark.slow), "fisher"])
def test_derivatives_of_products(of: str, rng: np.random.Generator):
    hidden, kernel, bias = draw_head(rng, 3)
    v = tuple(rng.normal(size=x.shape) for x in (kernel, bias))
    labels, weights = np.array([0, 2, 1]), draw_fractions(rng, (3,)).astype(np.float64) + 0.25

    def dense(hidden: Any, kernel: Any, bias: Any, weights: Any, v: Any) -> Any:
        def logits(p: Any) -> jax.Array:
            return linear((hidden, *p))

        if of == "ggn":
            return ggn_vector_product(logits, (kernel, bias), v, weights=weights, targets=labels, z_loss=0.25)
        return fisher_vector_product(logits, (kernel, bias), labels, v, weights=weights)

    def streamed(hidden: Any, kernel: Any, bias: Any, weights: Any, v: Any) -> Any:
        options = {"bias": bias, "weights": weights, "chunk_rows": 2}
        if of == "ggn":
            return linear_ggn_vector_product(hidden, kernel, (None, *v), targets=labels, z_loss=0.25, **options)[1:]
        return linear_fisher_vector_product(hidden, kernel, labels, (None, *v), **options)[1:]

    primals = hidden, kernel, bias, weights, v
    check_grads(jax.jit(dense), primals, order=1, modes=("fwd", "rev"))
    tangents = jax.tree.map(lambda x: rng.normal(size=x.shape), primals)
    cotangents = jax.tree.map(jnp.asarray, v)

    @jax.jit
    def derivatives(tangents: Any, cotangents: Any) -> Any:
        return [(jax.jvp(f, primals, tangents)[1], jax.vjp(f, *primals)[1](cotangents)) for f in (dense, streamed)]

    want, got = derivatives(tangents, cotangents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), got, want)


PRODUCTS: dict[str, Any] = {
    "ggn": lambda h, w, b, y, c, v, **o: ggn_vector_product(linear, (h, w, b), v, weights=c, **o),
    "fisher": lambda h, w, b, y, c, v, **o: fisher_vector_product(linear, (h, w, b), y, v, weights=c, **o),
    "linear_ggn": lambda h, w, b, y, c, v, **o: linear_ggn_vector_product(
        h, w, v, bias=b, weights=c, chunk_rows=4, **o
    ),
    "linear_fisher": lambda h, w, b, y, c, v, **o: linear_fisher_vector_product(
        h, w, y, v, bias=b, weights=c, chunk_rows=4, **o
    ),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("linear_ggn", kind) for kind in ("automatic", "explicit", "manual")),
        *covering(["ggn", "fisher", "linear_fisher"], ["automatic", "manual", "explicit"]),
    ],
)
def test_products_on_meshes(name: str, kind: str, rng: np.random.Generator):
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(axis_type, axis_type))
    hidden, kernel, bias = (rng.normal(size=s).astype(np.float32) for s in ((16, 3), (3, 8), (8,)))
    arguments = hidden, kernel, bias, draw_labels(rng, (16,), 8), draw_fractions(rng, (16,))
    v = tuple(rng.normal(size=x.shape).astype(np.float32) for x in (hidden, kernel, bias))
    layer = P("data"), P(None, "vocab"), P("vocab")
    specs = *layer, P("data"), P("data"), layer
    product = PRODUCTS[name]
    if kind == "manual":
        # A mean inside shard_map would be one device's: the sum, as for any loss.
        options = {"reduction": "sum"}
        split = jax.shard_map(
            lambda *a: product(*a, **options, vocab_axis="vocab"), mesh=mesh, in_specs=specs, out_specs=layer
        )
        program = jax.jit(split).lower(*arguments, v).compile(FAST)
        got = program(*arguments, v)
    else:
        options = {}
        with jax.set_mesh(mesh):
            placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), (*arguments, v), specs)
            program = jax.jit(product).lower(*placed).compile(FAST)
            got = program(*placed)
    want = run(lambda *a: product(*a, **options), *arguments, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "all-gather" not in str(program.as_text())


# ----------------------------------------------------------------------------------------------------------------------
# Costs


@pytest.mark.grid
@pytest.mark.compiled
@pytest.mark.parametrize("of", ["ggn", "fisher"])
def test_costs_of_the_streamed_products(of: str):
    features, classes, chunk = 16, 4096, 128

    def product(hidden: Any, kernel: Any, bias: Any, labels: Any, *v: Any) -> Any:
        options = {"bias": bias, "chunk_rows": chunk}
        if of == "ggn":
            return linear_ggn_vector_product(hidden, kernel, v, targets=labels, **options)
        return linear_fisher_vector_product(hidden, kernel, labels, v, **options)

    def program(rows: int) -> Any:
        h, w, b = like(rows, features), like(features, classes), like(classes)
        return h, w, b, like(rows, dtype=np.int32), h, w, b

    compiled: list[Any] = [jax.jit(product).lower(*program(rows)).compile() for rows in (1024, 4096)]
    few, many = (x.memory_analysis().temp_size_in_bytes for x in compiled)
    # What grows are the rows themselves: hidden states, their steps and the product by them.
    assert many - few <= 4 * 3 * (4096 - 1024) * features
    assert many <= 9 * 4 * chunk * classes < 4 * 4096 * classes / 2

    h, w, b, labels, *_ = program(1024)
    frozen = counted(lambda *a: product(*a, None, a[1]), h, w, b, labels)
    least = 1024 * features * classes
    assert 3 * least <= frozen <= 3.1 * least
    every = counted(lambda *a: product(*a, a[0], a[1], a[2]), h, w, b, labels)
    assert 5 * least <= every <= 5.1 * least


# ----------------------------------------------------------------------------------------------------------------------
# A Newton step


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
def test_newton_steps_by_conjugate_gradients_find_the_entropy_of_the_data():
    """The kind of a character (letter, blank, other) after the two before it, in a module of the standard library.

    With a column for every context the least loss is known: the conditional entropy of the counts.
    """
    text = np.frombuffer(inspect.getsource(json.decoder).encode(), np.uint8)
    letters = [*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1)]
    kinds = np.where(np.isin(text, letters), 0, np.where(np.isin(text, [*b" \t\r\n"]), 1, 2))
    context, following = kinds[:-2] * 3 + kinds[1:-1], kinds[2:]
    hidden = np.eye(9)[context]
    counts = np.zeros((9, 3))
    np.add.at(counts, (context, following), 1)
    entropy = jaxent.conditional_entropy(counts / counts.sum(), axis=0)

    def loss(kernel: Any) -> Any:
        return jaxent.linear_softmax_cross_entropy(hidden, kernel, following, chunk_rows=2048)

    @jax.jit
    def newton(kernel: jax.Array) -> tuple[jax.Array, Any]:
        value, gradient = jax.value_and_grad(loss)(kernel)

        def damped(v: jax.Array) -> jax.Array:
            return linear_ggn_vector_product(hidden, kernel, (None, v), chunk_rows=2048)[1] + 1e-7 * v

        step, _ = cg(damped, gradient, tol=1e-8, maxiter=27)
        return kernel - step, value - entropy

    kernel, excess = jnp.zeros((9, 3)), []
    for _ in range(8):
        kernel, above = newton(kernel)
        excess.append(float(above))
    assert excess[0] > 0.3
    assert abs(excess[-1]) < 1e-10
    assert all(later < earlier / 4 for earlier, later in itertools.pairwise(excess[:6]))
