"""Rows that are dropped, classes that are removed, options that are switched off: value and every derivative.

A dropped row adds exactly 0. A removed class (logit or bias of -inf) is as if deleted, with finite derivatives with
respect to everything. An option at the value that switches it off has its true derivative.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference as ref
from cases import covering
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

INF = np.inf
RNG = np.random.default_rng(0)
H = RNG.normal(size=(6, 4)).astype(np.float32)
W = RNG.normal(size=(4, 8)).astype(np.float32)
B = RNG.normal(size=8).astype(np.float32)
Y = np.array([3, -100, 0, 7, -100, 2], np.int32)
KEPT = Y != -100
Z = H @ W
# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
nn: Any = importlib.import_module("jaxent.torch_compat")
Call = Callable[..., Any]


def close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Leaf by leaf, where a list is an array; nan and inf must be where they are wanted."""
    leaves = [jax.tree.leaves(x, is_leaf=lambda x: isinstance(x, list)) for x in (got, want)]
    for g, w in zip(*leaves, strict=True):
        np.testing.assert_allclose(ref.wide(g), ref.wide(w), rtol=rtol, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of dropped rows

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


@pytest.mark.parametrize("how", DROPPED)
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
        close(jax.jvp(f, (z,), (z,)), jax.jvp(plain, (z,), (z,)))
    elif transform == "vmap":
        close(jax.vmap(jax.grad(f))(jnp.stack([z, 2 * z]))[1], jax.grad(plain)(2 * z))
    elif transform == "zero cotangent":
        assert not np.any(jax.vjp(lambda z: getattr(jaxent, name)(z, *rest, Y).log_prob, z)[1](jnp.zeros(6))[0])
    else:
        transformed = jax.hessian if transform == "hessian" else jax.jacfwd
        close(transformed(f)(z), transformed(plain)(z))


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
    gradients = jax.grad(lambda h, w: jaxent.linear_token_statistics(h, w, Y).log_prob.sum(), (0, 1))(h, w)
    wanted = jax.grad(lambda h, w: plain_statistic("log_prob", h @ w, Y), (0, 1))(H, W)
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
    wanted = jax.value_and_grad(lambda h, w: plain_statistic("log_prob", h @ w, Y), (0, 1))(H, W)
    close(got, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# A removed class together with targets, class weights and smoothing

ZM = np.array([1.0, -INF, 2.0], np.float32)
A = np.array([0.5, -INF, 0.1], np.float32)
ON = np.array([0, 2])
LOG_P = ref.log_softmax(ZM[ON])


def dense_of(z: Any, targets: Any, **options: Any) -> jax.Array:
    return jaxent.softmax_cross_entropy(z, targets, **options)


def linear_of(z: Any, targets: Any, **options: Any) -> jax.Array:
    """The same logits as a bias."""
    head = jnp.zeros((1, 2)), jnp.zeros((2, 3))
    return jaxent.linear_softmax_cross_entropy(*head, jnp.asarray(targets)[None], bias=z, **options)


ROUTES = {"dense": dense_of, "linear": linear_of}


def on_and_off(vector: Any, at: int = 1, rtol: float = 1e-5) -> np.ndarray:
    """The entries of the classes that are there; the removed one is finite."""
    vector = ref.wide(vector)
    assert np.all(np.isfinite(vector)), vector
    return np.delete(vector, at, axis=-1)


@pytest.mark.parametrize(("mode", "route"), covering(["grad", "jit grad", "jacfwd", "vmap"], ROUTES))
def test_gradient_through_the_softmax_of_a_teacher(route: str, mode: str) -> None:
    def f(a: jax.Array) -> jax.Array:
        return ROUTES[route](ZM, jax.nn.softmax(a))

    transform: Call = {"grad": jax.grad, "jit grad": lambda f: jax.jit(jax.grad(f)), "jacfwd": jax.jacfwd}.get(
        mode, lambda f: lambda a: jax.vmap(jax.grad(f))(a[None])[0]
    )
    t = ref.softmax(A[ON])
    slope = t * (-LOG_P - (t * -LOG_P).sum())
    close(transform(f)(jnp.asarray(A)), [slope[0], 0, slope[1]])
    close(slope, [0.2403, -0.2403], rtol=1e-3)


TARGETS = np.array([0.25, 0.0, 0.75], np.float32)


@pytest.mark.parametrize("route", ROUTES)
def test_derivatives_with_respect_to_targets(route: str) -> None:
    f = ROUTES[route]
    for derivative in (jax.grad, jax.jacfwd, jax.jacrev):
        close(on_and_off(derivative(lambda t: f(ZM, t))(jnp.asarray(TARGETS))), -LOG_P)
    none = np.zeros(3, np.float32)
    close(jax.jvp(lambda t: f(ZM, t), (TARGETS,), (none,)), (-(TARGETS[ON] * LOG_P).sum(), 0))
    close(jax.jvp(f, (ZM, TARGETS), (none, none))[1], 0)
    step = np.array([0.5, 0, -0.5], np.float32)
    close(jax.jvp(lambda t: f(ZM, t), (TARGETS,), (step,))[1], -(step[ON] * LOG_P).sum())
    both = jax.grad(f, (0, 1))(ZM, TARGETS)
    close(both[0], [*(ref.softmax(ZM)[:1] - 0.25), 0, ref.softmax(ZM)[2] - 0.75])
    mixed = jax.jacfwd(jax.grad(f), 1)(ZM, TARGETS)  # d(p sum(t) - t)
    close(np.delete(on_and_off(mixed), 1, 0), ref.softmax(ZM[ON])[:, None] - np.eye(2))


@pytest.mark.parametrize(("route", "given"), covering(ROUTES, ["label", "probabilities"]))
def test_derivatives_with_respect_to_class_weights(route: str, given: str) -> None:
    targets = np.int32(2) if given == "label" else TARGETS
    share = np.array([0, 1]) if given == "label" else TARGETS[ON]

    def f(c: jax.Array) -> jax.Array:
        return ROUTES[route](ZM, targets, class_weights=c, reduction="sum")

    c = np.array([0.5, 2.0, 3.0], np.float32)
    for derivative in (jax.grad, jax.jacfwd):
        close(on_and_off(derivative(f)(jnp.asarray(c))), -share * LOG_P)
    close(jax.jvp(f, (c,), (np.zeros_like(c),))[1], 0)


@pytest.mark.parametrize("route", ROUTES)
def test_smoothing_over_a_class_without_weight(route: str) -> None:
    """The README's padding recipe: a removed class has no class weight, so that smoothing does not reach it."""
    c, e = np.array([1.0, 0.0, 2.0], np.float32), 0.25

    def f(e: Any, c: Any = c) -> jax.Array:
        return ROUTES[route](ZM, np.int32(2), class_weights=c, label_smoothing=e, reduction="sum")

    spread = -(c[ON] * LOG_P).sum() / 3
    for transform in (lambda f: f, jax.jit):
        value, slope = transform(jax.value_and_grad(f))(e)
        close((value, slope), (-0.75 * 2 * LOG_P[1] + e * spread, 2 * LOG_P[1] + spread))
    close(jax.grad(f)(0.0), 2 * LOG_P[1] + spread)
    close(jax.jvp(f, (e,), (0.0,))[1], 0)
    by_weight = on_and_off(jax.grad(f, 1)(e, jnp.asarray(c)))
    close(by_weight, -(0.75 * np.array([0, 1]) + e / 3) * LOG_P)


@pytest.mark.parametrize("route", ROUTES)
def test_smoothing_of_0_beside_a_removed_class(route: str) -> None:
    value, slope = jax.value_and_grad(lambda e: ROUTES[route](ZM, np.int32(2), label_smoothing=e))(0.0)
    close(value, -LOG_P[1])
    assert not np.isnan(slope)
    assert np.isposinf(ROUTES[route](ZM, np.int32(2), label_smoothing=0.1))


def test_closed_gradient_with_a_removed_class() -> None:
    by_targets = jax.jacfwd(lambda t: jaxent.softmax_cross_entropy_gradient(ZM, t))(jnp.asarray(TARGETS))
    close(np.delete(on_and_off(by_targets), 1, 0), ref.softmax(ZM[ON])[:, None] - np.eye(2))
    f = lambda e: jaxent.softmax_cross_entropy_gradient(ZM, np.int32(2), label_smoothing=e)  # noqa: E731
    close(on_and_off(jax.jacfwd(f)(0.0)), np.array([-1, 2]) / 3)


def test_log_probabilities_with_a_removed_class() -> None:
    log_p = jax.nn.log_softmax(jnp.asarray(ZM))
    f = lambda c: jaxent.nll_loss(log_p, np.int32(2), class_weights=c, reduction="sum")  # noqa: E731
    close(jax.grad(f)(jnp.ones(3)), [0, 0, -LOG_P[1]])
    close(jax.jvp(f, (jnp.ones(3),), (jnp.zeros(3),))[1], 0)
    twin = lambda c: nn.cross_entropy(ZM[None], np.array([2]), c, reduction="sum")  # noqa: E731
    close(jax.grad(twin)(jnp.ones(3)), [0, 0, -LOG_P[1]])
    close(jax.jvp(twin, (jnp.ones(3),), (jnp.zeros(3),))[1], 0)


def test_zero_tangents_at_infinite_binary_logits() -> None:
    z, t = jnp.array([-INF, INF, 0.0]), jnp.array([0.0, 1.0, 0.5])
    for f in (jaxent.sigmoid_cross_entropy, lambda z, t: jaxent.sigmoid_cross_entropy(z, t, pos_weight=jnp.ones(3))):
        close(jax.jvp(f, (z, t), (jnp.zeros(3), jnp.zeros(3))), (np.log(2) / 3, 0))
        close(jax.jvp(f, (z, t), (jnp.zeros(3), jnp.array([0.0, 0.0, 1.0])))[1], 0)
    by_weight = jax.grad(lambda c: jaxent.sigmoid_cross_entropy(z, t, pos_weight=c, reduction="sum"))(jnp.ones(3))
    close(by_weight, [0, 0, np.log(2) / 2])


def test_measures_with_a_class_that_neither_has() -> None:
    p, q = jnp.array([0.0, 0.5, 0.5]), jnp.array([0.0, 0.25, 0.75])
    close(jax.grad(jaxent.cross_entropy)(p, q), [0, np.log(4), -np.log(0.75)])
    close(jax.jvp(jaxent.cross_entropy, (p, q), (jnp.zeros(3), jnp.zeros(3)))[1], 0)
    for f in (jaxent.kl_divergence, jaxent.jensen_shannon_divergence, lambda p, q: jaxent.renyi_divergence(p, q, 2)):
        close(jax.jvp(f, (p, q), (jnp.zeros(3), jnp.zeros(3)))[1], 0)
        assert np.all(np.isfinite(jax.grad(f, (0, 1))(p, q)))


@pytest.mark.parametrize("name", ["cross_entropy_with_logits", "kl_divergence_with_logits"])
def test_logits_with_a_class_that_neither_has(name: str) -> None:
    f, none = getattr(jaxent, name), np.zeros(3, np.float32)
    close(jax.jvp(f, (A, ZM), (none, none))[1], 0)
    got, wanted = jax.grad(f, (0, 1))(A, ZM), jax.grad(f, (0, 1))(A[ON], ZM[ON])
    for g, w in zip(got, wanted, strict=True):
        close(g, [w[0], 0, w[1]])
    full = np.delete(np.delete(jax.hessian(f)(A, ZM), 1, 0), 1, 1)
    close(full, jax.hessian(f)(A[ON], ZM[ON]))


# ----------------------------------------------------------------------------------------------------------------------
# A bias of -inf under a soft cap and a temperature

LABELS = np.array([3, 1, 0, 5, 4, 2], np.int32)
WIDE_W = np.pad(W[:, :6], ((0, 0), (0, 2)))
WIDE_B = np.append(B[:6], [-INF, -INF]).astype(np.float32)
CAP, T = 2.0, 0.5


def capped(h: Any, w: Any, b: Any, cap: Any = CAP, t: Any = T) -> jax.Array:
    z = h @ w + b[None]
    return (z if cap is None else cap * jnp.tanh(z / cap)) / t


def plain_nll(h: Any, w: Any, b: Any, cap: Any = CAP, t: Any = T) -> jax.Array:
    log_p = jax.nn.log_softmax(capped(h, w, b, cap, t), axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_p, LABELS[:, None], axis=-1))


@pytest.mark.parametrize(("cap", "chunk"), covering([CAP, None], [4, None]))
def test_padded_classes_under_cap_and_temperature(cap: float | None, chunk: int | None) -> None:
    """All derivatives are those of the six classes that are there."""
    of = (0, 1, 2, 3) if cap is None else (0, 1, 2, 3, 4)

    def f(h: Any, w: Any, b: Any, t: Any, cap: Any) -> jax.Array:
        options = {"bias": b, "temperature": t, "soft_cap": cap, "chunk_rows": chunk}
        return jaxent.linear_softmax_cross_entropy(h, w, LABELS, **options)

    got = jax.jit(jax.value_and_grad(f, of))(H, WIDE_W, WIDE_B, T, cap)
    narrow = H, W[:, :6], B[:6]
    value, wanted = jax.value_and_grad(lambda h, w, b, t, c: plain_nll(h, w, b, c, t), of)(*narrow, T, cap)
    z = narrow[0].astype(np.float64) @ narrow[1] + narrow[2]
    z = z / T if cap is None else cap * np.tanh(z / cap) / T
    close(got[0], ref.nll(z, LABELS).mean())
    close(got[0], value)
    gh, gw, gb, *scalars = got[1]
    close(gh, wanted[0])
    close(gw, np.pad(wanted[1], ((0, 0), (0, 2))))
    close(gb, np.pad(wanted[2], (0, 2)))
    close(scalars, list(wanted[3:]))


def test_readme_recipe_under_a_soft_cap() -> None:
    classes, padded, smoothing = 30, 32, 0.1
    hidden, kernel, labels = jnp.ones((16, 8)), jnp.eye(8, classes), jnp.arange(16)
    wide, real = jnp.pad(kernel, ((0, 0), (0, padded - classes))), jnp.arange(padded) < classes
    bias, t = jnp.where(real, 0.0, -jnp.inf), 1 - smoothing + smoothing * padded / classes
    options = {"class_weights": jnp.where(real, 1.0, 0.0), "label_smoothing": 1 - (1 - smoothing) / t}
    for shaping in ({"soft_cap": 5.0}, {"soft_cap": 0.5, "temperature": 2.0}):
        got = t * jaxent.linear_softmax_cross_entropy(hidden, wide, labels, bias=bias, **options, **shaping)
        unpadded = jaxent.linear_softmax_cross_entropy(hidden, kernel, labels, label_smoothing=smoothing, **shaping)
        z = ref.wide(hidden) @ ref.wide(kernel)
        z = shaping["soft_cap"] * np.tanh(z / shaping["soft_cap"]) / shaping.get("temperature", 1)
        nll = -ref.log_softmax(z)
        want = (0.9 * nll[np.arange(16), np.asarray(labels)] + 0.1 * nll.mean(-1)).mean()
        close((got, unpadded), (want, want))


@pytest.mark.parametrize("mode", ["eager", "jit", "grad of cap"])
def test_statistics_of_padded_classes(mode: str) -> None:
    def f(cap: Any, w: Any, b: Any, top: int) -> Any:
        return jaxent.linear_token_statistics(H, w, LABELS, bias=b, soft_cap=cap, temperature=T, top_k=top)

    if mode == "grad of cap":
        total = lambda *a: sum(x.sum() for x in f(*a)[:3])  # noqa: E731
        close(jax.grad(total)(CAP, WIDE_W, WIDE_B, 0), jax.grad(total)(CAP, W[:, :6], B[:6], 0))
        return
    run: Call = jax.jit(f, static_argnums=3) if mode == "jit" else f
    got, z = run(CAP, WIDE_W, WIDE_B, 8), ref.wide(capped(H, W[:, :6], B[:6]))
    close(got.log_prob, -ref.nll(z, LABELS))
    close(got.entropy, ref.entropy(ref.softmax(z)))
    close(got.log_normalizer, np.log(np.exp(z).sum(-1)))
    assert np.array_equal(got.argmax, z.argmax(-1))
    assert np.array_equal(got.top_classes[:, :6], np.argsort(-z, axis=-1))
    assert np.all(np.isneginf(got.top_log_probs[:, 6:]))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_divergences_of_padded_classes(divergence: Any) -> None:
    def f(w_p: Any, w_q: Any, b: Any, cap: Any, t: Any) -> jax.Array:
        options = {"bias_p": b, "bias_q": b, "soft_cap_p": cap, "soft_cap_q": 2 * cap, "temperature": t}
        return jaxent.linear_kl_divergence(H, w_p, H[:, ::-1], w_q, divergence=divergence, **options)

    wide = jax.value_and_grad(f, (0, 1, 3, 4))(WIDE_W, 2 * WIDE_W, WIDE_B, CAP, T)
    value, (gp, gq, gc, gt) = jax.value_and_grad(f, (0, 1, 3, 4))(W[:, :6], 2 * W[:, :6], B[:6], CAP, T)
    pad = lambda x: np.pad(x, ((0, 0), (0, 2)))  # noqa: E731
    close(wide, (value, (pad(gp), pad(gq), gc, gt)))
    if divergence == "forward":
        z_p, z_q = capped(H, W[:, :6], B[:6]), capped(H[:, ::-1], 2 * W[:, :6], B[:6], 2 * CAP)
        close(wide[0], ref.kl(z_p, z_q).mean())


def test_norms_and_curvature_of_padded_classes() -> None:
    shaping = {"soft_cap": CAP, "temperature": T}
    norms = lambda w, b: jaxent.linear_gradient_norms(H, w, LABELS, bias=b, **shaping)  # noqa: E731
    close(norms(WIDE_W, WIDE_B), norms(W[:, :6], B[:6]))
    v = np.ones_like(H)
    for name, rest in (("linear_ggn_vector_product", ()), ("linear_fisher_vector_product", (LABELS,))):
        f = lambda w, b: getattr(jaxent, name)(H, w, *rest, (v, w, None), bias=b, **shaping)  # noqa: B023, E731
        wide, narrow = f(WIDE_W, WIDE_B), f(W[:, :6], B[:6])
        close(wide[0], narrow[0])
        close(wide[1], np.pad(narrow[1], ((0, 0), (0, 2))))


def test_user_loss_of_padded_classes() -> None:
    def rows(z: jax.Array, y: jax.Array) -> jax.Array:
        return jaxent.softmax_cross_entropy(z, y, reduction="none")

    f = lambda w, b: jaxent.linear_loss(rows, H, w, LABELS, bias=b, soft_cap=CAP, temperature=T)  # noqa: E731
    close(f(WIDE_W, WIDE_B), plain_nll(H, W[:, :6], B[:6]))


def test_padded_classes_over_devices() -> None:
    mesh = jax.make_mesh((4,), ("vocab",), axis_types=(AxisType.Auto,))

    def f(w: jax.Array, b: jax.Array, cap: Any) -> jax.Array:
        options = {"bias": b, "soft_cap": cap, "temperature": T, "vocab_axis": "vocab"}
        return jaxent.linear_softmax_cross_entropy(H, w, LABELS, **options)

    g = jax.shard_map(f, mesh=mesh, in_specs=(P(None, "vocab"), P("vocab"), P()), out_specs=P())
    value, (gw, gc) = jax.jit(jax.value_and_grad(g, (0, 2)))(WIDE_W, WIDE_B, CAP)
    narrow = jax.value_and_grad(lambda w, c: plain_nll(H, w, B[:6], c), (0, 1))
    want, (ww, wc) = narrow(W[:, :6], CAP)
    close((value, gw, gc), (want, np.pad(ww, ((0, 0), (0, 2))), wc))


@pytest.mark.usefixtures("x64")
def test_padded_classes_in_float64() -> None:
    wide, narrow = (WIDE_W, WIDE_B), (W[:, :6], B[:6])
    f = lambda c, t, w, b: jaxent.linear_softmax_cross_entropy(  # noqa: E731
        ref.wide(H), ref.wide(w), LABELS, bias=ref.wide(b), soft_cap=c, temperature=t
    )
    got = jax.value_and_grad(f, (0, 1))(CAP, T, *wide)
    close(got, jax.value_and_grad(f, (0, 1))(CAP, T, *narrow), rtol=1e-13, atol=1e-13)
    close(got[0], ref.nll(CAP * np.tanh((ref.wide(H) @ narrow[0] + narrow[1]) / CAP) / T, LABELS).mean(), rtol=1e-13)


# ----------------------------------------------------------------------------------------------------------------------
# Options at the value that switches them off

Z2, Y2 = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]], np.float32), np.array([2, 0], np.int32)
NLL, LSE = -ref.log_softmax(Z2), np.log(np.exp(ref.wide(Z2)).sum(-1))
SMOOTHED = (NLL.mean(-1) - ref.nll(Z2, Y2)).mean()
EYE3 = np.eye(3, dtype=np.float32)
OFF_ROUTES: dict[str, Call] = {
    "dense": jaxent.softmax_cross_entropy,
    "linear": lambda z, y, **o: jaxent.linear_softmax_cross_entropy(z, EYE3, y, **o),
}


