"""Losses from hidden states: values and all gradients against float64, and against the dense losses."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import (
    COMBINED,
    OPTIONS,
    REDUCTIONS,
    covering,
    draw_labels,
    draw_probabilities,
    precision,
    softmax_cross_entropy,
)
from linear_calls import (
    FEATURES,
    HEADS,
    check,
    draw_grid,
    draw_head,
    draw_options,
    linear_softmax_cross_entropy,
    oracle,
    value_and_gradients,
)
from oracles import assert_close

# The row losses are those of `test_losses.py`, for every option; here their arguments go through a head, in chunks.
USUAL = {(option, "shaped") for option in (*COMBINED, "ignore_a_class", "denominator")} | {("plain", "bare")}


@pytest.mark.parametrize(
    ("option", "head"),
    [
        pytest.param(option, head, marks=() if (option, head) in USUAL else pytest.mark.slow)
        for option in OPTIONS
        for head in HEADS
    ],
)
def test_every_option(option: str, head: str, rng: np.random.Generator):
    check({**draw_head(rng, 13, 5, head), **draw_options(rng, option, (13, 5)), "chunk_rows": 3})


@pytest.mark.parametrize(("option", "reduction"), covering(COMBINED, REDUCTIONS[1:]))
def test_every_reduction(option: str, reduction: str, rng: np.random.Generator):
    cotangent = np.arange(1, 14) / 8 if reduction == "none" else 0.5
    arguments = {**draw_head(rng, 13, 5, "shaped"), **draw_options(rng, option, (13, 5))}
    check({**arguments, "chunk_rows": 4, "reduction": reduction}, cotangent=cotangent)


@pytest.mark.parametrize(
    ("reduction", "chunk_rows"),
    [*(("mean", rows) for rows in (None, 1, 5, 20)), *(("none", rows) for rows in (None, 5))],
)
def test_every_chunk_size(chunk_rows: int | None, reduction: str, rng: np.random.Generator):
    arguments = {**draw_head(rng, 12, 5, "shaped"), **draw_options(rng, "everything", (12, 5))}
    check({**arguments, "chunk_rows": chunk_rows, "reduction": reduction})


@pytest.mark.parametrize(
    ("rows", "count"),
    [(13, 1), (13, 2), (13, 37), (13, 1000), (1, 257), (0, 1)],
)
def test_every_size(rows: int, count: int, rng: np.random.Generator):
    # A pairwise float32 sum over n terms of one sign is off by at most log2(n) / 2 ulp.
    ulp = 8 + np.log2(count) / 2
    check({**draw_head(rng, rows, count), "targets": draw_labels(rng, (rows,), count), "chunk_rows": 4}, ulp=ulp)


@pytest.mark.parametrize("count", [1, 257])
def test_probabilities_of_every_size(count: int, rng: np.random.Generator):
    targets = draw_probabilities(rng, (13, count))
    check({**draw_head(rng, 13, count, "shaped"), "targets": targets, "chunk_rows": 4, "label_smoothing": 0.25})


@pytest.mark.parametrize(("option", "dtype"), covering(COMBINED, [np.float16, ml_dtypes.bfloat16, np.float64]))
def test_every_dtype(option: str, dtype: Any, rng: np.random.Generator):
    with precision(dtype):
        arguments = {**draw_head(rng, 13, 5, "shaped", dtype), **draw_options(rng, option, (13, 5)), "chunk_rows": 3}
        check(arguments)
        value, _ = value_and_gradients(arguments)
        assert value.dtype == (np.float64 if dtype == np.float64 else np.float32)


MIXED = [
    (ml_dtypes.bfloat16, np.float32, np.float32),
    (np.float32, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16, np.float32),
    (ml_dtypes.bfloat16, np.float16, np.float32),
    (np.float64, np.float32, ml_dtypes.bfloat16),
]


@pytest.mark.parametrize(("dtypes", "reduction"), covering(MIXED, ["mean", "none"]))
def test_mixed_dtypes(dtypes: tuple[Any, Any, Any], reduction: str, rng: np.random.Generator):
    hidden, kernel, bias = dtypes
    with precision(hidden):
        head = draw_head(rng, 13, 5, "shaped")
        for name, dtype in (("hidden", hidden), ("kernel", kernel), ("bias", bias)):
            head[name] = head[name].astype(dtype)
        targets = draw_labels(rng, (13,), 5)
        check({**head, "targets": targets, "chunk_rows": 3, "reduction": reduction})


def test_float64_gradients_have_float64_accuracy(x64: None, rng: np.random.Generator):
    head = {k: v.astype(np.float64) + 1e-3 for k, v in draw_head(rng, 13, 7).items()}
    targets = draw_labels(rng, (13,), 7)
    want = oracle(**head, targets=targets)
    value, gradients = value_and_gradients({**head, "targets": targets, "chunk_rows": 3})
    np.testing.assert_allclose(value, want.value, rtol=1e-14)
    for name in ("hidden", "kernel"):
        np.testing.assert_allclose(gradients[name], want.gradients[name], rtol=1e-12, atol=1e-15)


# ----------------------------------------------------------------------------------------------------------------------
# The dense loss


@pytest.mark.parametrize(
    ("batch", "option"),
    [*covering([(), (7,), (2, 3, 4), (3, 1), (0, 2)], COMBINED[1:]), ((2, 3, 4), "denominator")],
)
def test_equal_to_the_dense_loss(option: str, batch: tuple[int, ...], rng: np.random.Generator):
    hidden, kernel, bias = draw_grid(rng, (*batch, FEATURES)), draw_grid(rng, (FEATURES, 5)), draw_grid(rng, (5,))
    arguments = OPTIONS[option](rng, (*batch, 5))
    if batch == () and "where" in arguments:
        arguments["where"] = np.array(True)
    reduction = "mean" if option == "denominator" else "none"

    @jax.jit
    def both(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        def linear(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return linear_softmax_cross_entropy(
                hidden, kernel, bias=bias, **arguments, reduction=reduction, chunk_rows=5
            )

        def dense(hidden: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            logits = hidden @ kernel + bias.reshape([1] * len(batch) + [-1])
            return softmax_cross_entropy(logits, **arguments, reduction=reduction)

        results = []
        for f in (linear, dense):
            value, pull = jax.vjp(f, hidden, kernel, bias)
            results.append((value, pull(jnp.ones_like(value))))
        return results

    linear, dense = both(hidden, kernel, bias)
    assert linear[0].shape == (() if reduction == "mean" else batch)
    for got, want in zip(jax.tree.leaves(linear), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5)


def test_an_embedding_passes_transposed(rng: np.random.Generator):
    head = draw_head(rng, 13, 5)
    targets, embedding = draw_labels(rng, (13,), 5), np.ascontiguousarray(head["kernel"].T)

    @jax.jit
    def by_embedding(hidden: jax.Array, embedding: jax.Array) -> Any:
        def loss(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
            return linear_softmax_cross_entropy(hidden, embedding.T, targets, chunk_rows=3)

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, embedding)

    value, (d_hidden, d_embedding) = by_embedding(head["hidden"], embedding)
    want = oracle(**head, targets=targets)
    assert_close(value, want.value, ulp=4, dtype=np.float32)
    assert_close(d_hidden, want.gradients["hidden"], ulp=8, dtype=np.float32, size=want.sizes["hidden"])
    assert_close(d_embedding, want.gradients["kernel"].T, ulp=8, dtype=np.float32, size=want.sizes["kernel"].T)


def test_a_contrastive_loss_has_both_gradients(rng: np.random.Generator):
    images, texts = draw_grid(rng, (6, FEATURES)), draw_grid(rng, (6, FEATURES))
    pairs = np.arange(6)

    def loss(f: Any) -> Any:
        return lambda images, texts, t: (f(images, texts, t) + f(texts, images, t)) / 2

    def linear(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
        return linear_softmax_cross_entropy(a, b.T, pairs, temperature=t, chunk_rows=4)

    def dense(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
        return softmax_cross_entropy(a @ b.T / t, pairs)

    got, want = (
        jax.jit(jax.value_and_grad(loss(f), argnums=(0, 1, 2)))(images, texts, np.float32(0.5)) for f in (linear, dense)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
