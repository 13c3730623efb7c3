"""Inputs that other implementations get wrong, each with what they return; here the answer is right.

The peers are optax 0.2.8, torch 2.13, tokamax 0.0.12, levanter, Liger and Megatron, run on CPU or read from their
issues.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import covering, draw_labels, draw_logits, softmax_cross_entropy, softmax_cross_entropy_gradient
from oracles import assert_close


def derivatives(z: Any, targets: Any, **options: Any) -> list[jax.Array]:
    """The gradient of the sum: closed form, reverse, forward."""

    def loss(z: Any) -> jax.Array:
        return softmax_cross_entropy(z, targets, **options, reduction="sum")

    return [
        softmax_cross_entropy_gradient(z, targets, **options, reduction="sum"),
        jax.grad(loss)(z),
        jax.jacfwd(loss)(z),
    ]


@pytest.mark.parametrize(("count", "shift"), covering([2049, 50257, 128256, 151936], [0.0, -8.0]))
def test_a_vocabulary_that_is_no_multiple_of_a_block(count: int, shift: float, rng: np.random.Generator):
    # tokamax, chunked: 8.32 for 7.64; with every logit shifted by -8, 15.6.
    z, labels = draw_logits(rng, (2, count)) + np.float32(shift), draw_labels(rng, (2,), count)
    want = [oracles.long_row_nll(z[n], labels[n])[0] for n in range(2)]
    assert_close(softmax_cross_entropy(z, labels, reduction="none"), want, ulp=12, dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_eight_bit_labels_of_a_thousand_classes(dtype: Any):
    # A one-hot target of int8 labels sets four entries: 27.63 for 6.91.
    z, labels = np.zeros((2, 1000), np.float32), np.array([3, 127], dtype)
    assert_close(softmax_cross_entropy(z, labels), np.log(1000), ulp=2, dtype=np.float32)
    p = np.full((2, 1000), 1e-3)
    p[[0, 1], [3, 127]] -= 1
    assert_close(softmax_cross_entropy_gradient(z, labels, reduction="sum"), p, ulp=4, dtype=np.float32)


@pytest.mark.grid
@pytest.mark.parametrize("label", [-1, -100, 300, 2**31 - 1])
def test_a_label_outside_the_classes(label: int, rng: np.random.Generator):
    # optax: -1 trains the last class, -100 trains class 200; at 300 the loss is nan and the gradient finite and wrong.
    z, labels = draw_logits(rng, (300,)), np.array(label)
    assert np.isnan(softmax_cross_entropy(z, labels, ignore_index=None))
    for gradient in derivatives(z, labels, ignore_index=None):
        assert np.all(np.isnan(gradient))


def test_an_ignored_row_has_no_gradient(rng: np.random.Generator):
    # tokamax: loss 0, gradient a full softmax.
    z, labels = draw_logits(rng, (2, 5)), np.array([-100, 1])
    assert softmax_cross_entropy(z, labels, reduction="none")[0] == 0
    for gradient in derivatives(z, labels):
        assert np.all(gradient[0] == 0)


@pytest.mark.grid
def test_a_removed_class_leaves_the_gradient_finite():
    # One-hot forms: nan. optax's safe form: nan in every entry of jacfwd.
    z = np.array([1.0, -np.inf, 0.0], np.float32)
    want = oracles.softmax_cross_entropy(z, np.array(0))
    for target in (np.array(0), np.array([1.0, 0.0, 0.0], np.float32)):
        assert_close(softmax_cross_entropy(z, target), want.mean, ulp=4, dtype=np.float32)
        for gradient in derivatives(z, target):
            assert_close(gradient, want.gradient, ulp=4, dtype=np.float32)


def test_a_batch_in_which_every_row_is_ignored():
    # torch: nan. levanter: loss 0, gradient nan.
    value, gradient = jax.value_and_grad(softmax_cross_entropy)(np.zeros((3, 4), np.float32), np.full(3, -100))
    assert value == 0
    assert np.all(gradient == 0)


def test_bfloat16_logits_of_a_large_vocabulary(rng: np.random.Generator):
    # Sums in bfloat16: up to 0.10 nats a token off (optax), 0.06 (torch).
    z, labels = draw_logits(rng, (2, 128256), jnp.bfloat16), draw_labels(rng, (2,), 128256)
    want = [oracles.long_row_nll(z[n].astype(np.float32), labels[n])[0] for n in range(2)]
    assert_close(softmax_cross_entropy(z, labels, reduction="none"), want, ulp=12, dtype=np.float32)


def test_uniform_float16_logits_of_a_large_vocabulary():
    # A float16 sum of 131072 ones is inf, in jax.nn and in torch on CPU.
    got = softmax_cross_entropy(np.zeros((1, 131072), np.float16), np.array([7]))
    assert_close(got, np.log(131072), ulp=2, dtype=np.float32)


def test_smoothing_at_logits_far_apart():
    # Megatron: inf.
    got = softmax_cross_entropy(np.array([0.0, -50.0, -120.0], np.float32), np.array(0), label_smoothing=0.1)
    assert_close(got, 0.1 * 170 / 3, ulp=4, dtype=np.float32)


@pytest.mark.parametrize("one_hot", [False, True])
def test_a_loss_below_the_resolution_of_one(one_hot: bool):
    # optax, torch: the loss and the gradient are exactly 0.
    z = np.array([0.0, -20.0, -25.0], np.float32)
    target = np.array([1.0, 0.0, 0.0], np.float32) if one_hot else np.array(0)
    tiny = np.exp(-20.0) + np.exp(-25.0)
    assert_close(softmax_cross_entropy(z, target), np.log1p(tiny), ulp=4, dtype=np.float32)
    for gradient in derivatives(z, target):
        assert_close(gradient[0], -tiny / (1 + tiny), ulp=4, dtype=np.float32)


def test_logits_near_ten_thousand():
    # optax: 2.40723.
    got = softmax_cross_entropy(np.array([10000.0, 10001.0, 10002.0], np.float32), np.array(0))
    assert_close(got, 2.4076059644443806, ulp=2, dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint16, np.uint32])
def test_labels_that_are_not_int64(dtype: Any):
    # torch raises.
    got = softmax_cross_entropy(np.zeros((2, 4), np.float32), np.array([0, 3], dtype))
    assert_close(got, np.log(4), ulp=2, dtype=np.float32)


def test_each_row_has_its_own_cotangent(rng: np.random.Generator):
    # Liger multiplied every row's gradient with the first row's cotangent for a year.
    z, labels = draw_logits(rng, (4, 3)), draw_labels(rng, (4,), 3)
    cotangent = np.array([1.0, -2.0, 0.0, 3.0], np.float32)
    _, pull = jax.vjp(lambda z: softmax_cross_entropy(z, labels, reduction="none"), z)
    want = oracles.softmax_cross_entropy(z, labels).gradient * cotangent[:, None]
    assert_close(pull(jnp.asarray(cotangent))[0], want, ulp=6, dtype=np.float32)


def test_no_loss_is_negative(rng: np.random.Generator):
    # Apple CCE once returned negative losses.
    z, labels = rng.normal(size=(1000, 7)).astype(np.float32) * 30, draw_labels(rng, (1000,), 7)
    assert np.all(softmax_cross_entropy(z, labels, reduction="none") >= 0)
    assert np.all(softmax_cross_entropy(z, np.eye(7, dtype=np.float32)[labels], reduction="none") >= 0)


def test_a_mean_over_parts_with_different_counts(rng: np.random.Generator):
    # A mean of means weighs a part with one counted row like a full one.
    z, labels = draw_logits(rng, (8, 5)), draw_labels(rng, (8,), 5)
    labels[1:4] = -100
    parts = [softmax_cross_entropy(z[i : i + 4], labels[i : i + 4], reduction="sum_and_weight") for i in (0, 4)]
    assert_close((parts[0] + parts[1]).mean(), softmax_cross_entropy(z, labels), ulp=2, dtype=np.float32)