def test_smoothing_of_0_as_in_the_issue() -> None:
    close(SMOOTHED, 1 / 3)
    close(jax.grad(lambda e: jaxent.softmax_cross_entropy(Z2, Y2, label_smoothing=e))(0.0), 1 / 3)


@pytest.mark.parametrize(
    ("mode", "route", "option"),
    covering(["alone", "jit", "jvp", "jacfwd", "beside logits", "vmap"], OFF_ROUTES, ["label_smoothing", "z_loss"]),
)
def test_slope_of_an_option_at_0(route: str, mode: str, option: str) -> None:
    def f(x: Any, z: Any = Z2) -> jax.Array:
        return OFF_ROUTES[route](z, Y2, **{option: x})

    want = SMOOTHED if option == "label_smoothing" else (LSE**2).mean()
    if mode == "jvp":
        close(jax.jvp(f, (0.0,), (1.0,)), (ref.nll(Z2, Y2).mean(), want))
    elif mode == "beside logits":
        slope, by_logits = jax.grad(f, (0, 1))(0.0, Z2)
        close(slope, want)
        close(by_logits, (ref.softmax(Z2) - ref.onehot(Y2, 3)) / 2)
        mixed = jax.jacfwd(jax.grad(f, 1))(0.0, Z2)
        p = ref.softmax(Z2)
        close(mixed, (ref.onehot(Y2, 3) - 1 / 3) / 2 if option == "label_smoothing" else LSE[:, None] * p)
    elif mode == "vmap":
        close(jax.vmap(jax.grad(f))(jnp.zeros(2)), [want, want])
    else:
        derivative = jax.jacfwd if mode == "jacfwd" else jax.grad
        close((jax.jit(derivative(f)) if mode == "jit" else derivative(f))(0.0), want)


