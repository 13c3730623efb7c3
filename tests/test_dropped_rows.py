"""Rows that do not count: neither multiplied nor held, and without influence under every transformation and mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import both, covering, norm2, run, stacked
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent._engine import chunking, linear_head, row_blocks
from jaxent._engine.chunking import Chunking

# Untyped: what is returned depends on `reduction`.
linear: Any = jaxent.linear_softmax_cross_entropy
dense: Any = jaxent.softmax_cross_entropy

pytestmark = pytest.mark.usefixtures("one_device")

LABELS = np.array([0, -100, 2, 1, -100, -100, 1], np.int32)
WEIGHTS = np.array([1.0, 0.5, 0.0, 0.25, 1.0, 2.0, 1.0])
OPTIONS = {"label_smoothing": 0.125, "z_loss": 0.25}
Loss = Callable[..., Any]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "mean": (
        lambda h, w, **k: linear(h, w, LABELS, chunk_rows=2, **OPTIONS, **k),
        lambda h, w, **k: dense(h @ w, LABELS, **OPTIONS, **k),
    ),
    "none": (
        lambda h, w, **k: jnp.sum(linear(h, w, LABELS, chunk_rows=2, reduction="none", **k) ** 2),
        lambda h, w, **k: jnp.sum(dense(h @ w, LABELS, reduction="none", **k) ** 2),
    ),
}


LOSSES["mean, first chunk apart"] = LOSSES["mean"]


def set_first_chunk_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs."""

    def chunking_of(*args: Any) -> Chunking:
        return dataclasses.replace(chunking.chunking_of(*args), first_apart=True)

    monkeypatch.setattr(linear_head, "chunking_of", chunking_of)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "value": lambda f, h, w: f(h, w),
    "value_and_grad": lambda f, h, w: jax.value_and_grad(f, argnums=(0, 1))(h, w),
    "jvp": lambda f, h, w: jax.jvp(f, (h, w), (w.sum() * h, w + 1)),
    "hessian": lambda f, h, w: jax.hessian(f, argnums=(0, 1))(h, w),
    "grad of grad": lambda f, h, w: both(lambda h, w: norm2(both(f)(h, w)))(h, w),
    "third order": lambda f, h, w: jax.jvp(
        lambda w: jax.jvp(lambda w: jax.grad(f, argnums=1)(h, w), (w,), (w + 1,))[1], (w,), (w - 1,)
    ),
    "grad of vmap": lambda f, h, w: both(lambda h, w: norm2(jax.vmap(f, (0, None))(stacked(h), w)))(h, w),
    "vmap of grad": lambda f, h, w: jax.vmap(both(f))(stacked(h), stacked(w)),
    "by weights": lambda f, h, w: jax.grad(lambda k: f(h, w, weights=k))(WEIGHTS),
    "with weights": lambda f, h, w: both(lambda h, w: f(h, w, weights=WEIGHTS))(h, w),
    # A weight of 0 that is learnt through a step of the parameters (Ren et al., 2018).
    "by the weights of a gradient": lambda f, h, w: jax.grad(
        lambda k: norm2(w - jax.grad(lambda w: f(h, w, weights=k))(w))
    )(WEIGHTS),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("transform", "loss"), covering(TRANSFORMS, LOSSES))
