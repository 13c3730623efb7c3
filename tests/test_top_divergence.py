"""Divergences from a teacher's stored top k: the formulas in mpmath, tiny tails, and what is biased."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import mpmath
import numpy as np
import pytest
from cases import covering
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent import linear_token_statistics

linear_kl_divergence_from_top: Any = jaxent.linear_kl_divergence_from_top
ROWS, FEATURES, CLASSES, K = 6, 4, 12, 3
TAILS, DIRECTIONS = ("bucket", "renormalize", "drop"), ("forward", "reverse")


def exact(z: Any, chosen: Any, log_p: Any, tail: str, divergence: str) -> float:
    """One row, with 60 digits; the inputs as they are in float32."""
    chosen = [int(k) for k in chosen]
    with mpmath.workdps(60):
        q = [mpmath.exp(mpmath.mpf(float(x))) for x in z]
        q = [x / mpmath.fsum(q) for x in q]
        p = [mpmath.exp(mpmath.mpf(float(x))) for x in log_p]
        top = [q[k] for k in chosen]
        if tail == "bucket":
            p, top = [*p, 1 - mpmath.fsum(p)], [*top, mpmath.fsum(x for k, x in enumerate(q) if k not in set(chosen))]
        elif tail == "renormalize":
            p = [x / mpmath.fsum(p) for x in p]
            top = [x / mpmath.fsum(top) for x in top] if divergence == "reverse" else top
        pairs = zip(p, top, strict=True) if divergence == "forward" else zip(top, p, strict=True)
        return float(mpmath.fsum(a * mpmath.log(a / b) for a, b in pairs if a).real)


def problem(rng: np.random.Generator, rows: int = ROWS) -> tuple[Any, Any, Any, Any]:
    h, w = rng.normal(size=(rows, FEATURES)).astype(np.float32), rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    teacher = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(rows, CLASSES)).astype(np.float32) * 2))
    log_p, chosen = jax.lax.top_k(teacher, K)
    return h, w, np.asarray(chosen), np.asarray(log_p)


def losses_of(chosen: np.ndarray, tail: str, divergence: str) -> Any:
    options = {"tail": tail, "divergence": divergence, "chunk_rows": 4, "reduction": "none"}
    return jax.jit(lambda h, w, log_p: linear_kl_divergence_from_top(h, w, chosen, log_p, **options))


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("tail", TAILS)
def test_values(tail: str, divergence: str, rng: np.random.Generator):
    h, w, chosen, log_p = problem(rng)
    z = np.asarray(jnp.dot(h, w, precision="highest"))
    want = [exact(*row, tail, divergence) for row in zip(z, chosen, log_p, strict=True)]
    np.testing.assert_allclose(losses_of(chosen, tail, divergence)(h, w, log_p), want, rtol=1e-5, atol=1e-6)


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("tail", "divergence"), covering(TAILS, DIRECTIONS))
def test_derivatives(tail: str, divergence: str, rng: np.random.Generator):
    h, w, chosen, log_p = problem(rng)
    args = tuple(jnp.asarray(x, jnp.float64) for x in (h, w, log_p))
    f = jax.jit(losses_of(chosen, tail, divergence))
    jax.test_util.check_grads(f, args, order=2, modes=("fwd", "rev"), rtol=1e-5)


def test_a_tail_of_tiny_probability():
    """`1 - sum q` of float32 has no digit here, on either side."""
    z = jnp.array([[0.0, -1.0, -30.0, -31.0, -32.0]])
    log_p, chosen = jax.lax.top_k(jax.nn.log_softmax(jnp.array([[0.0, -40.0, -50.0, -60.0, -70.0]])), 1)

    def loss(z: Any, log_p: Any = log_p, chosen: Any = chosen) -> Any:
        return linear_kl_divergence_from_top(z, jnp.eye(5), chosen, log_p, reduction="sum")

    near = jnp.array([[0.0, -30.0, -31.0, -32.0, -33.0]])
    for logits, rtol in ((z, 1e-6), (near, 1e-5)):
        np.testing.assert_allclose(loss(logits), exact(logits[0], chosen[0], log_p[0], "bucket", "forward"), rtol=rtol)
    by_z = jax.grad(loss)(near)
    rest = float(mpmath.fsum(mpmath.exp(mpmath.mpf(float(x))) for x in near[0, 1:]).real)
    np.testing.assert_allclose(np.sum(by_z[0, 1:]), rest + float(np.expm1(np.float64(log_p[0, 0]))), rtol=1e-5)


def test_the_bucket_is_not_biased_and_rescaling_is():
    """At the teacher itself the gradient is 0 with a bucket, and far from 0 with the teacher's k rescaled to one."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(8, 100)).astype(np.float32))
    log_p, chosen = jax.lax.top_k(jax.nn.log_softmax(z), 10)

    def gradient(tail: str) -> Any:
        def loss(z: Any) -> Any:
            return linear_kl_divergence_from_top(z, jnp.eye(100), chosen, log_p, tail=tail)

        value, by_z = jax.jit(jax.value_and_grad(loss))(z)
        return value, jnp.max(jnp.abs(by_z))

    value, slope = gradient("bucket")
    assert abs(value) < 1e-7
    assert slope < 1e-7
    for tail in ("renormalize", "drop"):
        assert gradient(tail)[1] > 1e-3
    assert gradient("renormalize")[0] > 0.5


