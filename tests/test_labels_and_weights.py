"""Labels of every width and out of range, denominators, empty means, and sums with their weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import draw_labels, draw_logits, run, softmax_cross_entropy, softmax_cross_entropy_gradient
from oracles import assert_close

from jaxent import WeightedSum

pytestmark = pytest.mark.usefixtures("one_device")


# ----------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_labels_of_every_width(dtype: str, rng: np.random.Generator):
    for count in (100, 300):
        z = draw_logits(rng, (4, count))
        largest = int(min(count - 1, np.iinfo(dtype).max))
        labels = np.array([0, 1, largest - 1, largest], dtype)
        want = [oracles.long_row_nll(z[n], int(labels[n]))[0] for n in range(4)]
        for given in (labels, jnp.asarray(labels.astype(jax.dtypes.canonicalize_dtype(dtype)))):
            got = softmax_cross_entropy(z, given, reduction="none")
            assert_close(got, want, ulp=8, dtype=np.float32, where=(count, type(given)))


@pytest.mark.parametrize(
    "label",
    [
        np.uint32(2**32 - 100),  # would be -100, which is ignored
        np.int64(2**32 + 1),  # would be class 1
        np.int64(2**32 - 100),
        np.int64(-(2**32) + 1),
        np.uint64(2**64 - 100),
        np.uint64(2**63),
        np.uint8(156),  # -100 in eight bits
        np.uint8(255),
        np.int8(-1),
        np.int32(-101),
        np.int32(5),
        np.int64(5),
    ],
    ids=lambda v: f"{v.dtype}:{v}",
)
def test_a_label_out_of_range_is_nan(label: Any):
    z = np.zeros((2, 5), np.float32)
    labels = np.array([label, 0], label.dtype)
    for apply in (lambda f: f, jax.jit):
        got = apply(lambda z: softmax_cross_entropy(z, labels, reduction="none"))(z)
        assert_close(got, [np.nan, np.log(5)], ulp=2, dtype=np.float32)
    with jax.enable_x64(True):
        got = softmax_cross_entropy(z, labels, reduction="none")
        assert_close(got, [np.nan, np.log(5)], ulp=2, dtype=np.float32)


def test_a_label_out_of_range_has_no_class_weight():
    got = softmax_cross_entropy(
        np.zeros((2, 3), np.float32), np.array([5, 0]), class_weights=np.ones(3), reduction="sum_and_weight"
    )
    assert np.isnan([got.total, got.weight]).all()


@pytest.mark.parametrize(
    ("labels", "ignore_index", "kept"),
    [
        (np.array([0, -100, 2], np.int32), -100, [True, False, True]),
        (np.array([0, -100, 2], np.int8), -100, [True, False, True]),
        (np.array([0, -100, 2], np.int64), -100, [True, False, True]),
        (np.array([0, -1, 2], np.int8), -1, [True, False, True]),
        (np.array([0, 1, 2], np.int32), 2, [True, True, False]),
        (np.array([0, 1, 2], np.uint8), 2, [True, True, False]),
        (np.array([0, 1, 255], np.uint8), 255, [True, True, False]),
        (np.array([0, 1, 2**32 - 100], np.uint32), 2**32 - 100, [True, True, False]),
        (np.array([0, 1, 2], np.int32), None, [True, True, True]),
        (np.array([0, 1, 2], np.uint8), -100, [True, True, True]),
        (np.array([0, 1, 2], np.int8), 256, [True, True, True]),  # 256 is 0 in eight bits
        (np.array([0, 1, 2], np.int32), 2**32, [True, True, True]),
    ],
)
def test_ignore_index(labels: np.ndarray, ignore_index: int | None, kept: list[bool]):
    z = np.arange(9, dtype=np.float32).reshape(3, 3)
    per_row = [np.log(1 + np.exp(1.0) + np.exp(2.0)) - y for y in range(3)]
    got = softmax_cross_entropy(z, labels, ignore_index=ignore_index, reduction="none")
    assert_close(got, np.where(kept, per_row, 0.0), ulp=4, dtype=np.float32)
    mean = softmax_cross_entropy(z, labels, ignore_index=ignore_index)
    assert_close(mean, np.mean(np.array(per_row)[kept]), ulp=4, dtype=np.float32)


def test_without_ignore_index_minus_100_is_out_of_range():
    got = softmax_cross_entropy(np.zeros((1, 3), np.float32), np.array([-100]), ignore_index=None)
    assert np.isnan(got)


# ----------------------------------------------------------------------------------------------------------------------
# Denominators and empty means


def test_the_denominator_replaces_the_divisor():
    z, labels = np.zeros((4, 3), np.float32), np.array([0, 1, 2, -100])
    for denominator in (8, 8.0, np.float64(8), np.float32(8), jnp.float32(8), jnp.bfloat16(8), jnp.int32(8)):
        got = softmax_cross_entropy(z, labels, denominator=denominator)
        assert_close(got, 3 * np.log(3) / 8, ulp=2, dtype=np.float32)
    with jax.enable_x64(True):
        for denominator in (8, jnp.bfloat16(8)):
            got = softmax_cross_entropy(z, labels, denominator=denominator)
            assert_close(got, 3 * np.log(3) / 8, ulp=2, dtype=np.float32)
    assert softmax_cross_entropy(z, labels, denominator=0.0) == 0


def test_a_traced_negative_denominator_is_nan():
    z, labels = np.zeros((1, 3), np.float32), np.array([0])
    assert np.isnan(jax.jit(lambda d: softmax_cross_entropy(z, labels, denominator=d))(-1.0))


@pytest.mark.parametrize(
    ("logits", "arguments"),
    [
        (np.zeros((0, 3), np.float32), {"targets": np.zeros(0, np.int32)}),
        (np.zeros((0, 3), np.float32), {"targets": np.zeros((0, 3), np.float32)}),
        (np.zeros((2, 3), np.float32), {"targets": np.full(2, -100)}),
        (np.zeros((2, 3), np.float32), {"targets": np.array([0, 1]), "where": np.zeros(2, bool)}),
        (np.zeros((2, 3), np.float32), {"targets": np.array([0, 1]), "weights": np.zeros(2)}),
        (np.full((2, 3), np.nan, np.float32), {"targets": np.array([0, 9]), "weights": np.zeros(2)}),
        (np.full((2, 3), np.inf, np.float32), {"targets": np.full(2, -100)}),
        (np.zeros((2, 3), np.float32), {"targets": np.full((2, 3), 0.25, np.float32), "where": np.zeros(2, bool)}),
        (np.zeros((2, 3), np.float32), {"targets": np.array([0, 1]), "class_weights": np.zeros(3)}),
    ],
)
def test_the_mean_of_nothing_is_zero(logits: np.ndarray, arguments: dict[str, Any]):
    def ways(z: jax.Array) -> list[jax.Array]:
        functions = (softmax_cross_entropy, *(d(softmax_cross_entropy) for d in (jax.grad, jax.jacfwd, jax.hessian)))
        return [f(z, **arguments) for f in (*functions, softmax_cross_entropy_gradient)]

    for nothing in run(ways, logits):
        np.testing.assert_array_equal(nothing, np.zeros_like(nothing))


def test_weights_are_not_cut_to_the_logits_dtype():
    # 1 + 2**-10 is 1 in bfloat16; the loss is computed in float32.
    z = np.zeros((1, 2), jnp.bfloat16)
    got = softmax_cross_entropy(z, np.array([0]), weights=np.array([1 + 2.0**-10], np.float32), reduction="sum")
    assert_close(got, (1 + 2.0**-10) * np.log(2), ulp=2, dtype=np.float32)


def test_weights_have_either_sign():
    got = softmax_cross_entropy(
        np.zeros((2, 3), np.float32), np.array([0, 1]), weights=np.array([-2.0, 1.0]), reduction="none"
    )
    assert_close(got, [-2 * np.log(3), np.log(3)], ulp=2, dtype=np.float32)


def test_weights_of_integers_and_lists():
    got = softmax_cross_entropy(
        [[0.0, 0.0], [0.0, 0.0]], [0, 1], weights=[1, 3], class_weights=[2, 1], reduction="sum_and_weight"
    )
    assert isinstance(got, WeightedSum)
    assert_close(got.total, 5 * np.log(2), ulp=2, dtype=np.float32)
    assert got.weight == 5


class Boxed:
    """An array in a box, as model libraries keep their parameters."""

    def __init__(self, array: jax.Array):
        self.dtype, self.shape, self.array = array.dtype, array.shape, array

    def __jax_array__(self) -> jax.Array:
        return self.array


def test_an_array_in_a_box_is_the_array():
    # np.asarray would copy an array to the host, and fail for a tracer.
    z, labels = jnp.array([[0.0, 1.0, 2.0], [3.0, 5.0, 4.0]]), jnp.array([0, 1])
    loss = jax.jit(jax.grad(lambda z: softmax_cross_entropy(Boxed(z), Boxed(labels))))
    np.testing.assert_array_equal(loss(z), jax.grad(softmax_cross_entropy)(z, labels))


# ----------------------------------------------------------------------------------------------------------------------
# WeightedSum


def test_microbatches_add_up_to_the_exact_mean(rng: np.random.Generator):
    z, labels = draw_logits(rng, (12, 5)), draw_labels(rng, (12,), 5)
    labels[:9:2] = -100  # parts with different counts, so that a mean of means is wrong
    labels[8:] = -100
    parts = [softmax_cross_entropy(z[i : i + 4], labels[i : i + 4], reduction="sum_and_weight") for i in (0, 4, 8)]
    want = oracles.softmax_cross_entropy(z, labels)
    total = sum(parts)
    assert isinstance(total, WeightedSum)
    assert_close(total.mean(), want.mean, ulp=4, dtype=np.float32)
    assert_close(total.weight, want.weight, ulp=0, dtype=np.float32)
    assert_close((parts[0] + parts[1]).mean(), want.mean, ulp=4, dtype=np.float32)
    assert parts[2].mean() == 0
    assert abs(float(sum(part.mean() for part in parts) / 3) - want.mean) > 0.01
    for add in (parts[0].__add__, parts[0].__radd__):
        assert add(1) is NotImplemented


def test_a_weighted_sum_is_carried_by_scan_and_by_has_aux(rng: np.random.Generator):
    z, labels = draw_logits(rng, (3, 4, 5)), draw_labels(rng, (3, 4), 5)
    labels[1] = -100

    def step(carry: WeightedSum, batch: tuple) -> tuple[WeightedSum, None]:
        part = softmax_cross_entropy(*batch, reduction="sum_and_weight")
        return carry + part, None

    nothing = WeightedSum(jnp.zeros(()), jnp.zeros(()))
    summed, _ = jax.lax.scan(step, nothing, (z, labels))
    want = oracles.softmax_cross_entropy(z, labels)
    assert_close(summed.mean(), want.mean, ulp=4, dtype=np.float32)

    def loss(z: jax.Array) -> tuple[jax.Array, WeightedSum]:
        part = softmax_cross_entropy(z, labels, reduction="sum_and_weight")
        return part.mean(), part

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(z)
    assert_close(value, want.mean, ulp=4, dtype=np.float32)
    assert_close(aux.weight, want.weight, ulp=0, dtype=np.float32)
    assert_close(gradient, want.gradient * want.scale("mean"), ulp=6, dtype=np.float32)


def test_a_weighted_sum_is_summed_over_devices(rng: np.random.Generator):
    z, labels = draw_logits(rng, (16, 5)), draw_labels(rng, (16,), 5)
    labels[2:9] = -100
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")

    def local(z: jax.Array, labels: jax.Array) -> jax.Array:
        part = softmax_cross_entropy(z, labels, reduction="sum_and_weight")
        whole = jax.lax.psum(part, "data")
        return whole.mean()

    spread = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=jax.sharding.PartitionSpec())
    value, gradient = jax.jit(jax.value_and_grad(spread))(z, labels)
    want = oracles.softmax_cross_entropy(z, labels)
    assert_close(value, want.mean, ulp=4, dtype=np.float32)
    assert_close(gradient, want.gradient * want.scale("mean"), ulp=6, dtype=np.float32)
