"""Classes that are split over two mesh axes inside `jax.shard_map`: every function that takes `vocab_axis`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import run
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxent

api: Any = jaxent  # untyped: what is returned depends on options
RNG = np.random.default_rng(0)
ROWS, FEATURES, CLASSES = 6, 3, 8
Z = RNG.normal(size=(ROWS, CLASSES)).astype(np.float32)
H, W = (RNG.normal(size=shape).astype(np.float32) for shape in ((ROWS, FEATURES), (FEATURES, CLASSES)))
Y = np.array([7, 0, 3, 4, -100, 2], np.int32)
TOP = np.array([[7, 1], [0, 4], [3, 2], [4, 6], [5, 0], [2, 7]], np.int32)
LOG_PROBS = np.log(np.array([[0.5, 0.3]] * ROWS, np.float32))
AXES = ("a", "b")
OPTIONS = {"label_smoothing": 0.25, "z_loss": 0.125}


def row_loss(z: jax.Array, labels: jax.Array, temperature: jax.Array, axes: tuple[str, ...] | None = None) -> jax.Array:
    """The cross-entropy of a block of rows, with collectives of its own if this device has some of the classes."""
    z = z / temperature
    largest = lax.stop_gradient(jnp.max(lax.stop_gradient(z), axis=-1))
    largest = lax.pmax(largest, axes) if axes else largest
    own = jnp.arange(z.shape[1]) + (lax.axis_index(axes) * z.shape[1] if axes else 0)
    sums = (
        jnp.sum(jnp.exp(z - largest[:, None]), axis=-1),
        jnp.sum(jnp.where(own[None, :] == labels[:, None], z, 0), axis=-1),
    )
    total, label = lax.psum(sums, axes) if axes else sums
    return jnp.log(total) + largest - label


def row_max(z: jax.Array, axes: tuple[str, ...] | None) -> jax.Array:
    return lax.pmax(jnp.max(z, axis=-1), axes) if axes else jnp.max(z, axis=-1)


# `f(logits or kernel, vocab_axis)`: results that are the same on all devices, and results with this device's classes.
Results = tuple[Any, Any]
DENSE: dict[str, Callable[[Any, Any], Results]] = {
    "softmax_cross_entropy": lambda z, v: (api.softmax_cross_entropy(z, Y, vocab_axis=v, **OPTIONS), None),
    "softmax_cross_entropy with SparseTargets": lambda z, v: (
        api.softmax_cross_entropy(z, jaxent.SparseTargets(TOP, np.exp(LOG_PROBS)), vocab_axis=v),
        None,
    ),
    "softmax_cross_entropy_gradient": lambda z, v: (
        None,
        api.softmax_cross_entropy_gradient(z, Y, vocab_axis=v, **OPTIONS),
    ),
    "token_statistics": lambda z, v: (api.token_statistics(z, Y, top_k=3, vocab_axis=v), None),
    "ggn_vector_product": lambda z, v: (None, api.ggn_vector_product(lambda z: z, z, z, vocab_axis=v)),
    "fisher_vector_product": lambda z, v: (None, api.fisher_vector_product(lambda z: z, z, Y, z, vocab_axis=v)),
}
CHUNKED = {"chunk_rows": 2}


def _diagonal(found: jaxent.GGNDiagonal) -> Results:
    return found.hidden, (found.kernel, found.bias[None, :])


LINEAR: dict[str, Callable[[Any, Any], Results]] = {
    "linear_softmax_cross_entropy": lambda w, v: (
        api.linear_softmax_cross_entropy(H, w, Y, vocab_axis=v, with_statistics=True, **OPTIONS, **CHUNKED),
        None,
    ),
    "linear_token_statistics": lambda w, v: (
        api.linear_token_statistics(H, w, Y, top_k=3, vocab_axis=v, **CHUNKED),
        None,
    ),
    "linear_kl_divergence": lambda w, v: (api.linear_kl_divergence(H, w, H, 2 * w, vocab_axis=v, **CHUNKED), None),
    "linear_kl_divergence_from_top": lambda w, v: (
        api.linear_kl_divergence_from_top(H, w, TOP, LOG_PROBS, vocab_axis=v, **CHUNKED),
        None,
    ),
    "linear_loss": lambda w, v: (
        api.linear_loss(
            functools.partial(row_loss, axes=v), H, w, Y, params=1.5, where=Y >= 0, vocab_axis=v, **CHUNKED
        ),
        None,
    ),
    "linear_rows": lambda w, v: (api.linear_rows(lambda z: row_max(z, v), H, w, vocab_axis=v, **CHUNKED), None),
    "linear_gradient_norms": lambda w, v: (api.linear_gradient_norms(H, w, Y, vocab_axis=v, **CHUNKED), None),
    "linear_ggn_vector_product": lambda w, v: api.linear_ggn_vector_product(H, w, (H, w), vocab_axis=v, **CHUNKED),
    "linear_fisher_vector_product": lambda w, v: api.linear_fisher_vector_product(
        H, w, Y, (H, w), vocab_axis=v, **CHUNKED
    ),
    "linear_ggn_diagonal": lambda w, v: _diagonal(api.linear_ggn_diagonal(H, w, Y, vocab_axis=v, **CHUNKED)),
}
SPLIT = DENSE | LINEAR


def mesh(*axes: str) -> jax.sharding.Mesh:
    return jax.make_mesh((2,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes))


def assert_close(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_every_function_with_a_vocabulary_axis_is_here():
    functions = (name for name in jaxent.__all__ if inspect.isfunction(getattr(jaxent, name)))
    takes = {name for name in functions if "vocab_axis" in inspect.signature(getattr(jaxent, name)).parameters}
    assert takes == {name.split()[0] for name in SPLIT}


@pytest.mark.parametrize("name", SPLIT)
def test_a_tuple_of_vocabulary_axes(name: str):
    f, x = SPLIT[name], Z if name in DENSE else W
    split = jax.shard_map(
        lambda x: f(x, AXES), mesh=mesh(*AXES), in_specs=P(None, AXES), out_specs=(P(), P(None, AXES))
    )
    assert_close(run(split, x), run(lambda x: f(x, None), x))


def test_the_gradient_over_two_vocabulary_axes():
    def loss(h: Any, w: Any, axes: Any) -> Any:
        return api.linear_softmax_cross_entropy(h, w, Y, vocab_axis=axes, **OPTIONS, **CHUNKED)

    spread = jax.shard_map(
        functools.partial(loss, axes=AXES), mesh=mesh(*AXES), in_specs=(P(), P(None, AXES)), out_specs=P()
    )
    assert_close(jax.jit(jax.grad(spread, (0, 1)))(H, W), jax.grad(loss, (0, 1))(H, W, None))


@pytest.mark.parametrize("axes", [("a",), AXES])
def test_a_row_loss_with_collectives_of_its_own(axes: tuple[str, ...]):
    """Rows are split as well: gradients with respect to everything, and a Hessian product."""
    h, y = np.concatenate([H, H[::-1]]), np.concatenate([Y, Y[::-1]])

    def loss(h: Any, w: Any, t: Any, y: Any, axes: Any = None, **options: Any) -> Any:
        f = functools.partial(row_loss, axes=axes)
        return api.linear_loss(f, h, w, y, params=t, where=y >= 0, vocab_axis=axes, **options, **CHUNKED)

    def part(*args: Any) -> Any:
        total = loss(*args, axes=axes, reduction="sum_and_weight")
        return jax.tree.map(lambda x: lax.psum(x, "data"), total).mean()

    specs = (P("data"), P(None, axes), P(), P("data"))
    spread = jax.shard_map(part, mesh=mesh("data", *axes), in_specs=specs, out_specs=P())

    def everything(loss: Any, *args: Any) -> Any:
        f = jax.value_and_grad(lambda *primals: loss(*primals, y), (0, 1, 2))
        return jax.jvp(f, args, jax.tree.map(jnp.cos, args))

    args = h, W, np.float32(1.5)
    got, want = (jax.jit(functools.partial(everything, f))(*args) for f in (spread, loss))
    assert_close(got, want)
    by_library = api.linear_softmax_cross_entropy(h, W, y, temperature=1.5)
    np.testing.assert_allclose(got[0][0], by_library, rtol=1e-5)
