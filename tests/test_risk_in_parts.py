"""The empirical risk of microbatches, shards and scans equals that of the whole batch, and so do its derivatives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_risk import ULP, exact

from jaxent import WeightedSum, softmax_cross_entropy
from jaxent.risk import EmpiricalRisk


def model(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    losses = softmax_cross_entropy(x @ w, y, reduction="none")
    assert isinstance(losses, jax.Array)
    return losses


def batch(rng: np.random.Generator, rows: int = 128):
    """Eight equal parts, of which 0% to 95% are ignored."""
    x = rng.normal(size=(rows, 5)).astype(np.float32)
    y = rng.integers(0, 7, rows).astype(np.int32)
    drop = np.repeat(np.linspace(0, 0.95, 8), rows // 8)
    keep = rng.random(rows) >= drop
    w = rng.normal(size=(5, 7)).astype(np.float32)
    return w, x, np.where(keep, y, -100).astype(np.int32), keep


def whole(w, x, y, keep):
    return jax.value_and_grad(lambda w: EmpiricalRisk().update(model(w, x, y), keep).mean())(w)


def agree(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.grid
def test_whole_batch_equals_the_loss(rng: np.random.Generator):
    w, x, y, keep = batch(rng)
    agree(whole(w, x, y, keep), jax.value_and_grad(lambda w: softmax_cross_entropy(x @ w, y))(w))


def test_microbatches_equal_the_big_batch(rng: np.random.Generator):
    w, x, y, keep = batch(rng)
    parts = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), (x, y, keep))

    def mean(w: jax.Array) -> jax.Array:
        def step(risk, part):
            return risk.update(model(w, *part[:2]), part[2]), None

        return jax.lax.scan(step, EmpiricalRisk(), parts)[0].mean()

    agree(jax.jit(jax.value_and_grad(mean))(w), whole(w, x, y, keep))


@pytest.mark.grid
def test_shards_equal_the_big_batch(rng: np.random.Generator):
    w, x, y, keep = batch(rng)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P())
    def mean(w, x, y, keep):
        return EmpiricalRisk().update(model(w, x, y), keep).psum("data").mean()

    agree(jax.jit(jax.value_and_grad(mean))(w, x, y, keep), whole(w, x, y, keep))
    agree(jax.jit(jax.jacfwd(mean))(w, x, y, keep), whole(w, x, y, keep)[1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays_equal_the_big_batch(kind: AxisType, rng: np.random.Generator):
    w, x, y, keep = batch(rng)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        xs, ys, ks = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, y, keep))
        ws = jax.device_put(w, NamedSharding(mesh, P()))
        got = jax.jit(whole)(ws, xs, ys, ks)
    agree(got, whole(w, x, y, keep))


def test_scan_inside_shard_map(rng: np.random.Generator):
    x = rng.exponential(1.0, (8, 3, 40)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def evaluate(x: jax.Array) -> jax.Array:
        start = jax.lax.pcast(EmpiricalRisk(), "data", to="varying")
        risk = jax.lax.scan(lambda r, b: (r.update(b), None), start, x[0])[0]
        return risk.psum("data").mean()

    mean = jax.jit(jax.shard_map(evaluate, mesh=mesh, in_specs=P("data"), out_specs=P()))(x)
    assert float(mean) == pytest.approx(np.mean(x, dtype=np.float64), rel=ULP)


@pytest.mark.grid
def test_psum_is_as_exact_as_merge(rng: np.random.Generator):
    x = rng.exponential(1.0, (8, 1001)).astype(np.float32) * np.float32(10.0) ** np.arange(8, dtype=np.float32)[:, None]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    total = jax.jit(
        jax.shard_map(
            lambda x: EmpiricalRisk().update(x).psum(("a", "b")), mesh=mesh, in_specs=P(("a", "b")), out_specs=P()
        )
    )(x)
    assert exact(total._total) == pytest.approx(np.sum(x, dtype=np.float64), rel=1e-12)
    mapped = jax.vmap(lambda x: EmpiricalRisk().update(x).psum("i"), axis_name="i")(x)
    assert float(mapped.mean()[0]) == float(total.mean())


PRECISIONS = [(False, "bfloat16"), (True, "float32"), (True, "float64")]


@pytest.mark.grid
@pytest.mark.parametrize("start", [EmpiricalRisk, WeightedSum])
@pytest.mark.parametrize(("wide", "dtype"), PRECISIONS)
def test_an_empty_sum_starts_a_scan(start: Any, wide: bool, dtype: str, rng: np.random.Generator):
    w, x, y, _ = batch(rng, 32)
    with jax.enable_x64(wide):

        def loss(w: jax.Array) -> tuple[jax.Array, Any]:
            def step(carry: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
                summed = softmax_cross_entropy(part[0] @ w, part[1], reduction="sum_and_weight")
                return carry.merge(summed) if isinstance(carry, EmpiricalRisk) else carry + summed, None

            parts = (jnp.asarray(x.reshape(4, 8, -1), dtype), jnp.asarray(y.reshape(4, 8)))
            summed = jax.lax.scan(step, start(), parts)[0]
            return summed.mean(), summed

        (value, summed), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(w, dtype))
        whole = jax.value_and_grad(lambda w: softmax_cross_entropy(jnp.asarray(x, dtype) @ w, jnp.asarray(y)))
        want, want_gradient = whole(jnp.asarray(w, dtype))
    assert float(summed.weight) == np.sum(y >= 0)
    # Logits in bfloat16 are rounded in other places when there are fewer rows.
    assert float(value) == pytest.approx(float(want), rel=1e-6 if dtype != "bfloat16" else 1e-3)
    rtol = 1e-6 if dtype != "bfloat16" else 2e-2
    np.testing.assert_allclose(
        *(np.asarray(g, np.float64) for g in (gradient, want_gradient)), rtol=rtol, atol=rtol / 4
    )


def test_an_empty_sum_starts_other_loops():
    part = WeightedSum(jnp.float32(6.0), jnp.float32(3.0))

    def step(i: jax.Array, summed: WeightedSum) -> WeightedSum:
        return jax.lax.cond(i == 1, lambda s: s, lambda s: part + s, summed)

    for wide in (False, True):
        with jax.enable_x64(wide):
            assert float(jax.lax.fori_loop(0, 3, step, WeightedSum()).total) == 12
    assert float(sum([part, part], WeightedSum()).mean()) == 2
    assert float(WeightedSum().mean()) == 0


@pytest.mark.grid
@pytest.mark.parametrize("start", [EmpiricalRisk, WeightedSum])
def test_an_empty_sum_starts_a_scan_on_every_device(start: Any, rng: np.random.Generator):
    w, x, y, keep = batch(rng)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    def mean(w, x, y):
        def step(carry, part):
            summed = softmax_cross_entropy(part[0] @ w, part[1], reduction="sum_and_weight")
            return carry.merge(summed) if isinstance(carry, EmpiricalRisk) else carry + summed, None

        parts = x.reshape(2, -1, x.shape[1]), y.reshape(2, -1)
        summed = jax.lax.scan(step, jax.lax.pcast(start(), "data", to="varying"), parts)[0]
        return (summed.psum("data") if isinstance(summed, EmpiricalRisk) else jax.lax.psum(summed, "data")).mean()

    agree(jax.jit(jax.value_and_grad(mean))(w, x, y), whole(w, x, y, keep))


def test_a_hessian_product_through_a_scan_of_updates(rng: np.random.Generator):
    w, h = rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(2, 2, 2)).astype(np.float32)

    def scanned(w: jax.Array) -> jax.Array:
        def step(risk: EmpiricalRisk, h: jax.Array) -> tuple[EmpiricalRisk, None]:
            return risk.update(jnp.sum((h @ w) ** 4, axis=-1)), None

        return jax.lax.scan(step, EmpiricalRisk(), jnp.asarray(h))[0].mean()

    def plain(w: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum((h.reshape(4, 2) @ w) ** 4, axis=-1))

    got, want = (jax.jit(lambda w, f=f: jax.jvp(jax.grad(f), (w,), (w,))[1])(w) for f in (scanned, plain))
    np.testing.assert_allclose(got, want, rtol=1e-5)