@pytest.mark.parametrize("route", OFF_ROUTES)
def test_several_options_at_0(route: str) -> None:
    """Beside weights and class weights of 0, whose slopes are those of a quotient."""
    w, c = np.array([1.0, 0.0], np.float32), np.array([1.0, 1.0, 2.0], np.float32)

    def f(e: Any, zeta: Any, w: Any) -> jax.Array:
        options = {"label_smoothing": e, "z_loss": zeta, "weights": w, "class_weights": c}
        return OFF_ROUTES[route](Z2, Y2, **options)

    by_e, by_z, by_w = jax.grad(f, (0, 1, 2))(0.0, 0.0, w)
    nll = ref.nll(Z2, Y2)
    close(by_e, ((c * NLL[0]).mean() - 2 * nll[0]) / 2)
    close(by_z, LSE[0] ** 2 / 2)
    close(by_w, [0, 1 * nll[1] / 2 - 2 * nll[0] * 1 / 4])
    close(jax.grad(f)(0.0, 0.0, np.ones(2, np.float32)), (((c * NLL).mean(-1) - c[Y2] * nll) / 3).sum())


def test_smoothing_at_1_and_of_probabilities() -> None:
    f = lambda e, t=Y2: jaxent.softmax_cross_entropy(Z2, t, label_smoothing=e)  # noqa: E731
    close(jax.grad(f)(1.0), SMOOTHED)
    close(jax.grad(f)(0.0, ref.onehot(Y2, 3).astype(np.float32)), SMOOTHED)
    close(jax.grad(f)(0.0, EYE3[:2] * 0.5 + 0.25), (NLL * (1 / 3 - (EYE3[:2] * 0.5 + 0.25))).sum(-1).mean())


