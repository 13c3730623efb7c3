"""Curvature products streamed from hidden states: shaped heads, dtypes, derivatives, meshes, costs."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import FAST, covering, draw_fractions, draw_labels, draw_probabilities, precision, run
from curvature_heads import (
    COUNT,
    ROWS,
    draw_head,
    fisher_vector_product,
    ggn_vector_product,
    jacobian,
    linear,
    linear_fisher_vector_product,
    linear_ggn_vector_product,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from test_linear_costs import counted, like

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
