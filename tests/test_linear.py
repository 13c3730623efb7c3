"""Losses from hidden states: values and all gradients against float64, and against the dense losses.

Hidden states, kernels and biases are multiples of 1/8 and small, so that their products are exact in every dtype:
what is left is the rounding of the row loss and of the two backward products, a few ulp of the sum of absolute terms.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles_linear
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
from oracles import assert_close

import jaxent
from jaxent import WeightedSum

# Untyped: tables of arguments are dictionaries, and what is returned depends on `reduction`.
linear_softmax_cross_entropy: Any = jaxent.linear_softmax_cross_entropy
oracle: Any = oracles_linear.softmax_cross_entropy

FEATURES = 4
STATIC = ("ignore_index", "label_smoothing", "z_loss", "reduction", "denominator", "chunk_rows")
# No bias, or all that can be done to the logits of a head before their softmax.
HEADS = {
    "bare": {},
    "shaped": {"bias": True, "soft_cap": np.float32(2.0), "temperature": np.float32(0.75)},
}


def draw_grid(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (rng.integers(-8, 9, size=shape) / 8).astype(dtype)


def draw_head(rng: np.random.Generator, rows: int, count: int, head: str = "bare", dtype: Any = np.float32) -> dict:
    """Arguments for the linear layer."""
    shaped = dict(HEADS[head])
    if shaped.pop("bias", False):
        shaped["bias"] = draw_grid(rng, (count,), dtype)
    arrays = {"hidden": draw_grid(rng, (rows, FEATURES), dtype), "kernel": draw_grid(rng, (FEATURES, count), dtype)}
    return {**arrays, **shaped}


def draw_options(rng: np.random.Generator, option: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """An option of the softmax loss; no class has the weight 0, so that every class weight has its whole derivative."""
    arguments = OPTIONS[option](rng, shape)
    if "class_weights" in arguments:
        arguments["class_weights"] = arguments["class_weights"] + np.float32(0.25)
    return arguments


def value_and_gradients(arguments: dict[str, Any], cotangent: Any = 1.0) -> tuple[Any, dict[str, Any]]:
    """The value and the gradients with respect to all floating arrays; arguments of the same shapes and options share a
    program.
    """
    static = {k: v for k, v in arguments.items() if k in STATIC}
    arrays = {k: v for k, v in arguments.items() if k not in STATIC and v is not None}
    free = {k: v for k, v in arrays.items() if jnp.issubdtype(np.asarray(v).dtype, jnp.floating)}
    fixed = {k: v for k, v in arrays.items() if k not in free}
    return _value_and_gradients(free, fixed, np.asarray(cotangent), static=tuple(static.items()))


@functools.partial(jax.jit, static_argnames=("static",))
def _value_and_gradients(free: Any, fixed: Any, cotangent: jax.Array, *, static: tuple[tuple[str, Any], ...]) -> Any:
    def loss(free: Any) -> Any:
        every = {**free, **fixed}
        value = linear_softmax_cross_entropy(every.pop("hidden"), every.pop("kernel"), **every, **dict(static))
        total = value.total if isinstance(value, WeightedSum) else value
        return jnp.sum(total * cotangent.astype(total.dtype)), value

    (_, value), gradients = jax.value_and_grad(loss, has_aux=True)(free)
    return value, gradients


def check(arguments: dict[str, Any], *, ulp: float = 8, cotangent: Any = 1.0) -> None:
    """Value and every gradient against the oracle, within `ulp` of the sum of the absolute terms."""
    want = oracle(**{k: v for k, v in arguments.items() if k != "chunk_rows"}, cotangent=cotangent)
    value, gradients = value_and_gradients(arguments, cotangent)
    if isinstance(value, WeightedSum):
        assert_close(value.weight, want.weight, ulp=ulp, dtype=np.float32)
        value = value.total
    assert_close(value, want.value, ulp=ulp, dtype=value.dtype)
    for name, got in gradients.items():
        given = np.asarray(arguments[name]).dtype
        assert got.dtype == given, f"the gradient with respect to {name} is {got.dtype}, its argument {given}"
        # Operands of half precision: the logits' gradient is rounded to their dtype, and the result once more.
        allowed = 1.25 if given in (ml_dtypes.bfloat16, np.float16) else ulp
        assert_close(got, want.gradients[name], ulp=allowed, dtype=given, size=np.nan_to_num(want.sizes[name]))


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


# ----------------------------------------------------------------------------------------------------------------------
# Rows that count for nothing, rows that are wrong


def dropping(how: str, rows: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Arguments under which the rows of the mask are dropped."""
    if how == "where":
        return {"targets": labels, "where": ~rows}
    if how == "weights":
        return {"targets": labels, "weights": np.where(rows, 0, 1).astype(np.float32)}
    return {"targets": np.where(rows, -100, labels)}