def test_smoothing_of_0_elsewhere() -> None:
    slope = (ref.onehot(Y2, 3) - 1 / 3) / 2
    close(jax.jacfwd(lambda e: jaxent.softmax_cross_entropy_gradient(Z2, Y2, label_smoothing=e))(0.0), slope)
    close(jax.grad(lambda e: nn.cross_entropy(Z2, Y2, label_smoothing=e))(0.0), SMOOTHED)
    close(jax.grad(lambda e: nn.linear_cross_entropy(Z2, EYE3, Y2, label_smoothing=e))(0.0), SMOOTHED)
    norms = lambda e: jaxent.linear_gradient_norms(Z2, EYE3, Y2, label_smoothing=e).residual.sum()  # noqa: E731
    g = ref.softmax(Z2) - ref.onehot(Y2, 3)
    close(jax.grad(norms)(0.0), ((g * 2 * slope).sum(-1) / np.linalg.norm(g, axis=-1)).sum())
    v = np.arange(6, dtype=np.float32).reshape(2, 3)
    ggn = lambda zeta: jaxent.ggn_vector_product(lambda z: z, Z2, v, targets=Y2, z_loss=zeta)  # noqa: E731
    p = ref.softmax(Z2)
    rank = p * (p * v).sum(-1, keepdims=True)
    close(jax.jacfwd(ggn)(0.0), rank + LSE[:, None] * ref.hessian_product(Z2, v))