def test_transforms(loss: str, transform: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    if "apart" in loss:
        set_first_chunk_apart(monkeypatch)
    h, w = rng.normal(size=(7, 2)), rng.normal(size=(2, 3))
    got, want = (run(functools.partial(TRANSFORMS[transform], f), h, w) for f in LOSSES[loss])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk_rows", [256, 512, 4])
def test_the_loop_takes_as_many_chunks_as_the_rows_fill(chunk_rows: int, rng: np.random.Generator):
    """Every row that counts once, the others never, and little more work than they are."""
    layout = Chunking(600, chunk_rows, strided=False, first_apart=chunk_rows != 512)
    numbers = jnp.arange(600, dtype=jnp.int32)

    def step(carry: Any, rows: jax.Array, valid: jax.Array | None) -> Any:
        seen, work = carry
        assert valid is not None
        return (seen.at[rows].add(valid.astype(jnp.int32)), work + len(rows)), (rows, rows.astype(jnp.float32))

    start = jnp.zeros(600, jnp.int32), jnp.zeros((), jnp.int32)
    loop = jax.jit(lambda kept: layout.loop(step, start, numbers, kept))
    for kept in (0, 1, 31, 256, 257, 300, 420, 513, 599, 600):
        mask = rng.permutation(np.arange(600) < kept)
        (seen, work), (integers, floats) = loop(mask)
        np.testing.assert_array_equal(seen, mask, f"{kept} rows")
        np.testing.assert_array_equal(integers, np.where(mask, numbers, -1), f"{kept} rows")
        np.testing.assert_array_equal(floats, np.where(mask, numbers, 0), f"{kept} rows")
        assert kept <= int(work) < kept + max(0.5 * chunk_rows, 4), (kept, work)


def heads(rng: np.random.Generator, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, kernel and labels, where the hidden states of dropped rows are nan."""
    h, w = rng.normal(size=(len(dropped), 3)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    return np.where(dropped[:, None], np.nan, h).astype(np.float32), w, rng.integers(0, 8, len(dropped))


# Calls of (hidden, kernel, labels, where) with per-row results first, and of hidden and kernel with sums.
CALLS: dict[str, Callable[..., Any]] = {
    "mean": lambda h, w, y, where: linear(h, w, y, where=where, chunk_rows=4),
    "none": lambda h, w, y, where: linear(h, w, y, where=where, chunk_rows=4, reduction="none"),
    "divergence": lambda h, w, y, where: jaxent.linear_kl_divergence(h, w, 2 * h, w, where=where, chunk_rows=4),
    "norms": lambda h, w, y, where: jaxent.linear_gradient_norms(h, w, y, where=where, chunk_rows=4),
    "gauss-newton": lambda h, w, y, where: jaxent.linear_ggn_vector_product(
        h, w, (None, jnp.ones_like(w)), targets=y, where=where, chunk_rows=4
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_dropped_rows_have_no_influence(call: str, rng: np.random.Generator):
    dropped = np.arange(13) % 3 != 0
    h, w, y = heads(rng, dropped)

    def total(h: Any, w: Any, y: Any, where: Any) -> Any:
        out = CALLS[call](h, w, y, where)
        return sum((jnp.sum(x * jnp.cos(x)) for x in jax.tree.leaves(out)), jnp.zeros(())), out

    f = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, got), (by_hidden, by_kernel) = run(f, h, w, y, ~dropped)
    (_, want), (hidden_want, kernel_want) = run(f, h[~dropped], w, y[~dropped], np.ones(5, bool))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if a.shape != b.shape:
            np.testing.assert_array_equal(a[dropped], 0)
            a = a[~dropped]
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(by_hidden[dropped], 0)
    np.testing.assert_allclose(by_hidden[~dropped], hidden_want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_kernel, kernel_want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("reduction", "apart", "kind"),
    [
        *(("mean", True, "explicit"), ("mean", True, "manual"), ("mean", False, "explicit"), ("none", False, "manual")),
        *(
            pytest.param(reduction, False, kind, marks=pytest.mark.slow)
            for reduction, kind in (("mean", "manual"), ("none", "explicit"))
        ),
    ],
)
def test_each_device_skips_its_own_rows(
    reduction: str, apart: bool, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """One device has no row that counts, the other all; the peers of the vocabulary axis agree."""
    if apart:
        set_first_chunk_apart(monkeypatch)
    where = np.arange(16) >= 8
    where[9] = False
    h, w, y = heads(rng, ~where)
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), devices=jax.devices()[:4])

    def loss(h: Any, w: Any, y: Any, where: Any, vocab_axis: str | None = None) -> Any:
        kind = "none" if reduction == "none" else "sum_and_weight"
        out = linear(h, w, y, where=where, chunk_rows=2, vocab_axis=vocab_axis, reduction=kind)
        out = jnp.sum(out**2) if reduction == "none" else out
        out = out if vocab_axis is None else jax.lax.psum(out, "data")
        return out if reduction == "none" else out.mean()

    want = run(jax.value_and_grad(loss, argnums=(0, 1)), h, w, y, where)
    specs = (P("data"), P(None, "vocab"), P("data"), P("data"))
    args = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((h, w, y, where), specs, strict=True)]
    with jax.set_mesh(mesh):
        spread: Any = loss
        if kind == "manual":
            spread = jax.shard_map(functools.partial(loss, vocab_axis="vocab"), in_specs=specs, out_specs=P())
        got = run(jax.value_and_grad(spread, argnums=(0, 1)), *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("targets", ["labels", "probabilities"])
def test_a_chunk_in_blocks_of_rows(targets: str, rng: np.random.Generator, monkeypatch: Any):
    """What the CPU does with large chunks, at small ones: every result and gradient as without blocks."""
    h, w = rng.normal(size=(32, 3)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    y: Any = rng.integers(0, 8, 32)
    if targets == "probabilities":
        y = jax.nn.softmax(jnp.asarray(rng.normal(size=(32, 8)))).astype(jnp.bfloat16)
    where, cap = rng.random(32) < 0.7, np.float32(3.0)

    def every(h: Any, w: Any, b: Any, cap: Any, y: Any) -> Any:
        options = {"bias": b, "soft_cap": cap, "where": where, "chunk_rows": 16}
        mean, statistics = linear(h, w, y, label_smoothing=0.1, z_loss=0.1, with_statistics=True, **options)
        rows = linear(h, w, y, reduction="none", **options), jaxent.linear_gradient_norms(h, w, y, **options)
        own = jaxent.linear_loss(lambda z, y: jnp.sum(z * y, axis=-1), h, w, h[:, :1], **options)
        return mean + own, (statistics, rows)

    def results(scale: float) -> Any:
        arguments = scale * h, w, np.ones(8, np.float32), cap, y
        by = (0, 1, 2, 3, 4) if targets == "probabilities" else (0, 1, 2, 3)
        return jax.jit(lambda *a: jax.value_and_grad(every, argnums=by, has_aux=True)(*a))(*arguments)

    want = results(1.0)
    monkeypatch.setattr(row_blocks, "LEAST_LOGITS", 1)
    jax.clear_caches()
    text = str(jax.make_jaxpr(every)(h, w, np.ones(8, np.float32), cap, y))
    assert "f32[2,8]" in text
    for a, b in zip(jax.tree.leaves(results(1.0)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-5, atol=2e-6)
    jax.clear_caches()


def directional(f: Any) -> Any:
    return lambda w: jnp.vdot(jax.grad(f)(w), jnp.cos(w))


@pytest.mark.grid
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f: lambda w: jax.jvp(jax.grad(f), (w,), (jnp.cos(w),))[1],
        lambda f: jax.grad(directional(directional(f))),
        lambda f: lambda w: jax.jvp(jax.grad(directional(f)), (w,), (jnp.cos(w),))[1],
    ],
    ids=["Hessian product", "third by reverse mode", "jvp of reverse over reverse"],
)
def test_derivatives_of_a_chunk_in_blocks_of_rows(derivative: Any, rng: np.random.Generator, monkeypatch: Any):
    h, w, y = rng.normal(size=(32, 3)), rng.normal(size=(3, 8)), rng.integers(0, 8, 32)

    def loss(w: Any) -> Any:
        options = {"soft_cap": w[0, 0] + 5, "where": y != 3, "weights": jnp.exp(w[0, y]), "chunk_rows": 16}
        value, statistics = linear(h, w, y, label_smoothing=0.1, z_loss=0.1, with_statistics=True, **options)
        return value + jnp.sum(statistics.entropy) * w[0, 0]

    with jax.enable_x64(True):
        want = jax.jit(derivative(loss))(w)
        monkeypatch.setattr(row_blocks, "LEAST_LOGITS", 1)
        jax.clear_caches()
        np.testing.assert_allclose(jax.jit(derivative(loss))(w), want, rtol=1e-9, atol=1e-10)
    jax.clear_caches()