@pytest.mark.parametrize(
    ("how", "reduction"), [("weights", "mean"), ("weights", "none"), ("where", "none"), ("ignore_index", "mean")]
)
def test_dropped_rows_are_deleted_whatever_they_hold(how: str, reduction: str, rng: np.random.Generator):
    head = draw_head(rng, 13, 5, "shaped")
    labels, dropped = draw_labels(rng, (13,), 5), np.arange(13) % 3 == 0
    head["hidden"][dropped, 1] = np.resize([np.nan, np.inf, -np.inf], dropped.sum())
    arguments = {**head, **dropping(how, dropped, labels), "chunk_rows": 3, "reduction": reduction}
    kept = {**head, "hidden": head["hidden"][~dropped], "targets": labels[~dropped], "reduction": reduction}
    want = oracle(**kept)
    value, gradients = value_and_gradients(arguments)
    if reduction == "none":
        np.testing.assert_array_equal(value[dropped], 0)
        value = value[~dropped]
    assert_close(value, want.value, ulp=4, dtype=np.float32)
    np.testing.assert_array_equal(gradients["hidden"][dropped], 0)
    gradients["hidden"] = gradients["hidden"][~dropped]
    for name in ("hidden", "kernel", "bias", "soft_cap", "temperature"):
        assert_close(gradients[name], want.gradients[name], ulp=8, dtype=np.float32, size=want.sizes[name])


@pytest.mark.parametrize(("how", "reduction"), covering(["where", "weights", "ignore_index"], ["mean", "sum"]))
def test_all_rows_dropped(how: str, reduction: str, rng: np.random.Generator):
    head = draw_head(rng, 7, 5, "shaped")
    head["hidden"][:] = np.nan
    every = np.ones(7, bool)
    arguments = {**head, **dropping(how, every, draw_labels(rng, (7,), 5)), "chunk_rows": 3, "reduction": reduction}
    value, gradients = value_and_gradients(arguments)
    for got in jax.tree.leaves((value, gradients)):
        np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_out_of_range_is_nan(reduction: str, rng: np.random.Generator):
    head, targets = draw_head(rng, 7, 5, "shaped"), draw_labels(rng, (7,), 5)
    row = np.arange(7) == 2
    for label in (-1, 5, 2**31 - 1, -(2**31)):
        targets[2] = label
        arguments = {**head, "targets": targets, "chunk_rows": 3, "reduction": reduction}
        value, gradients = value_and_gradients(arguments)
        np.testing.assert_array_equal(np.isnan(value), row if reduction == "none" else True, str(label))
        for name in ("kernel", "bias", "temperature"):
            assert np.all(np.isnan(gradients[name])), (label, name)
        # A mean divides every row's gradient with respect to a sum of weights, which is nan only with class weights.
        np.testing.assert_array_equal(np.isnan(gradients["hidden"]), np.broadcast_to(row[:, None], (7, FEATURES)))


@pytest.mark.parametrize("hidden", [np.nan, np.inf])
def test_a_counted_row_of_nan_is_nan(hidden: float, rng: np.random.Generator):
    head, targets = draw_head(rng, 7, 5), draw_labels(rng, (7,), 5)
    head["hidden"][2] = hidden
    value, gradients = value_and_gradients({**head, "targets": targets, "chunk_rows": 3, "reduction": "none"})
    row = np.arange(7) == 2
    np.testing.assert_array_equal(np.isnan(value), row)
    np.testing.assert_array_equal(np.isnan(gradients["hidden"]), np.broadcast_to(row[:, None], (7, FEATURES)))
    assert np.all(np.isnan(gradients["kernel"]))


def test_an_infinite_bias_deletes_a_class(rng: np.random.Generator):
    head, targets = draw_head(rng, 7, 5), draw_labels(rng, (7,), 4)
    value, gradients = value_and_gradients(
        {**head, "targets": targets, "bias": np.array([0, 0, 0, 0, -np.inf], np.float32), "chunk_rows": 3}
    )
    want = oracle(head["hidden"], head["kernel"][:, :4], targets)
    assert_close(value, want.value, ulp=4, dtype=np.float32)
    assert_close(gradients["hidden"], want.gradients["hidden"], ulp=8, dtype=np.float32, size=want.sizes["hidden"])
    by_kernel, size = (np.pad(x["kernel"], ((0, 0), (0, 1))) for x in (want.gradients, want.sizes))
    assert_close(gradients["kernel"], by_kernel, ulp=8, dtype=np.float32, size=size)


