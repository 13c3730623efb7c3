"""A removed class (logit or bias of -inf) is as if deleted, with finite derivatives with respect to everything."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from cases import covering, marked, run
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_call import B, Call, H, W, jaxent, nn
from small_call import close_leaves as close

INF = np.inf


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
    none, step = np.zeros(3, np.float32), np.array([0.5, 0, -0.5], np.float32)

    @jax.jit
    def ways(z: jax.Array, t: jax.Array) -> Any:
        return (
            [derivative(f, 1)(z, t) for derivative in (jax.grad, jax.jacfwd, jax.jacrev)],
            [jax.jvp(lambda t: f(z, t), (t,), (v,)) for v in (none, step)],
            jax.jvp(f, (z, t), (none, none))[1],
            jax.grad(f, (0, 1))(z, t)[0],
            jax.jacfwd(jax.grad(f), 1)(z, t),
        )

    by_targets, (along_none, along_step), still, by_logits, mixed = ways(ZM, TARGETS)
    for got in by_targets:
        close(on_and_off(got), -LOG_P)
    close(along_none, (-(TARGETS[ON] * LOG_P).sum(), 0))
    close(along_step[1], -(step[ON] * LOG_P).sum())
    close(still, 0)
    close(by_logits, [*(ref.softmax(ZM)[:1] - 0.25), 0, ref.softmax(ZM)[2] - 0.75])
    # d(p sum(t) - t)
    close(np.delete(on_and_off(mixed), 1, 0), ref.softmax(ZM[ON])[:, None] - np.eye(2))


@pytest.mark.parametrize(("route", "given"), covering(ROUTES, ["label", "probabilities"]))
def test_derivatives_with_respect_to_class_weights(route: str, given: str) -> None:
    targets = np.int32(2) if given == "label" else TARGETS
    share = np.array([0, 1]) if given == "label" else TARGETS[ON]

    def f(c: jax.Array) -> jax.Array:
        return ROUTES[route](ZM, targets, class_weights=c, reduction="sum")

    c = np.array([0.5, 2.0, 3.0], np.float32)
    ways = jax.jit(lambda c: (jax.grad(f)(c), jax.jacfwd(f)(c), jax.jvp(f, (c,), (jnp.zeros(3),))[1]))
    *gradients, still = ways(c)
    for got in gradients:
        close(on_and_off(got), -share * LOG_P)
    close(still, 0)


@pytest.mark.parametrize("route", ROUTES)
def test_smoothing_over_a_class_without_weight(route: str) -> None:
    """The README's padding recipe: a removed class has no class weight, so that smoothing does not reach it."""
    c, e = np.array([1.0, 0.0, 2.0], np.float32), 0.25

    def f(e: Any, c: Any = c) -> jax.Array:
        return ROUTES[route](ZM, np.int32(2), class_weights=c, label_smoothing=e, reduction="sum")

    spread = -(c[ON] * LOG_P).sum() / 3
    value_and_slope = jax.jit(jax.value_and_grad(f, (0, 1)))
    value, (slope, by_weight) = value_and_slope(e, c)
    close((value, slope), (-0.75 * 2 * LOG_P[1] + e * spread, 2 * LOG_P[1] + spread))
    close(value_and_slope(0.0, c)[1][0], 2 * LOG_P[1] + spread)
    close(jax.grad(f)(0.0), 2 * LOG_P[1] + spread)
    close(run(lambda e: jax.jvp(f, (e,), (jnp.zeros(()),))[1], e), 0)
    by_weight = on_and_off(by_weight)
    close(by_weight, -(0.75 * np.array([0, 1]) + e / 3) * LOG_P)


@pytest.mark.parametrize("route", ROUTES)
def test_smoothing_of_0_beside_a_removed_class(route: str) -> None:
    value, slope = run(jax.value_and_grad(lambda e: ROUTES[route](ZM, np.int32(2), label_smoothing=e)), 0.0)
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
        still, gradients = run(
            lambda p, q, f=f: (jax.jvp(f, (p, q), (jnp.zeros(3), jnp.zeros(3)))[1], jax.grad(f, (0, 1))(p, q)), p, q
        )
        close(still, 0)
        assert np.all(np.isfinite(gradients))