@pytest.mark.parametrize("mode", ["alone", "jit", "beside hidden"])
def test_slope_of_temperature_at_1(mode: str) -> None:
    def f(t: Any, z: Any = Z2) -> jax.Array:
        return jaxent.linear_softmax_cross_entropy(z, EYE3, Y2, temperature=t)

    want = -((ref.softmax(Z2) - ref.onehot(Y2, 3)) * Z2).sum() / 2
    got = (
        jax.grad(f, (0, 1))(1.0, Z2)[0]
        if mode == "beside hidden"
        else (jax.jit if mode == "jit" else lambda f: f)(jax.grad(f))(1.0)
    )
    close(got, want)
    statistics = lambda t: jaxent.linear_token_statistics(Z2, EYE3, Y2, temperature=t).log_prob.sum()  # noqa: E731
    close(jax.grad(statistics)(1.0), -2 * want)


def test_weights_at_their_neutral_values() -> None:
    nll = ref.nll(Z2, Y2)
    f = lambda w: jaxent.softmax_cross_entropy(Z2, Y2, weights=w)  # noqa: E731
    close(jax.grad(f)(jnp.ones(2)), (nll - nll.mean()) / 2)
    close(jax.grad(f)(jnp.array([0.0, 2.0])), [(nll[0] - nll[1]) / 2, 0])
    z, t = Z2[0], np.array([0.0, 0.5, 1.0], np.float32)
    for name, module in (("sigmoid_cross_entropy", jaxent), ("binary_cross_entropy_with_logits", nn)):
        f: Any = getattr(module, name)
        close(jax.grad(lambda c: f(z, t, pos_weight=c))(jnp.ones(3)), t * ref.softplus(-z) / 3)  # noqa: B023


