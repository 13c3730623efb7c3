"""The user's own functions of rows: options of `linear_loss`, results of `linear_rows`, and one pass that tells all."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
from cases import covering, run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_linear_costs import counted

import jaxent

linear: Any = jaxent.linear_softmax_cross_entropy
linear_loss: Any = jaxent.linear_loss
linear_rows: Any = jaxent.linear_rows


def nll(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def with_accuracy(logits: jax.Array, labels: jax.Array) -> Any:
    return nll(logits, labels), {"right": jnp.argmax(logits, axis=-1) == labels, "best": jnp.argmax(logits, axis=-1)}


def draw(rng: np.random.Generator, rows: int = 13) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hidden, kernel = rng.normal(size=(rows, 3)), rng.normal(size=(3, 7))
    return hidden.astype(np.float32), kernel.astype(np.float32), rng.integers(0, 7, rows).astype(np.int32)


@pytest.mark.grid
@pytest.mark.parametrize(("reduction", "devices"), covering(["mean", "sum", "none", "sum_and_weight"], [1, 8]))
def test_options_of_a_row_loss(reduction: str, devices: int, rng: np.random.Generator, monkeypatch: Any):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    hidden, kernel, labels = draw(rng)
    where, weights = np.arange(13) % 3 != 1, (np.arange(13) % 4 / 2).astype(np.float32)
    hidden[1], labels[4] = np.nan, 99
    options: dict[str, Any] = {"where": where, "soft_cap": 2.0, "temperature": 0.5, "chunk_rows": 4}
    if reduction == "mean":
        options["denominator"] = 3.0

    def total(loss: Any, hidden: Any, kernel: Any, weights: Any) -> Any:
        out = loss(hidden, kernel, labels, weights=weights, reduction=reduction, **options)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(out))

    by = (0, 1, 2) if reduction in ("sum", "none") else (0, 1)
    own, built_in = (
        run(jax.value_and_grad(functools.partial(total, f), argnums=by), hidden, kernel, weights)
        for f in (functools.partial(linear_loss, nll), linear)
    )
    for got, want in zip(jax.tree.leaves(own), jax.tree.leaves(built_in), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_auxiliary_results_of_a_row_loss(rng: np.random.Generator):
    hidden, kernel, labels = draw(rng, 12)
    where = np.arange(12) != 5

    def loss(hidden: Any, kernel: Any) -> Any:
        batch = hidden.reshape(3, 4, 3), kernel, labels.reshape(3, 4)
        return linear_loss(with_accuracy, *batch, where=where.reshape(3, 4), has_aux=True, chunk_rows=4)

    f = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (value, aux), gradients = jax.jit(f)(hidden, kernel)
    want = run(jax.value_and_grad(lambda h, w: linear(h, w, labels, where=where), argnums=(0, 1)), hidden, kernel)
    for a, b in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    best = np.argmax(hidden @ kernel, axis=-1)
    np.testing.assert_array_equal(aux["best"], np.where(where, best, -1).reshape(3, 4))
    np.testing.assert_array_equal(aux["right"], ((best == labels) & where).reshape(3, 4))
    assert counted(f, hidden, kernel) / (12 * 3 * 7) < 3.01


@pytest.mark.parametrize("wrong", [nll, lambda z, y: (nll(z, y), jnp.ones(3))])
def test_wrong_results_of_a_row_loss_with_aux(wrong: Any, rng: np.random.Generator):
    with pytest.raises((TypeError, ValueError), match=r"jaxent\.linear_loss: `row_loss` must return"):
        linear_loss(wrong, *draw(rng), has_aux=True)


def test_an_eager_call_compiles_once(rng: np.random.Generator):
    arguments, scale = draw(rng), np.float32(2)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for f in (nll, lambda z, y: scale * nll(z, y), lambda z, y: nll(jax.nn.relu(z), y)):
        linear_loss(f, *arguments, chunk_rows=4)
        before = len(compiled)
        assert before
        for _ in range(2):
            linear_loss(f, *arguments, chunk_rows=4)
        assert len(compiled) == before

    # Another closure of the same lines, and the same function with another value behind it, are other functions.
    def times(factor: float) -> Any:
        return lambda z, y: factor * nll(z, y)

    double, triple = (linear_loss(times(factor), *arguments) for factor in (2.0, 3.0))
    np.testing.assert_allclose(triple / double, 1.5, rtol=1e-6)
    factor = 2.0

    def scaled(z: Any, y: Any) -> Any:
        return factor * nll(z, y)

    first = linear_loss(scaled, *arguments)
    factor = 4.0
    np.testing.assert_allclose(linear_loss(scaled, *arguments) / first, 2, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Results per row


def gumbel(logits: jax.Array, keys: jax.Array) -> jax.Array:
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + noise, axis=-1)


@pytest.mark.grid
def test_labels_drawn_from_the_head():
    hidden, kernel = np.ones((4096, 1), np.float32), np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    keys = jax.random.split(jax.random.key(3), 4096)
    drawn = [linear_rows(gumbel, hidden, kernel, keys, chunk_rows=rows) for rows in (4096, 1000, 64)]
    for other in drawn[1:]:
        np.testing.assert_array_equal(drawn[0], other)
    counts, expected = np.bincount(drawn[0], minlength=4), 4096 * np.array([0.5, 0.25, 0.125, 0.125])
    assert np.sum((counts - expected) ** 2 / expected) < 16.3  # chi-squared of three degrees of freedom, 1 in 1000


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.usefixtures("one_device")
def test_log_probabilities_over_a_kept_set(dtype: Any, rng: np.random.Generator):
    hidden, kernel, labels = draw(rng)
    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    kept = np.arange(7) != 3
    labels = np.where(labels == 3, 0, labels)

    def renormalised(logits: jax.Array, labels: jax.Array, kept: jax.Array) -> jax.Array:
        return -nll(jnp.where(kept, logits, -jnp.inf), labels)

    where = np.arange(13) % 2 == 0
    rows = lambda h, w: linear_rows(renormalised, h, w, labels, params=kept, where=where, chunk_rows=4)  # noqa: E731
    z = hidden.astype(np.float32)[:, :] @ kernel.astype(np.float32)[:, kept]
    want = -nll(jnp.asarray(z), jnp.asarray(labels - (labels > 3)))
    np.testing.assert_allclose(rows(hidden, kernel), np.where(where, want, 0), rtol=1e-5, atol=1e-6)
    by_kernel = jax.jit(jax.grad(lambda w: jnp.sum(rows(hidden, w))))(kernel)
    assert by_kernel.dtype == dtype
    np.testing.assert_array_equal(by_kernel[:, 3], 0)
    assert counted(jax.grad(lambda h, w: jnp.sum(rows(h, w)), argnums=(0, 1)), hidden, kernel) < 4.01 * 16 * 3 * 7


def test_top_k_of_a_masked_vocabulary(rng: np.random.Generator):
    hidden, kernel, _ = draw(rng)
    allowed = rng.random((13, 7)) < 0.6
    allowed[:, :2] = True

    def top(logits: jax.Array, allowed: jax.Array) -> Any:
        return jax.lax.top_k(jnp.where(allowed, logits, -jnp.inf), 2)

    values, classes = linear_rows(top, hidden, kernel, allowed, chunk_rows=4)
    z = np.where(allowed, hidden @ kernel, -np.inf)
    np.testing.assert_array_equal(classes, np.argsort(-z, axis=-1)[:, :2])
    np.testing.assert_allclose(values, -np.sort(-z, axis=-1)[:, :2], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics from the pass of the loss


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        *(("one device", "mean"), ("auto", "none"), ("explicit", "mean"), ("manual", "none")),
        *(pytest.param(kind, "mean", marks=pytest.mark.slow) for kind in ("auto", "manual")),
        *(pytest.param(kind, "none", marks=pytest.mark.slow) for kind in ("one device", "explicit")),
    ],
)
def test_one_pass_computes_the_loss_and_its_statistics(kind: str, reduction: str, rng: np.random.Generator):
    hidden, kernel, labels = rng.normal(size=(8, 4)), rng.normal(size=(4, 8)), rng.integers(0, 8, 8)
    hidden, kernel, labels = hidden.astype(np.float32), kernel.astype(np.float32), labels.astype(np.int32)
    labels[3] = -100

    def loss(h: Any, w: Any, y: Any) -> Any:
        value, statistics = linear(h, w, y, chunk_rows=2, reduction=reduction, with_statistics=True)
        return jnp.sum(value), statistics

    def manual(h: Any, w: Any, y: Any) -> Any:
        specs = P("data"), P(None, "vocab"), P("data")

        def part(h: Any, w: Any, y: Any) -> Any:
            total, statistics = linear(h, w, y, chunk_rows=2, reduction="sum", with_statistics=True, vocab_axis="vocab")
            return jax.lax.psum(total, "data") / (7 if reduction == "mean" else 1), statistics

        return jax.shard_map(part, in_specs=specs, out_specs=(P(), P("data")))(h, w, y)

    want, gradients = run(
        jax.value_and_grad(lambda h, w: jnp.sum(linear(h, w, labels, reduction=reduction)), argnums=(0, 1)),
        hidden,
        kernel,
    )
    statistics = jaxent.linear_token_statistics(hidden, kernel, labels)
    arguments: list[Any] = [hidden, kernel, labels]
    f = jax.value_and_grad(manual if kind == "manual" else loss, argnums=(0, 1), has_aux=True)
    if kind == "one device":
        got = jax.jit(f)(*arguments)
        if reduction == "mean":
            assert counted(f, *arguments) < 3.01 * hidden.size * 8
    else:
        types = (jax.sharding.AxisType.Auto if kind == "auto" else jax.sharding.AxisType.Explicit,) * 2
        mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=types, devices=jax.devices()[:4])
        specs = P("data"), P(None, "vocab"), P("data")
        arguments = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments, specs, strict=True)]
        with jax.set_mesh(mesh):
            got = jax.jit(f)(*arguments)
    (value, told), by = got
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(by), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.asarray(told.log_prob)[3] == 0
    assert np.asarray(told.rank)[3] == -1


@pytest.mark.grid
@pytest.mark.parametrize("devices", [1, 8])
def test_masked_log_probabilities_leave_the_kernel_alone(devices: int, rng: np.random.Generator, monkeypatch: Any):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    hidden, kernel, labels = draw(rng)
    labels[::3] = -100

    def total(kernel: Any, f: Any) -> jax.Array:
        return jnp.where(labels != -100, f(kernel).log_prob, 0).sum()

    ways = {
        "linear": lambda w: jaxent.linear_token_statistics(hidden, w, labels, chunk_rows=4),
        "where": lambda w: jaxent.linear_token_statistics(hidden, w, labels, where=labels >= 0, ignore_index=None),
        "dense": lambda w: jaxent.token_statistics(hidden @ w, labels),
    }
    kept = labels >= 0

    def log_prob(z: Any, labels: Any) -> Any:
        found: Any = jaxent.token_statistics(z, labels)
        return found.log_prob.sum()

    want = jax.grad(lambda w: log_prob(hidden[kept] @ w, labels[kept]))(kernel)
    for way in ways.values():
        np.testing.assert_allclose(
            jax.jit(jax.grad(functools.partial(total, f=way)))(kernel), want, rtol=1e-4, atol=1e-6
        )
        statistics: Any = way(kernel)
        np.testing.assert_array_equal(statistics.rank[~kept], -1)
        np.testing.assert_array_equal(statistics.entropy[~kept], 0)


@pytest.mark.grid
def test_every_derivative_of_a_soft_cap_keeps_its_digits():
    def loss(hidden: jax.Array, cap: jax.Array) -> jax.Array:
        return linear_loss(lambda logits: logits[:, 0], hidden[None], jnp.ones((1, 1)), soft_cap=cap, reduction="sum")

    derivatives = jax.jit(lambda *a: (jax.grad(loss, argnums=(0, 1))(*a), jax.hessian(loss, argnums=(0, 1))(*a)))
    for cap, x in itertools.product((0.5, 30.0, 1e3, 1e4, 1e8), (1e-2, 0.3, 1.0, 1.5, 7.0)):
        x, cap = (float(np.float32(number)) for number in (x, cap))
        first, second = derivatives(jnp.array([x]), jnp.array(cap))
        (by_x,), by_cap = first
        (((by_xx,),), (mixed,)), (_, by_cap_twice) = second
        with mpmath.workdps(60):
            u = mpmath.mpf(x) / cap
            squared_sech = mpmath.sech(u) ** 2
            slope = 2 * u * mpmath.tanh(u) * squared_sech
            want = [
                (by_x, squared_sech),
                (by_cap, mpmath.tanh(u) - u * squared_sech),
                (by_xx, -2 * mpmath.tanh(u) * squared_sech / cap),
                (mixed, slope / cap),
                (by_cap_twice, -slope * u / cap),
            ]
            for got, exact in want:
                if abs(exact) > 1e-36:
                    assert abs(float(got) - exact) <= 4e-6 * abs(exact), (x, cap, float(got), float(exact))
