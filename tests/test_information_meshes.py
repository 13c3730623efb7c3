"""The information measures on eight devices: batch and classes split, on automatic and explicit meshes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import covering, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind: str) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("rows", "classes"), axis_types=(KINDS[kind],) * 2)


def split(mesh: jax.sharding.Mesh, x: Any, *names: str | None) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, P(*names)))


def gradient(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda *x: (f(*x), jax.grad(lambda *x: jnp.sum(f(*x)))(*x))


ROWS: dict[str, Callable[..., jax.Array]] = {
    "entropy": lambda p, q: jaxent.entropy(p),
    "renyi_entropy": lambda p, q: jaxent.renyi_entropy(p, 2.5),
    "kl_divergence": jaxent.kl_divergence,
    "renyi_divergence": lambda p, q: jaxent.renyi_divergence(p, q, 0.5),
    "jensen_shannon_divergence": lambda p, q: jaxent.jensen_shannon_divergence(p, q, weight=0.25),
    "hellinger_distance": jaxent.hellinger_distance,
    "total_variation_distance": jaxent.total_variation_distance,
    "kl_divergence_with_logits": jaxent.kl_divergence_with_logits,
    "brier_score": lambda p, q: jaxent.brier_score(p, q, reduction="none"),
}


@pytest.mark.parametrize(("name", "kind"), covering(ROWS, KINDS))
def test_rows(name: str, kind: str, rng: np.random.Generator):
    p, q = rng.dirichlet(np.ones(8), size=(2, 4)).astype(np.float32)
    f = gradient(ROWS[name])
    want = run(f, p, q)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        got = run(f, split(mesh, p, "rows", "classes"), split(mesh, q, "rows", "classes"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("measure", "kind"),
    covering([jaxent.mutual_information, jaxent.conditional_entropy, jaxent.normalized_mutual_information], KINDS),
)
def test_tables(measure: Callable[..., jax.Array], kind: str, rng: np.random.Generator):
    p = rng.dirichlet(np.ones(32)).astype(np.float32).reshape(4, 8)
    f = gradient(measure)
    want = run(f, p)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        got = run(f, split(mesh, p, "rows", "classes"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "weighted"), covering(KINDS, [False, True]))
def test_labels(weighted: bool, kind: str, rng: np.random.Generator):
    x, y = rng.integers(0, 3, size=(2, 8, 4))
    w = rng.random((8, 4)).astype(np.float32) if weighted else None
    want = jaxent.empirical_distribution((x, y), (3, 3), weights=w)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        labels = tuple(split(mesh, v.astype(np.int32), "rows", "classes") for v in (x, y))
        amounts = None if w is None else split(mesh, w, "rows", "classes")
        got = jax.jit(lambda labels, w: jaxent.empirical_distribution(labels, (3, 3), weights=w))(labels, amounts)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_inside_shard_map(rng: np.random.Generator):
    p, q = rng.dirichlet(np.ones(8), size=(2, 8)).astype(np.float32)
    y, w = rng.integers(0, 3, size=(2, 8)).astype(np.int32)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

    def part(p: jax.Array, q: jax.Array, y: jax.Array, w: jax.Array) -> Any:
        table = jaxent.empirical_distribution(y, 3, weights=w + 1)
        return jaxent.jensen_shannon_divergence(p, q), jaxent.renyi_divergence(p, q, 2), table[None]

    sharded = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=P("rows"), out_specs=P("rows")))
    js, renyi, table = sharded(p, q, y, w)
    np.testing.assert_allclose(js, jaxent.jensen_shannon_divergence(p, q), rtol=1e-5)
    np.testing.assert_allclose(renyi, jaxent.renyi_divergence(p, q, 2), rtol=1e-5)
    np.testing.assert_array_equal(table, np.eye(3)[y])
