"""The distribution of labels: counts and weights, joint tables, and what its entropy means for codes."""

import collections
import heapq
import inspect
import string
from typing import Any

import jax
import numpy as np
import pytest
from measures import f32
from oracles import assert_close

import jaxent as info

# ----------------------------------------------------------------------------------------------------------------------
# The empirical distribution


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_empirical_distribution(dtype: Any, rng: np.random.Generator):
    labels = rng.integers(0, 100, size=(30, 41)).astype(dtype)
    got = info.empirical_distribution(labels, 1000)
    assert_close(got, np.bincount(labels.ravel(), minlength=1000) / labels.size, ulp=1, dtype=np.float32)
    assert got.dtype == np.float32


@pytest.mark.grid
def test_empirical_distribution_with_weights(rng: np.random.Generator):
    labels, weights = rng.integers(0, 5, size=64), (rng.integers(0, 9, size=64) / 8).astype(np.float32)
    want = np.bincount(labels, weights, minlength=5) / weights.sum()
    assert_close(info.empirical_distribution(labels, 5, weights=weights), want, ulp=2, dtype=np.float32)
    slope = jax.jacfwd(lambda w: info.empirical_distribution(labels, 5, weights=w))(weights)
    np.testing.assert_allclose(slope, (np.eye(5)[labels].T - want[:, None]) / weights.sum(), atol=1e-7)
    stacked = jax.vmap(lambda y: info.empirical_distribution(y, 5))(labels.reshape(4, 16))
    np.testing.assert_allclose(stacked.mean(axis=0), info.empirical_distribution(labels, 5), rtol=1e-6)


@pytest.mark.parametrize("label", [-1, 3, 127, -128])
def test_labels_out_of_range_have_no_distribution(label: int):
    labels = np.array([0, 1, label], np.int8)
    assert np.all(np.isnan(info.empirical_distribution(labels, 3)))
    np.testing.assert_array_equal(info.empirical_distribution(labels, 3, weights=f32([1, 1, 0])), [0.5, 0.5, 0])
    slope = jax.jacfwd(lambda w: info.empirical_distribution(labels, 3, weights=w))(f32([1, 1, 0]))
    np.testing.assert_array_equal(slope[:, 2], [0, 0, 0])
    for weight in (-1, np.inf, np.nan):
        assert np.all(np.isnan(info.empirical_distribution(labels[:2], 3, weights=f32([2, weight]))))
    assert np.all(np.isnan(info.empirical_distribution(labels[:0], 3)))
    assert np.all(np.isnan(info.empirical_distribution(labels[:2], 3, weights=f32([0, 0]))))


@pytest.mark.parametrize("dtype", [None, np.int64, np.float16, np.float32])
def test_sums_beyond_2_to_the_24(dtype: Any):
    """A float32 sum of ones stops there, and one of thirds loses digits long before."""
    labels = np.repeat(np.array([0, 1], np.int8), [30_000_000, 10_000_000])
    weights = None if dtype is None else np.ones(labels.size, dtype)
    np.testing.assert_array_equal(info.empirical_distribution(labels, 2, weights=weights), f32([0.75, 0.25]))


@pytest.mark.parametrize("count", [3, 70_000])
def test_weights_add_up_without_rounding(count: int, rng: np.random.Generator):
    """As many lanes as there are entries, or so few that each has many steps; weights over twelve orders."""
    labels = rng.integers(0, count, size=200_000)
    weights = np.exp(rng.uniform(-28, 0, labels.size)).astype(np.float32)
    sums = np.bincount(labels, weights.astype(np.float64), minlength=count)
    got = info.empirical_distribution(labels, count, weights=weights)
    assert_close(got, sums / sums.sum(), ulp=1, dtype=np.float32)


def test_weights_of_64_bits_from_the_host():
    for weights in (np.array([2**33, 2**34]), np.array([2**63 - 1, 2**63 - 1]), np.array([2**63, 2**63], np.uint64)):
        want = weights.astype(np.float64) / weights.astype(np.float64).sum()
        got = info.empirical_distribution(np.array([0, 1]), 2, weights=weights)
        np.testing.assert_allclose(got, want, rtol=1e-7)


