"""The orientation of the three matrix products on a CPU: the same numbers, in the form that was asked for."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxent._engine import cpu_products
from jaxent._engine.products import operand
from jaxent._engine.streaming import Head, MatrixProducts

pytestmark = pytest.mark.compiled
PRODUCTS = MatrixProducts(jax.lax.Precision.HIGHEST)


def logits(h: jax.Array, k: jax.Array) -> jax.Array:
    return PRODUCTS.logits(PRODUCTS.prepared(Head(h, k, None)))


def by_hidden(dz: jax.Array, k: jax.Array) -> jax.Array:
    return PRODUCTS.by_hidden(operand(dz, dz.dtype), operand(k, k.dtype))


def by_kernel(h: jax.Array, dz: jax.Array) -> jax.Array:
    return PRODUCTS.by_kernel(h, operand(dz, dz.dtype))


FORMS: dict[str, tuple[Callable[..., jax.Array], str]] = {
    "logits": (logits, "nd,dv->nv"),
    "hidden": (by_hidden, "nv,dv->nd"),
    "kernel": (by_kernel, "nd,nv->dv"),
}
# Rows, features, classes: below and above every rule, odd, and of one.
SHAPES = ((32, 300, 70), (65, 129, 2049), (2, 1, 3), (1, 8, 5), (7, 64, 31), (200, 64, 33), (3, 5, 1))
TURNED = {"logits": (32, 300, 70), "hidden": (32, 300, 70), "kernel": (65, 129, 2049)}


def operands(name, rows, features, classes, dtype):
    rng = np.random.default_rng(rows + features)
    sizes = {"n": rows, "d": features, "v": classes}
    subscripts = FORMS[name][1].split("->")[0].split(",")
    return [jnp.asarray(rng.normal(size=[sizes[c] for c in s]), dtype) for s in subscripts]


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        pytest.param(name, shape, dtype, marks=() if (i + j + k) % 3 == 0 else pytest.mark.slow)
        for i, name in enumerate(FORMS)
        for j, shape in enumerate(SHAPES)
        for k, dtype in enumerate(("float32", "bfloat16", "float16"))
    ],
)
def test_the_product_is_that_of_numpy(name, shape, dtype):
    function, subscripts = FORMS[name]
    rows, features, classes = shape
    a, b = operands(name, rows, features, classes, dtype)
    expected = np.einsum(subscripts, *(np.asarray(x, np.float64) for x in (a, b)))
    size = np.einsum(subscripts, *(np.abs(np.asarray(x, np.float64)) for x in (a, b)))
    got = jax.jit(function)(a, b)
    assert got.dtype == np.float32
    np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - expected), 1e-6 * size + 1e-30)


@pytest.mark.parametrize("name", FORMS)
def test_every_transformation_is_that_of_the_plain_form(name, monkeypatch):
    function, _ = FORMS[name]
    a, b = operands(name, *TURNED[name], "float32")
    da, db = (jnp.cos(x) for x in (a, b))

    def everything():
        def f(a, b):
            return function(a, b)

        def loss(a, b):
            return jnp.sum(jnp.sin(f(a, b) / 100))

        batched = jax.vmap(f, in_axes=(0, None))(jnp.stack([a, da]), b)
        hessian_product = jax.jvp(jax.grad(loss, (0, 1)), (a, b), (da, db))[1]
        return batched, jax.jvp(f, (a, b), (da, db)), jax.grad(loss, (0, 1))(a, b), hessian_product

    turned = jax.make_jaxpr(function)(a, b)
    assert "optimization_barrier" in str(turned)
    got = everything()
    monkeypatch.setattr(cpu_products, "_known", lambda *_: False)
    assert "optimization_barrier" not in str(jax.make_jaxpr(lambda *x: function(*x))(a, b))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(everything()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def dot(name, rows, features, classes, dtype):
    """The one product in the compiled program: shape of its result, how operands are contracted, their dtype."""
    a, b = operands(name, rows, features, classes, dtype)
    text: Any = jax.jit(FORMS[name][0]).lower(a, b).compile().as_text()
    (line,) = (line for line in text.splitlines() if " dot(" in line)
    (shape,) = re.findall(r"= f32\[([\d,]+)\]", line)
    contracted = tuple(map(int, re.findall(r"_contracting_dims=\{(\d)\}", line)))
    (names,) = re.findall(r" dot\((.*?)\)", line)
    dtypes = {t for name in names.split(", ") for t in re.findall(re.escape(name) + r" = (\w+)\[", text)[:1]}
    return tuple(map(int, shape.split(","))), contracted, dtypes


def test_xla_keeps_the_form_that_was_asked_for():
    rows, features, classes = 32, 512, 8192
    assert dot("logits", rows, features, classes, "float32") == ((rows, classes), (0, 0), {"f32"})
    assert dot("hidden", rows, features, classes, "float32") == ((features, rows), (1, 1), {"f32"})
    rows, features, classes = 65, 128, 2048
    assert dot("kernel", rows, features, classes, "float32") == ((features, classes), (1, 0), {"f32"})


def test_few_features_and_many_rows_are_multiplied_as_they_are():
    rows, features, classes = 256, 64, 8192
    assert dot("logits", rows, features, classes, "float32") == ((rows, classes), (1, 0), {"f32"})
    assert dot("hidden", rows, features, classes, "float32") == ((rows, features), (1, 1), {"f32"})
    for rows, features, classes in ((256, 64, 8192), (64, 128, 2048), (65, 127, 2048), (65, 128, 2047)):
        assert dot("kernel", rows, features, classes, "float32") == ((features, classes), (0, 0), {"f32"})


def test_a_mesh_keeps_the_plain_form():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        a, b = (jax.device_put(x, jax.P()) for x in operands("kernel", *TURNED["kernel"], "float32"))
        assert "optimization_barrier" not in str(jax.make_jaxpr(PRODUCTS.by_kernel)(a, b))
