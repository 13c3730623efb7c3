"""Sums that are differentiated by their weights, weights of either sign, and binary targets that are none."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
from cases import covering
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# Untyped: options come in dictionaries, and some calls are wrong on purpose.
jaxent: Any = importlib.import_module("jaxent")
Call = Callable[..., Any]
RNG = np.random.default_rng(0)
H, W = RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(size=(3, 8)).astype(np.float32)
Z, Y = H @ W, np.array([3, 0, 7, 2], np.int32)
SIGNED = np.array([2.0, -1.5, 0.0, 1.25], np.float32)
T = (RNG.integers(0, 5, size=Z.shape) / 4).astype(np.float32)
DIVISOR = 3.0


def close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(ref.wide(got), ref.wide(want), rtol=rtol, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives of means with respect to their weights


def risk(losses: Any, w: Any) -> jax.Array:
    return jaxent.EmpiricalRisk().update(losses, w).mean()


def quotient_slope(losses: Any, w: Any) -> np.ndarray:
    losses, w = ref.wide(losses), ref.wide(w)
    return losses / w.sum() - (losses * w).sum() / w.sum() ** 2


def test_risk_with_respect_to_weights() -> None:
    losses = jnp.array([1.0, 2.0])
    ways = jax.jit(lambda w: [d(lambda w: risk(losses, w))(w) for d in (jax.grad, jax.jacfwd, jax.jacrev)])
    for w in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.25], [0.0, 3.0]):
        for slope in ways(jnp.array(w)):
            close(slope, quotient_slope(losses, w))


def test_the_gradient_of_the_issue() -> None:
    close(jax.grad(lambda w: risk(jnp.array([1.0, 2.0]), w))(jnp.array([1.0, 0.0])), [0, 1])


def test_parts_of_a_risk_with_respect_to_weights() -> None:
    losses, w = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 0.0, 0.0])
    update = lambda w: jaxent.EmpiricalRisk().update(losses, w)  # noqa: E731
    close(jax.grad(lambda w: update(w).total)(w), losses)
    close(jax.grad(lambda w: update(w).weight)(w), [1, 1, 1])
    close(jax.grad(lambda w: update(w).bits_per(8))(w), losses / np.log(2) / 8)
    close(jax.grad(lambda w: update(w).perplexity())(w), np.e * quotient_slope(losses, w))
    merged = lambda w: update(w).merge(update(w[::-1])).mean()  # noqa: E731
    close(jax.grad(merged)(w), quotient_slope([5.0, 4.0, 5.0], 2 * w) * 1.0, atol=2e-6)
    close(jax.grad(lambda x: risk(x, w))(losses), [1, 0, 0])


def test_second_derivatives_of_a_risk_with_respect_to_weights() -> None:
    losses, w = np.array([1.0, 2.0]), np.array([1.0, 0.0])
    got = jax.hessian(lambda w: risk(jnp.asarray(losses, jnp.float32), w))(jnp.asarray(w, jnp.float32))
    total = (losses * w).sum()
    close(got, -(losses[:, None] + losses[None]) + 2 * total)


def test_a_silenced_nan_has_no_slope() -> None:
    for bad in (np.nan, np.inf):
        got = jax.grad(lambda w: risk(jnp.array([1.0, bad]), w))(jnp.array([1.0, 0.0]))  # noqa: B023
        assert not np.any(np.isnan(got)), got
        close(got[0], 0)


def test_risk_with_respect_to_weights_through_a_scan_and_over_devices() -> None:
    losses, w = jnp.array([[1.0, 2.0], [4.0, 3.0]]), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    want = quotient_slope(losses, w)

    def scanned(w: jax.Array) -> jax.Array:
        step = lambda risk, part: (risk.update(*part), None)  # noqa: E731
        return jax.lax.scan(step, jaxent.EmpiricalRisk(), (losses, w))[0].mean()

    close(jax.grad(scanned)(w), want)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    over = lambda x, w: jaxent.EmpiricalRisk().update(x, w).psum("data").mean()  # noqa: E731
    sharded = jax.shard_map(over, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    close(jax.jit(jax.grad(sharded, 1))(losses, w), want)


LOSSES: dict[str, tuple[Call, np.ndarray]] = {
    "softmax_cross_entropy": (lambda w, **o: jaxent.softmax_cross_entropy(Z, Y, weights=w, **o), ref.nll(Z, Y)),
    "probabilities": (
        lambda w, **o: jaxent.softmax_cross_entropy(Z, ref.onehot(Y, 8).astype(np.float32), weights=w, **o),
        ref.nll(Z, Y),
    ),
    "smoothed": (
        lambda w, **o: jaxent.softmax_cross_entropy(Z, Y, weights=w, label_smoothing=0.5, **o),
        0.5 * ref.nll(Z, Y) - 0.5 * ref.log_softmax(Z).mean(-1),
    ),
    "z_loss": (
        lambda w, **o: jaxent.softmax_cross_entropy(Z, Y, weights=w, z_loss=0.5, **o),
        ref.nll(Z, Y) + 0.5 * np.log(np.exp(ref.wide(Z)).sum(-1)) ** 2,
    ),
    "nll_loss": (lambda w, **o: jaxent.nll_loss(-np.abs(Z), Y, weights=w, **o), np.abs(Z)[range(4), Y]),
    "sigmoid_cross_entropy": (
        lambda w, **o: jaxent.sigmoid_cross_entropy(Z[:, 0], T[:, 0], weights=w, **o),
        ref.sigmoid_nll(Z[:, 0], T[:, 0]),
    ),
    "linear_softmax_cross_entropy": (
        lambda w, **o: jaxent.linear_softmax_cross_entropy(H, W, Y, weights=w, chunk_rows=3, **o),
        ref.nll(Z, Y),
    ),
    "linear_kl_divergence": (
        lambda w, **o: jaxent.linear_kl_divergence(H, W, H, 2 * W, weights=w, **o),
        ref.kl(Z, 2 * Z),
    ),
    "linear_loss": (
        lambda w, **o: jaxent.linear_loss(
            lambda z, y: jaxent.softmax_cross_entropy(z, y, reduction="none"), H, W, Y, weights=w, **o
        ),
        ref.nll(Z, Y),
    ),
}


@pytest.mark.parametrize(("name", "mode"), covering(LOSSES, ["jit", "eager"]))
def test_signed_weights(name: str, mode: str) -> None:
    """Advantages and unlikelihood: a negative weight turns the sign of its row."""
    f, rows = LOSSES[name]

    def everything(w: Any) -> Any:
        reduced = {r: f(w, reduction=r) for r in ("mean", "sum", "none", "sum_and_weight")}
        return reduced, jax.value_and_grad(lambda w: f(w, denominator=DIVISOR))(w)

    run = everything if mode == "eager" else jax.jit(everything)
    for signed in (SIGNED, -np.abs(SIGNED)):
        w = ref.wide(signed)
        reduced, (divided, slope) = run(signed)
        close(reduced["mean"], (w * rows).sum() / w.sum(), rtol=3e-5)
        close(reduced["sum"], (w * rows).sum())
        close(reduced["none"], w * rows)
        pair = reduced["sum_and_weight"]
        close((pair.total, pair.weight), ((w * rows).sum(), w.sum()))
        close(divided, (w * rows).sum() / DIVISOR)
        close(slope, rows / DIVISOR)


@pytest.mark.parametrize("mode", ["grad", "jit", "jacfwd", "vmap", "closed form"])
def test_gradients_under_signed_weights(mode: str) -> None:
    want = (ref.softmax(Z) - ref.onehot(Y, 8)) * ref.wide(SIGNED)[:, None] / DIVISOR

    def f(z: jax.Array) -> jax.Array:
        return jaxent.softmax_cross_entropy(z, Y, weights=SIGNED, denominator=DIVISOR)

    z = jnp.asarray(Z)
    if mode == "closed form":
        close(jaxent.softmax_cross_entropy_gradient(z, Y, weights=SIGNED, denominator=DIVISOR), want)
    elif mode == "vmap":
        close(jax.vmap(jax.grad(f))(z[None])[0], want)
    else:
        derivative: Call = jax.jacfwd if mode == "jacfwd" else jax.grad
        close((jax.jit(derivative(f)) if mode == "jit" else derivative(f))(z), want)
        v = jnp.ones_like(z).at[:, 0].set(3)
        product = jax.jvp(jax.grad(f), (z,), (v,))[1]
        close(product, ref.hessian_product(Z, v) * ref.wide(SIGNED)[:, None] / DIVISOR)


def test_linear_gradients_under_signed_weights() -> None:
    dz = (ref.softmax(Z) - ref.onehot(Y, 8)) * ref.wide(SIGNED)[:, None]
    f = lambda h, w: jaxent.linear_softmax_cross_entropy(h, w, Y, weights=SIGNED, reduction="sum")  # noqa: E731
    gh, gw = jax.grad(f, (0, 1))(H, W)
    close(gh, dz @ W.T)
    close(gw, H.T @ dz)
    norms = jaxent.linear_gradient_norms(H, W, Y, weights=SIGNED)
    close(norms.residual, np.linalg.norm(dz, axis=-1))
    close(norms.kernel, np.linalg.norm(dz, axis=-1) * np.linalg.norm(H, axis=-1))
    product = jaxent.linear_ggn_vector_product(H, W, (H, None), weights=SIGNED, reduction="sum")[0]
    close(product, (ref.hessian_product(Z, Z) * ref.wide(SIGNED)[:, None]) @ W.T)
    product = jaxent.ggn_vector_product(lambda z: z, Z, Z, weights=SIGNED, denominator=DIVISOR)
    close(product, ref.hessian_product(Z, Z) * ref.wide(SIGNED)[:, None] / DIVISOR)


def test_signed_weights_over_devices_and_in_half_precision() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)

    def f(h: jax.Array, w: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
        options = {"weights": weights, "vocab_axis": "vocab", "reduction": "sum_and_weight"}
        return jax.lax.psum(jaxent.linear_softmax_cross_entropy(h, w, y, **options).total, "data")

    specs = P("data"), P(None, "vocab"), P("data"), P("data")
    got = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P()))(H, W, Y, SIGNED)
    close(got, (SIGNED * ref.nll(Z, Y)).sum())
    for dtype in (jnp.bfloat16, jnp.float16):
        z = jnp.asarray(Z, dtype)
        got = jaxent.softmax_cross_entropy(z, Y, weights=jnp.asarray(SIGNED, dtype), denominator=1.0)
        close(got, (SIGNED * ref.nll(z, Y)).sum())


def test_a_risk_with_signed_weights() -> None:
    losses, w = jnp.array([1.0, 5.0, jnp.nan]), jnp.array([3.0, -1.0, 0.0])
    total = jaxent.EmpiricalRisk().update(losses, w)
    close((total.total, total.weight, total.mean()), (-2, 2, -1))
    close(jax.grad(lambda x: jaxent.EmpiricalRisk().update(x, w).mean())(losses), [1.5, -0.5, 0])
    many = jaxent.EmpiricalRisk().update(jnp.ones(1000), jnp.where(jnp.arange(1000) % 2 == 0, 1.0, -0.5))
    close(many.total, 250)


def test_nan_weights_stay_nan_and_dropped_rows_stay_0() -> None:
    w = np.array([np.nan, -1, 1, 1], np.float32)
    rows = jaxent.softmax_cross_entropy(Z, Y, weights=w, reduction="none")
    assert np.array_equal(np.isnan(rows), [True, False, False, False])
    ignored = jaxent.softmax_cross_entropy(Z, np.array([3, -100, 7, 2]), weights=-np.ones(4, np.float32))
    close(ignored, ref.nll(Z, Y)[[0, 2, 3]].mean())


def test_diagnose_mentions_negative_weights() -> None:
    assert any("negative" in str(finding) for finding in jaxent.diagnose(Z, Y, weights=SIGNED))


# ----------------------------------------------------------------------------------------------------------------------
# Binary targets outside [0, 1]

BAD = [2.0, 255.0, -1.0, 1.5, -0.25, np.nan, np.inf]


@pytest.mark.parametrize("options", [{}, {"pos_weight": 2.0}, {"weights": np.full(4, 0.5, np.float32)}], ids=str)
def test_a_binary_target_out_of_range_is_nan(options: dict[str, Any]) -> None:
    dropped = {"where": np.array([1, 0, 1, 1], bool)}

    @jax.jit
    def everything(z: jax.Array, t: jax.Array) -> Any:
        f = lambda z, **o: jaxent.sigmoid_cross_entropy(z, t, **options, **o)  # noqa: E731
        total, kept = (jax.value_and_grad(lambda z, o=o: f(z, reduction="sum", **o))(z) for o in ({}, dropped))
        return f(z), f(z, reduction="none"), total, kept

    z = jnp.array([0.5, -1.0, 2.0, 0.0])
    for bad in BAD:
        t = np.array([0.0, bad, 1.0, 0.25], np.float32)
        mean, rows, (total, gradient), (kept, slope) = everything(z, t)
        assert np.isnan(mean), bad
        assert np.isnan(total), bad
        want = ref.sigmoid_nll(z, np.where(np.arange(4) == 1, 0, t), options.get("pos_weight", 1.0))
        want *= options.get("weights", 1.0)
        want[1] = np.nan
        close(rows, want)
        assert np.array_equal(np.isnan(gradient), [False, True, False, False]), bad
        close(kept, np.nansum(want))
        close(slope[1], 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64])
def test_a_mask_of_0_and_255(dtype: Any) -> None:
    bad = -1 if dtype == np.int8 else 255
    rows = jaxent.sigmoid_cross_entropy(np.ones(3, np.float32), np.array([0, bad, 1], dtype), reduction="none")
    assert np.array_equal(np.isnan(rows), [False, True, False])


def test_weight_0_silences_a_bad_target() -> None:
    z, t, w = jnp.array([0.5, 1.0]), jnp.array([1.0, 255.0]), jnp.array([1.0, 0.0])
    value, gradient = jax.value_and_grad(lambda z: jaxent.sigmoid_cross_entropy(z, t, weights=w))(z)
    close(value, ref.softplus(-0.5))
    close(gradient, [-1 / (1 + np.exp(0.5)), 0])


def test_0_and_1_are_valid_targets() -> None:
    z, t = jnp.array([0.5, 1.0, -2.0]), jnp.array([0.0, 1.0, 0.5])
    close(jaxent.sigmoid_cross_entropy(z, t, reduction="none"), ref.sigmoid_nll(z, t))
    close(jaxent.sigmoid_cross_entropy(z, t > 0.25, reduction="none"), ref.sigmoid_nll(z, t > 0.25))
    close(jax.grad(lambda t: jaxent.sigmoid_cross_entropy(z, t, reduction="sum"))(t), -z)


def test_a_bad_binary_target_is_found() -> None:
    z, mask = np.ones((2, 3), np.float32), np.array([[0, 255, 0], [255, 0, 0]], np.uint8)
    findings = jaxent.diagnose(z, mask)
    assert any("255" in str(finding) for finding in findings), findings
    assert jaxent.diagnose(z, mask // 255) == []
    run = checkify.checkify(jax.jit(jaxent.checked(jaxent.sigmoid_cross_entropy)))
    message = run(z, mask)[0].get()
    assert message is not None
    assert "255" in message
    assert run(z, mask // 255)[0].get() is None