@pytest.mark.grid
def test_a_joint_table(rng: np.random.Generator):
    x, y, z = rng.integers(0, 3, size=(3, 5, 40))
    weights = rng.random((5, 40)).astype(np.float32)
    for w in (None, weights):
        bins = [np.arange(n + 1) for n in (3, 4, 5)]
        want, _ = np.histogramdd([v.ravel() for v in (x, y, z)], bins, weights=None if w is None else w.ravel())
        got = info.empirical_distribution((x.astype(np.int8), y, z.astype(np.uint32)), (3, 4, 5), weights=w)
        assert_close(got, want / want.sum(), ulp=2, dtype=np.float32)
    one = info.empirical_distribution((x,), (3,))
    np.testing.assert_array_equal(one, info.empirical_distribution(x, 3))
    # A tuple of labels with one number of classes is an array like any other.
    np.testing.assert_array_equal(info.empirical_distribution((0, 2, 2, 1), 3), [0.25, 0.25, 0.5])
    assert np.all(np.isnan(info.empirical_distribution((x, y - 1), (3, 3))))
    counted = (x >= 0) & (y > 0)
    got = info.empirical_distribution((x, y - 1), (3, 3), weights=counted.astype(np.float32))
    np.testing.assert_allclose(got, info.empirical_distribution((x[counted], y[counted] - 1), (3, 3)), rtol=1e-6)


@pytest.mark.grid
def test_the_table_inside_transformations(rng: np.random.Generator):
    x, y = rng.integers(0, 3, size=(2, 4, 32))
    w = rng.random((4, 32)).astype(np.float32)

    def table(x: Any, y: Any, w: Any) -> jax.Array:
        return info.empirical_distribution((x, y), (3, 3), weights=w)

    want = [table(*row) for row in zip(x, y, w, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(table))(x, y, w), want, rtol=1e-6)
    slope = jax.grad(lambda w: info.mutual_information(table(x, y, w)))(w)
    cell = np.asarray(x * 3 + y)
    p = np.asarray(table(x, y, w), np.float64).ravel()
    gradient = jax.grad(lambda p: info.mutual_information(p.reshape(3, 3)))(p.astype(np.float32))
    want = (gradient[cell] - np.sum(gradient * p)) / w.sum()
    np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-7)


BAD = {
    "one count": (
        ((np.array([0, 1]), np.array([1, 0])), 2),
        TypeError,
        "`num_classes` must be a tuple of 2 counts, one for each array of `labels`",
    ),
    "array": ((np.array([0, 1]), (2, 2)), TypeError, "`labels` must be a tuple of 2 arrays, as `num_classes` says"),
    "one array of two": (
        ((np.array([0]),), (2, 2)),
        TypeError,
        "`labels` must be a tuple of 2 arrays, as `num_classes` says",
    ),
    "shapes": (((np.array([0]), np.array([0, 1])), (2, 2)), ValueError, r"`labels\[1\]` must have shape \(1,\)"),
    "floats": (((np.array([0]), np.array([0.5])), (2, 2)), TypeError, r"`labels\[1\]` must have an integer dtype"),
    "no classes": (((np.array([0]), np.array([0])), (2, 0)), ValueError, "`num_classes` must be at least 1, got 0"),
    "too many": (((np.array([0]), np.array([0])), (2**16, 2**16)), ValueError, r"a product below 2\*\*31"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str):
    arguments, error, match = BAD[name]
    with pytest.raises(error, match=match):
        info.empirical_distribution(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# What entropy means


def huffman_lengths(counts: dict[int, int]) -> dict[int, int]:
    heap = [(n, i, {symbol: 0}) for i, (symbol, n) in enumerate(counts.items())]
    heapq.heapify(heap)
    while len(heap) > 1:
        (n_a, i, a), (n_b, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (n_a + n_b, i, {s: depth + 1 for s, depth in (a | b).items()}))
    return heap[0][2]


@pytest.mark.parametrize("module", [heapq, string, inspect])
def test_no_code_is_shorter_than_the_entropy(module: Any):
    """Shannon's source coding theorem on real bytes: H <= L < H + 1, for Huffman's code and for Shannon's lengths."""
    data = inspect.getsource(module).encode()
    p = info.empirical_distribution(np.frombuffer(data, np.uint8), 256)
    bits = float(info.entropy(p, base=2))
    lengths = huffman_lengths(collections.Counter(data))
    assert sum(2.0**-n for n in lengths.values()) == 1, "Kraft: a complete prefix code"
    huffman = sum(lengths[b] for b in data) / len(data)
    used = np.asarray(p) > 0
    shannon_lengths = np.ceil(info.self_information(p[used], base=2))
    assert np.sum(2.0**-shannon_lengths) <= 1, "Kraft: a prefix code with these lengths exists"
    shannon = float(np.sum(p[used] * shannon_lengths))
    assert bits <= huffman <= shannon < bits + 1
    uniform = np.full(256, 1 / 256, np.float32)
    assert float(info.cross_entropy(p, uniform, base=2)) == pytest.approx(8, rel=1e-6)
    assert float(info.kl_divergence(p, uniform, base=2)) == pytest.approx(8 - bits, rel=1e-5)