# ----------------------------------------------------------------------------------------------------------------------
# A soft cap far out: its slope is 1 / cosh(x / s)^2, which float32 holds until x = 44 s


def sech2(x: float) -> float:
    return float(1 / mpmath.cosh(x) ** 2)


def test_slope_of_a_soft_cap_does_not_saturate() -> None:
    s, w, y = 3.0, jnp.array([[1.0, 0.0]]), jnp.array([1])

    @jax.jit
    def slopes(h: jax.Array) -> Any:
        def f(h: Any, w: Any, b: Any) -> jax.Array:
            return jaxent.linear_softmax_cross_entropy(h, w, y, bias=b, soft_cap=s)

        return (
            jax.grad(f, (0, 1, 2))(h, w, jnp.zeros(2)),
            jax.jvp(lambda h: f(h, w, jnp.zeros(2)), (h,), (jnp.ones((1, 1)),))[1],
            jax.grad(lambda h: jaxent.linear_token_statistics(h, w, y, soft_cap=s).log_prob[0])(h),
            jaxent.linear_gradient_norms(h, w, y, soft_cap=s).hidden[0],
            jax.grad(lambda h: jaxent.linear_kl_divergence(h, 0 * w, h, w, soft_cap_q=s))(h),
        )

    for caps in (-30.0, -8.0, 2.0, 8.0, 12.0, 20.0, 40.0):
        z = np.array([[s * np.tanh(caps), 0.0]])
        want = (ref.softmax(z) - [[0, 1]])[0, 0] * sech2(caps)
        (gh, gw, gb), forward, by_row, norm, teacher = slopes(jnp.array([[caps * s]]))
        close((gh[0, 0], gw[0, 0], gb[0]), (want, want * caps * s, want), rtol=2e-5, atol=0)
        close(forward, want, rtol=2e-5, atol=0)
        close(by_row, [[-want]], rtol=2e-5, atol=0)
        close(norm, abs(want), rtol=2e-5, atol=0)
        close(teacher, [[(ref.softmax(z)[0, 0] - 0.5) * sech2(caps)]], rtol=2e-5, atol=0)


