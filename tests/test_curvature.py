"""Curvature matrices: the Hessian with respect to the logits, Gauss-Newton and Fisher, and Newton steps with them.

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
from cases import COMBINED, OPTIONS, draw_logits, run, softmax_cross_entropy
from curvature_heads import (
    COUNT,
    ROWS,
    draw_head,
    fisher_vector_product,
    ggn_vector_product,
    jacobian,
    linear,
    linear_ggn_vector_product,
    linear_softmax_cross_entropy,
)
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg
from oracles import assert_close

import jaxent
from jaxent import logit_hessian, logit_hessian_product

exact: Any = oracles.softmax_cross_entropy
FEW = [*COMBINED, "probabilities_not_normalised"]
MATRIX_OPTIONS = [o if o in FEW else pytest.param(o, marks=pytest.mark.slow) for o in OPTIONS]


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