@pytest.mark.parametrize("dtype", [np.int8, np.uint32])
def test_labels_of_any_integer_dtype(dtype: Any, rng: np.random.Generator):
    targets = (draw_labels(rng, (13,), 120)).astype(dtype)
    check({**draw_head(rng, 13, 1000), "targets": targets, "chunk_rows": 4}, ulp=12)


def test_unsigned_labels_that_wrap_are_out_of_range(rng: np.random.Generator):
    targets = np.array([0, 2**32 - 100, 2**32 - 1], np.uint32)
    losses = linear_softmax_cross_entropy(**draw_head(rng, 3, 200), targets=targets, reduction="none", chunk_rows=2)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True])


@pytest.mark.parametrize("chunk_rows", [3, 7])
def test_tiny_losses_keep_their_digits(chunk_rows: int):
    # The label leads by 41: 1 - p is 1.6e-18, which `log(sum(exp))` rounds to 0.
    kernel = np.array([[0.0, -41.0, -42.0]], np.float32)
    hidden, targets = np.ones((7, 1), np.float32), np.zeros(7, int)
    value, gradients = value_and_gradients(
        {"hidden": hidden, "kernel": kernel, "targets": targets, "chunk_rows": chunk_rows}
    )
    powers = np.exp([-41.0, -42.0])
    np.testing.assert_allclose(value, np.log1p(powers.sum()), rtol=1e-6)
    np.testing.assert_allclose(gradients["kernel"], [[-powers.sum(), *powers]], rtol=1e-6)
    np.testing.assert_allclose(gradients["hidden"], np.full((7, 1), -(powers @ [41, 42]) / 7), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong arguments


def arguments(**changed: Any) -> dict[str, Any]:
    plain = {
        "hidden": np.ones((4, 3), np.float32),
        "kernel": np.ones((3, 5), np.float32),
        "targets": np.zeros(4, np.int32),
    }
    return {**plain, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": np.ones((4, 3), np.int32)}, TypeError, "`hidden`.*floating"),
        ({"hidden": np.float32(1.0)}, ValueError, "`hidden`.*features"),
        ({"hidden": np.ones((4, 2), np.float32)}, ValueError, r"`kernel`.*2 features.*\[3,5\]"),
        ({"kernel": np.ones((5, 3), np.float32)}, ValueError, r"`kernel`.*3 features.*`embedding.T`.*\[5,3\]"),
        ({"kernel": np.ones((3, 5), np.int8)}, TypeError, "`kernel`.*floating"),
        ({"kernel": np.ones((3, 0), np.float32)}, ValueError, "`kernel`.*one class"),
        ({"bias": np.ones(4, np.float32)}, ValueError, r"`bias`.*\(5,\)"),
        ({"bias": np.ones(5, np.int32)}, TypeError, "`bias`.*floating"),
        ({"targets": np.zeros(3, np.int32)}, ValueError, r"`targets`.*\(4,\)"),
        ({"targets": np.zeros((4, 4), np.float32)}, ValueError, r"`targets`.*\(4, 5\)"),
        ({"where": np.ones(3, bool)}, ValueError, "`where`"),
        ({"where": np.ones(4, np.float32)}, TypeError, "`where`"),
        ({"weights": np.ones((4, 1), np.float32)}, ValueError, "`weights`"),
        ({"class_weights": np.ones(4, np.float32)}, ValueError, r"`class_weights`.*\(5,\)"),
        ({"soft_cap": 0.0}, ValueError, "`soft_cap`"),
        ({"soft_cap": np.ones(2, np.float32)}, ValueError, "`soft_cap`"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
        ({"temperature": -1.0}, ValueError, "`temperature`"),
        ({"label_smoothing": 1.5}, ValueError, "`label_smoothing`"),
        ({"ignore_index": 1.0}, TypeError, "`ignore_index`"),
        ({"reduction": "max"}, ValueError, "`reduction`"),
        ({"reduction": "sum", "denominator": 2.0}, ValueError, "`denominator`"),
        ({"chunk_rows": 0}, ValueError, "`chunk_rows`.*at least 1.*0"),
        ({"chunk_rows": 2.0}, TypeError, "`chunk_rows`"),
        ({"chunk_rows": True}, TypeError, "`chunk_rows`"),
        ({"vocab_axis": "model"}, ValueError, "`vocab_axis`"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=f"jaxent.linear_softmax_cross_entropy: {message}"):
        linear_softmax_cross_entropy(**arguments(**changed))