def test_curvature_of_a_soft_cap_does_not_saturate() -> None:
    s, w, y = 2.0, jnp.array([[1.0, 0.0]]), jnp.array([1])

    @jax.jit
    def curvature(h: jax.Array) -> Any:
        f = lambda h, s: jaxent.linear_softmax_cross_entropy(h, w, y, soft_cap=s)  # noqa: E731
        product = jaxent.linear_ggn_vector_product(h, w, (jnp.ones((1, 1)), None), soft_cap=s)[0]
        return jax.hessian(f)(h, s)[0, 0, 0, 0], product, jax.grad(f, 1)(h, s)

    for caps in (8.0, 15.0):
        p = ref.softmax(np.array([s * np.tanh(caps), 0.0]))[0]
        hessian, product, by_cap = curvature(jnp.array([[caps * s]]))
        want = p * (1 - p) * sech2(caps) ** 2 - p * 2 * np.tanh(caps) * sech2(caps) / s
        close(hessian, want, rtol=2e-5, atol=0)
        close(product, [[p * (1 - p) * sech2(caps) ** 2]], rtol=1e-4, atol=0)
        close(by_cap, p * float(mpmath.tanh(caps) - caps * mpmath.sech(caps) ** 2))


@pytest.mark.usefixtures("x64")
def test_slope_of_a_soft_cap_in_float64() -> None:
    h, w = jnp.array([[25.0]]), jnp.array([[1.0, 0.0]])
    g = jax.grad(lambda h: jaxent.linear_softmax_cross_entropy(h, w, jnp.array([1]), soft_cap=1.0))(h)
    close(g, [[ref.softmax(np.array([1.0, 0.0]))[0] * sech2(25.0)]], rtol=1e-13, atol=0)
