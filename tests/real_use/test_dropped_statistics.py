"""Statistics of rows that are dropped: exactly 0, whatever they hold, in value and in every derivative."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from cases import covering, marked, run
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_call import H, W, Z, jaxent
from small_call import close_leaves as close

INF = np.inf
Y = np.array([3, -100, 0, 7, -100, 2], np.int32)
KEPT = Y != -100


FIELDS = ("log_prob", "log_normalizer", "entropy")


def plain_statistic(field: str, z: jax.Array, labels: Any) -> jax.Array:
    """Of the kept rows, summed."""
    z, labels = z[KEPT], jnp.asarray(labels)[KEPT]
    log_p = jax.nn.log_softmax(z, axis=-1)
    if field == "log_prob":
        return jnp.sum(jnp.take_along_axis(log_p, labels[:, None], axis=-1))
    if field == "log_normalizer":
        return jnp.sum(jax.nn.logsumexp(z, axis=-1))
    return -jnp.sum(jnp.exp(log_p) * log_p)


def where_option(labels: np.ndarray) -> dict[str, Any]:
    return {"labels": np.where(KEPT, labels, 0), "where": KEPT}


DROPPED: dict[str, dict[str, Any]] = {
    "-100": {"labels": Y},
    "where": where_option(Y),
    "ignore_index": {"labels": np.where(KEPT, Y, 5), "ignore_index": 5},
    "out of range": {"labels": np.where(KEPT, Y, 99), "where": KEPT},
}


@pytest.mark.parametrize("how", marked(DROPPED, ["-100", "out of range"]))
def test_masked_statistics_have_the_gradient_of_the_kept_rows(how: str) -> None:
    options = DROPPED[how]

    def masked(statistics: Any) -> tuple[jax.Array, ...]:
        return tuple(jnp.where(KEPT, getattr(statistics, field), 0).sum() for field in FIELDS)

    def dense(z: jax.Array) -> tuple[jax.Array, ...]:
        return masked(jaxent.token_statistics(z, **options))

    def linear(h: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return masked(jaxent.linear_token_statistics(h, w, **options))

    def plain(z: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(plain_statistic(field, z, Y) for field in FIELDS)

    for f, wanted, args in ((dense, plain, (Z,)), (linear, lambda h, w: plain(h @ w), (H, W))):
        of = tuple(range(len(args)))
        got, want = (jax.jit(lambda *x, f=f: (f(*x), jax.jacrev(f, of)(*x)))(*args) for f in (f, wanted))  # noqa: B023
        close(got, want)


@pytest.mark.parametrize("name", ["token_statistics", "linear_token_statistics"])
def test_statistics_of_dropped_rows_are_0_whatever_they_hold(name: str) -> None:
    options = {"labels": Y, "where": np.array([1, 1, 0, 1, 1, 1], bool), "top_k": 2}
    on = KEPT & options["where"]
    head = (jnp.eye(8),) if name.startswith("linear") else ()

    @jax.jit
    def statistics_and_gradient(z: Any) -> Any:
        f = lambda z: getattr(jaxent, name)(z, *head, **options)  # noqa: E731
        return f(z), jax.grad(lambda z: sum(getattr(f(z), field).sum() for field in FIELDS))(z)

    for bad in (np.nan, INF, -INF):
        stats, gradient = statistics_and_gradient(np.where(on[:, None], Z, bad).astype(np.float32))
        for field in (*FIELDS, "top_log_probs"):
            assert np.all(np.asarray(getattr(stats, field))[~on] == 0), (bad, field)
            assert np.all(np.isfinite(getattr(stats, field))), (bad, field)
        for field in ("argmax", "rank", "top_classes"):
            assert np.all(np.asarray(getattr(stats, field))[~on] == -1), (bad, field)
            assert np.all(np.asarray(getattr(stats, field))[on] >= 0), (bad, field)
        assert np.all(np.asarray(gradient)[~on] == 0), bad
        assert np.all(np.isfinite(gradient)), bad


@pytest.mark.parametrize(
    ("transform", "name"),
    covering(["jvp", "jacfwd", "hessian", "vmap", "zero cotangent"], ["token_statistics", "linear_token_statistics"]),
)
def test_dropped_rows_under_transformations(name: str, transform: str) -> None:
    rest = (jnp.eye(8),) if name.startswith("linear") else ()

    def f(z: jax.Array) -> jax.Array:
        return jnp.where(KEPT, getattr(jaxent, name)(z, *rest, Y).log_prob, 0).sum()

    def plain(z: jax.Array) -> jax.Array:
        return plain_statistic("log_prob", z, Y)

    z = jnp.asarray(Z)
    if transform == "jvp":
        close(*(run(lambda z, g=g: jax.jvp(g, (z,), (z,)), z) for g in (f, plain)))
    elif transform == "vmap":
        close(run(jax.vmap(jax.grad(f)), jnp.stack([z, 2 * z]))[1], run(jax.grad(plain), 2 * z))
    elif transform == "zero cotangent":
        assert not np.any(jax.vjp(lambda z: getattr(jaxent, name)(z, *rest, Y).log_prob, z)[1](jnp.zeros(6))[0])
    else:
        transformed = jax.hessian if transform == "hessian" else jax.jacfwd
        close(run(transformed(f), z), run(transformed(plain), z))


def test_statistics_with_ignore_index_none_know_no_dropped_row() -> None:
    for f in (jaxent.token_statistics, lambda z, *a, **o: jaxent.linear_token_statistics(z, jnp.eye(8), *a, **o)):
        log_prob = f(Z, Y, ignore_index=None).log_prob
        assert np.array_equal(np.isnan(log_prob), ~KEPT)


def test_statistics_without_labels_drop_rows_too() -> None:
    for f in (jaxent.token_statistics, lambda z, **o: jaxent.linear_token_statistics(z, jnp.eye(8), **o)):
        stats = f(np.where(KEPT[:, None], Z, np.nan).astype(np.float32), where=KEPT)
        close(stats.entropy, np.where(KEPT, ref.entropy(ref.softmax(Z)), 0))
        assert stats.log_prob is None
        assert np.array_equal(stats.argmax, np.where(KEPT, Z.argmax(-1), -1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dropped_rows_in_half_precision(dtype: Any) -> None:
    h, w = jnp.asarray(H, dtype).at[1].set(jnp.nan), jnp.asarray(W, dtype)
    gradients = run(jax.grad(lambda h, w: jaxent.linear_token_statistics(h, w, Y).log_prob.sum(), (0, 1)), h, w)
    wanted = run(jax.grad(lambda h, w: plain_statistic("log_prob", h @ w, Y), (0, 1)), H, W)
    close(gradients, wanted, rtol=0.05, atol=0.1)
    assert not np.any(ref.wide(gradients[0])[~KEPT])


@pytest.mark.parametrize("route", ["manual", "explicit", "automatic"])
def test_dropped_rows_on_a_mesh(route: str) -> None:
    kind = AxisType.Explicit if route == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(kind,) * 2)
    axis = {"vocab_axis": "vocab"} if route == "manual" else {}
    specs = P("data"), P(None, "vocab"), P("data")

    def f(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        total = jaxent.linear_token_statistics(h, w, y, **axis).log_prob.sum()
        return jax.lax.psum(total, "data") if route == "manual" else total

    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((H, W, Y), specs, strict=True)]
        g = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()) if route == "manual" else f
        got = jax.jit(jax.value_and_grad(g, (0, 1)))(*args)
    wanted = run(jax.value_and_grad(lambda h, w: plain_statistic("log_prob", h @ w, Y), (0, 1)), H, W)
    close(got, wanted)