@pytest.mark.grid
def test_all_classes_leave_an_empty_bucket(rng: np.random.Generator):
    h, w, _, _ = problem(rng)
    teacher = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(ROWS, CLASSES)).astype(np.float32)))
    log_p, chosen = jax.lax.top_k(teacher, CLASSES)
    got = linear_kl_divergence_from_top(h, w, chosen, log_p)
    np.testing.assert_allclose(got, jaxent.linear_kl_divergence(teacher, jnp.eye(CLASSES), h, w), rtol=1e-5)


def test_edges(rng: np.random.Generator):
    h, w, chosen, log_p = problem(rng)
    bias = np.zeros(CLASSES, np.float32)

    def losses(chosen: Any, log_p: Any, bias: Any = bias, **options: Any) -> Any:
        return linear_kl_divergence_from_top(h, w, chosen, log_p, bias=bias, reduction="none", **options)

    want = losses(chosen, log_p)
    less = np.where(np.arange(K) == K - 1, -100, chosen)
    np.testing.assert_allclose(losses(less, log_p), losses(chosen[:, :-1], log_p[:, :-1]), rtol=1e-5, atol=1e-6)
    dropped = np.where(np.arange(ROWS)[:, None] == 1, -100, chosen)
    got = losses(dropped, np.where(dropped < 0, np.nan, log_p).astype(np.float32))
    np.testing.assert_allclose(got, np.where(np.arange(ROWS) == 1, 0, want), rtol=1e-6)
    mean = linear_kl_divergence_from_top(h, w, dropped, log_p, bias=bias)
    np.testing.assert_allclose(mean, np.delete(np.asarray(want), 1).mean(), rtol=1e-6)
    outside = np.where(np.arange(ROWS)[:, None] == 1, CLASSES, chosen)
    assert np.array_equal(np.isnan(losses(outside, log_p)), np.arange(ROWS) == 1)
    removed = np.where(np.arange(CLASSES) == chosen[2, 0], -np.inf, 0).astype(np.float32)
    assert losses(chosen, log_p, removed)[2] == np.inf
    curved = jax.hessian(lambda log_p: 3 * losses(chosen, log_p, removed)[2])(log_p)
    assert np.isposinf(curved[2, 0, 2, 0])
    assert np.isfinite(np.delete(np.ravel(curved), np.ravel_multi_index((2, 0, 2, 0), curved.shape))).all()
    assert np.isfinite(losses(chosen, log_p, removed, divergence="reverse")[2])


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["explicit", "manual"])
def test_over_devices(kind: str, rng: np.random.Generator):
    args = problem(rng, rows=16)
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(getattr(AxisType, kind.title(), AxisType.Auto),) * 2)
    specs = P("data"), P(None, "vocab"), P("data"), P("data")

    def loss(h: Any, w: Any, chosen: Any, log_p: Any, **options: Any) -> Any:
        return linear_kl_divergence_from_top(h, w, chosen, log_p, chunk_rows=3, **options)

    def part(*args: Any) -> Any:
        return jax.lax.psum(loss(*args, vocab_axis="vocab", reduction="sum_and_weight"), "data").mean()

    if kind == "manual":
        mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)
    spread = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P()) if kind == "manual" else loss
    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(*args)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
        got = jax.jit(jax.value_and_grad(spread, (0, 1)))(*split)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_three_products_and_bad_input(rng: np.random.Generator):
    h, w, chosen, log_p = problem(rng)
    step = jax.grad(lambda h, w: linear_kl_divergence_from_top(h, w, chosen, log_p), (0, 1))
    assert str(jax.make_jaxpr(step)(h, w)).count("dot_general[") == 3
    stats = linear_token_statistics(h, w, top_k=K)
    assert abs(linear_kl_divergence_from_top(h, w, stats.top_classes, stats.top_log_probs)) < 1e-6
    name = r"jaxent\.linear_kl_divergence_from_top: "
    for args, options, error, match in (
        ((chosen[:2], log_p), {}, ValueError, "`classes` must have shape"),
        ((chosen, log_p[:, :2]), {}, ValueError, "`log_probs` must have shape"),
        ((log_p, log_p), {}, TypeError, "`classes` must have an integer dtype"),
        ((chosen, chosen), {}, TypeError, "`log_probs` must have a floating dtype"),
        ((chosen, log_p), {"tail": "rest"}, ValueError, "`tail` must be"),
        ((chosen, log_p), {"divergence": "jensen_shannon"}, ValueError, "`divergence` must be"),
    ):
        with pytest.raises(error, match=name + match):
            linear_kl_divergence_from_top(h, w, *args, **options)