@pytest.mark.parametrize("name", ["cross_entropy_with_logits", "kl_divergence_with_logits"])
def test_logits_with_a_class_that_neither_has(name: str) -> None:
    f, none = getattr(jaxent, name), np.zeros(3, np.float32)
    close(run(lambda a, z: jax.jvp(f, (a, z), (none, none))[1], A, ZM), 0)
    both = jax.jit(lambda a, z: (jax.grad(f, (0, 1))(a, z), jax.hessian(f)(a, z)))
    (got, full), (wanted, hessian) = both(A, ZM), both(A[ON], ZM[ON])
    for g, w in zip(got, wanted, strict=True):
        close(g, [w[0], 0, w[1]])
    close(np.delete(np.delete(full, 1, 0), 1, 1), hessian)


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
    value, wanted = run(jax.value_and_grad(lambda h, w, b, t, c: plain_nll(h, w, b, c, t), of), *narrow, T, cap)
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


@pytest.mark.parametrize("mode", ["jit", "grad of cap"])
def test_statistics_of_padded_classes(mode: str) -> None:
    def f(cap: Any, w: Any, b: Any, top: int) -> Any:
        return jaxent.linear_token_statistics(H, w, LABELS, bias=b, soft_cap=cap, temperature=T, top_k=top)

    if mode == "grad of cap":
        total = lambda *a: sum(x.sum() for x in f(*a)[:3])  # noqa: E731
        slope = jax.jit(jax.grad(total), static_argnums=3)
        close(slope(CAP, WIDE_W, WIDE_B, 0), slope(CAP, W[:, :6], B[:6], 0))
        return
    run: Call = jax.jit(f, static_argnums=3)
    got, z = run(CAP, WIDE_W, WIDE_B, 8), ref.wide(capped(H, W[:, :6], B[:6]))
    close(got.log_prob, -ref.nll(z, LABELS))
    close(got.entropy, ref.entropy(ref.softmax(z)))
    close(got.log_normalizer, np.log(np.exp(z).sum(-1)))
    assert np.array_equal(got.argmax, z.argmax(-1))
    assert np.array_equal(got.top_classes[:, :6], np.argsort(-z, axis=-1))
    assert np.all(np.isneginf(got.top_log_probs[:, 6:]))


@pytest.mark.parametrize("divergence", marked(["forward", "reverse", "jensen_shannon"], ["forward", "jensen_shannon"]))
def test_divergences_of_padded_classes(divergence: Any) -> None:
    def f(w_p: Any, w_q: Any, b: Any, cap: Any, t: Any) -> jax.Array:
        options = {"bias_p": b, "bias_q": b, "soft_cap_p": cap, "soft_cap_q": 2 * cap, "temperature": t}
        return jaxent.linear_kl_divergence(H, w_p, H[:, ::-1], w_q, divergence=divergence, **options)

    value_and_grad = jax.jit(jax.value_and_grad(f, (0, 1, 3, 4)))
    wide = value_and_grad(WIDE_W, 2 * WIDE_W, WIDE_B, CAP, T)
    value, (gp, gq, gc, gt) = value_and_grad(W[:, :6], 2 * W[:, :6], B[:6], CAP, T)
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
    narrow = jax.jit(jax.value_and_grad(lambda w, c: plain_nll(H, w, B[:6], c), (0, 1)))
    want, (ww, wc) = narrow(W[:, :6], CAP)
    close((value, gw, gc), (want, np.pad(ww, ((0, 0), (0, 2))), wc))


@pytest.mark.usefixtures("x64")
def test_padded_classes_in_float64() -> None:
    wide, narrow = ([ref.wide(x) for x in head] for head in ((WIDE_W, WIDE_B), (W[:, :6], B[:6])))
    f = lambda c, t, w, b: jaxent.linear_softmax_cross_entropy(  # noqa: E731
        ref.wide(H), w, LABELS, bias=b, soft_cap=c, temperature=t
    )
    value_and_grad = jax.jit(jax.value_and_grad(f, (0, 1)))
    got = value_and_grad(CAP, T, *wide)
    close(got, value_and_grad(CAP, T, *narrow), rtol=1e-13, atol=1e-13)
    close(got[0], ref.nll(CAP * np.tanh((ref.wide(H) @ narrow[0] + narrow[1]) / CAP) / T, LABELS).mean(), rtol=1e-13)
