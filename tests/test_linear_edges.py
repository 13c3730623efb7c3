"""The linear loss of rows that count for nothing, of rows that are wrong, of tiny losses and of wrong arguments."""

from typing import Any

import jax
import numpy as np
import pytest
from cases import covering, draw_labels
from linear_calls import FEATURES, check, draw_head, linear_softmax_cross_entropy, oracle, value_and_gradients
from oracles import assert_close

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
