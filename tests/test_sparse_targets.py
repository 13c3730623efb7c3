"""Targets of a few classes per row: as the same probabilities spread over the vocabulary, without spreading them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import run
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent import SparseTargets

softmax_cross_entropy: Any = jaxent.softmax_cross_entropy
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
softmax_cross_entropy_gradient: Any = jaxent.softmax_cross_entropy_gradient

ROWS, FEATURES, CLASSES, K = 12, 5, 16, 3  # more than eight classes per row take another way


def problem(rng: np.random.Generator, rows: int = ROWS, k: int = K) -> dict[str, Any]:
    chosen = rng.integers(0, CLASSES, (rows, k)).astype(np.int32)
    chosen[0, :2] = 7  # one class twice
    chosen[1, 1], chosen[2] = -100, -100  # an entry without a class, and a row without one
    return {
        "z": rng.normal(size=(rows, CLASSES)).astype(np.float32) * 3,
        "h": rng.normal(size=(rows, FEATURES)).astype(np.float32),
        "w": rng.normal(size=(FEATURES, CLASSES)).astype(np.float32),
        "chosen": chosen,
        "shares": rng.uniform(0.1, 1, (rows, k)).astype(np.float32),
        "c": rng.uniform(0.5, 2, CLASSES).astype(np.float32),
        "weights": rng.uniform(0.5, 2, rows).astype(np.float32),
    }


def formula(z: Any, chosen: Any, shares: Any, c: Any = 1.0, e: float = 0.0, zeta: float = 0.0) -> Any:
    """Losses per row, their gradients with respect to the logits, and which rows count, in float64."""
    z = z.astype(np.float64)
    t = np.zeros_like(z)
    entries = chosen >= 0
    np.add.at(t, (np.nonzero(entries)[0], chosen[entries]), shares[entries])
    kept = (chosen >= 0).any(-1)
    s = c * ((1 - e) * t + e / z.shape[1])
    lse = np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1)
    losses = (s * (lse[:, None] - z)).sum(-1) + zeta * lse**2
    p = np.exp(z - lse[:, None])
    slopes = s.sum(-1, keepdims=True) * p - s + 2 * zeta * lse[:, None] * p
    return np.where(kept, losses, 0), np.where(kept[:, None], slopes, 0), kept


OPTIONS = [{}, {"label_smoothing": 0.2}, {"class_weights": True, "z_loss": 0.1, "label_smoothing": 0.2}]


@pytest.mark.parametrize(("k", "options"), [(K, OPTIONS[0]), (11, OPTIONS[1]), (K, OPTIONS[2]), (11, OPTIONS[2])])
def test_loss_and_gradient_are_those_of_the_formula(options: dict[str, Any], k: int, rng: np.random.Generator):
    x = problem(rng, k=k)
    named = {k: x["c"] if k == "class_weights" else v for k, v in options.items()}
    want, slopes, _ = formula(
        x["z"],
        x["chosen"],
        x["shares"],
        named.get("class_weights", 1.0),
        named.get("label_smoothing", 0.0),
        named.get("z_loss", 0.0),
    )

    def total(z: Any, shares: Any) -> Any:
        losses = softmax_cross_entropy(z, SparseTargets(x["chosen"], shares), reduction="none", **named)
        return jnp.sum(losses), losses

    (_, losses), by_z = jax.jit(jax.value_and_grad(total, has_aux=True))(x["z"], x["shares"])
    np.testing.assert_allclose(losses, want, rtol=2e-6)
    np.testing.assert_allclose(by_z, slopes, rtol=1e-5, atol=2e-6)
    closed = softmax_cross_entropy_gradient(x["z"], SparseTargets(x["chosen"], x["shares"]), reduction="sum", **named)
    np.testing.assert_allclose(closed, slopes, rtol=1e-5, atol=2e-6)


def test_the_mean_divides_by_the_weights_of_the_rows_that_count(rng: np.random.Generator):
    x = problem(rng)
    losses, _, kept = formula(x["z"], x["chosen"], x["shares"])
    got = softmax_cross_entropy(x["z"], SparseTargets(x["chosen"], x["shares"]), weights=x["weights"])
    np.testing.assert_allclose(got, (losses * x["weights"]).sum() / (x["weights"] * kept).sum(), rtol=1e-6)


@pytest.mark.grid
def test_every_derivative_is_that_of_probabilities(rng: np.random.Generator):
    """With respect to shares, class weights and smoothing, and of second order, in both modes."""
    x = problem(rng, rows=4)
    onehot = (x["chosen"][..., None] == np.arange(CLASSES)).astype(np.float32)

    def sparse(z: Any, shares: Any, c: Any, e: Any) -> Any:
        return softmax_cross_entropy(z, SparseTargets(x["chosen"], shares), class_weights=c, label_smoothing=e)

    def dense(z: Any, shares: Any, c: Any, e: Any) -> Any:
        t = jnp.einsum("nk,nkc->nc", shares, onehot)
        return softmax_cross_entropy(z, t, where=(x["chosen"] >= 0).any(-1), class_weights=c, label_smoothing=e)

    args = x["z"], x["shares"], x["c"], np.float32(0.1)
    every = (0, 1, 2, 3)
    for f in (jax.grad, jax.jacfwd):
        got, want = (jax.jit(f(loss, every))(*args) for loss in (sparse, dense))
        kept = x["chosen"] >= 0
        np.testing.assert_allclose(got[1], np.where(kept, want[1], 0), rtol=1e-4, atol=1e-6)
        for a, b in zip((got[0], *got[2:]), (want[0], *want[2:]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    got, want = (jax.jit(jax.hessian(loss))(*args) for loss in (sparse, dense))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_edges():
    z = jnp.array([[0.0, -jnp.inf, -20.0, -25.0]])

    def loss(chosen: list[int], shares: list[float], z: Any = z) -> Any:
        return softmax_cross_entropy(z, SparseTargets(jnp.array([chosen]), jnp.array([shares])))

    tiny = np.log1p(np.exp(-20.0) + np.exp(-25.0))
    np.testing.assert_allclose(loss([0, -100], [1.0, 5.0]), tiny, rtol=1e-6)  # relative accuracy
    by_z = jax.grad(lambda z: loss([0, -100], [1.0, 5.0], z))(z)
    np.testing.assert_allclose(by_z[0, 0], -tiny, rtol=1e-5)
    assert loss([0, 1], [0.5, 0.5]) == np.inf  # mass on a removed class
    np.testing.assert_allclose(loss([0, 1], [1.0, 0.0]), tiny, rtol=1e-6)  # none on it: as if it were not named
    assert np.isnan(loss([0, 4], [0.5, 0.0]))  # outside the vocabulary
    assert np.isnan(jax.grad(lambda z: loss([0, -1], [0.5, 0.5], z))(z)).all()
    assert loss([-100, -100], [jnp.nan, 1.0]) == 0
    assert not np.any(jax.grad(lambda z: loss([-100, -100], [1.0, 1.0], z))(jnp.full((1, 4), jnp.nan)))


def test_the_axis_of_the_classes(rng: np.random.Generator):
    x = problem(rng)
    targets = SparseTargets(x["chosen"].reshape(3, 4, K), x["shares"].reshape(3, 4, K))
    z = np.moveaxis(x["z"].reshape(3, 4, CLASSES), -1, 1)
    want, _, _ = formula(x["z"], x["chosen"], x["shares"])
    got = softmax_cross_entropy(z, targets, axis=1, reduction="none")
    np.testing.assert_allclose(got, want.reshape(3, 4), rtol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_hidden_states(reduction: str, rng: np.random.Generator):
    x = problem(rng)
    targets = SparseTargets(x["chosen"], x["shares"])
    options = {"label_smoothing": 0.1, "class_weights": x["c"], "reduction": reduction}

    def linear(h: Any, w: Any) -> Any:
        return jnp.sum(linear_softmax_cross_entropy(h, w, targets, chunk_rows=5, **options))

    def dense(h: Any, w: Any) -> Any:
        return jnp.sum(softmax_cross_entropy(jnp.dot(h, w, precision="highest"), targets, **options))

    def everything(loss: Any) -> Any:
        gradient = jax.value_and_grad(loss, (0, 1))
        return jax.jit(lambda h, w: jax.jvp(gradient, (h, w), (h, w)))(x["h"], x["w"])

    for a, b in zip(jax.tree.leaves(everything(linear)), jax.tree.leaves(everything(dense)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.grid
@pytest.mark.compiled
def test_temporaries_do_not_grow_with_the_number_of_classes_named():
    def temporaries(k: int) -> int:
        like = [((256, 8192), jnp.float32), ((256, k), jnp.int32), ((256, k), jnp.float32)]
        like = [jax.ShapeDtypeStruct(*each) for each in like]
        step = jax.value_and_grad(lambda z, chosen, shares: softmax_cross_entropy(z, SparseTargets(chosen, shares)))
        analysis: Any = jax.jit(step).lower(*like).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    rows = 256 * 8192 * 4  # bytes of the logits; beyond eight classes the spread row is held once
    assert temporaries(8) < 4 * rows
    assert temporaries(64) - temporaries(8) < 2.1 * rows  # jax 0.12 copies it once
    assert temporaries(64) - temporaries(16) < rows / 100 + 256 * 64 * 40


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["automatic", "explicit", "manual"])
def test_over_devices(kind: str, rng: np.random.Generator):
    x = problem(rng, rows=16, k=11 if kind == "explicit" else K)
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=types)
    specs = P("data"), P(None, "vocab"), P("vocab"), P("data"), P("data")
    args = x["h"], x["w"], x["c"], x["chosen"], x["shares"]

    def loss(h: Any, w: Any, c: Any, chosen: Any, shares: Any, **options: Any) -> Any:
        return linear_softmax_cross_entropy(
            h, w, SparseTargets(chosen, shares), class_weights=c, chunk_rows=3, **options
        )

    def part(*args: Any) -> Any:
        return jax.lax.psum(loss(*args, vocab_axis="vocab", reduction="sum_and_weight"), "data").mean()

    spread = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P()) if kind == "manual" else loss
    want = run(jax.value_and_grad(loss, (0, 1, 2, 4)), *args)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
        got = run(jax.value_and_grad(spread, (0, 1, 2, 4)), *split)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bad_input():
    z, chosen, shares = np.zeros((2, 4), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)
    name = r"jaxent\.softmax_cross_entropy: `targets\."
    with pytest.raises(ValueError, match=name + r"classes` must have shape \(2, 'k'\)"):
        softmax_cross_entropy(z, SparseTargets(chosen[:1], shares[:1]))
    with pytest.raises(ValueError, match=name + r"probabilities` must have shape \(2, 3\)"):
        softmax_cross_entropy(z, SparseTargets(chosen, shares[:, :2]))
    with pytest.raises(TypeError, match=name + "classes` must have an integer dtype"):
        softmax_cross_entropy(z, SparseTargets(shares, shares))
    with pytest.raises(TypeError, match=name + "probabilities` must have a floating dtype"):
        softmax_cross_entropy(z, SparseTargets(chosen, chosen))
