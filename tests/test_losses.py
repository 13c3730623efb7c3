"""Values of the losses on logits, against the oracles and against the formulas of the design."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import (
    DTYPES,
    OPTIONS,
    REDUCTIONS,
    covering,
    draw_labels,
    draw_logits,
    nll_loss,
    options_and_dtypes,
    precision,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
)
from oracles import assert_close

from jaxent import WeightedSum

pytestmark = pytest.mark.usefixtures("one_device")


@functools.cache
def all_reductions(static: tuple[tuple[str, Any], ...], reductions: tuple[str, ...]) -> Any:
    return jax.jit(
        lambda z, traced: {r: softmax_cross_entropy(z, **traced, **dict(static), reduction=r) for r in reductions}
    )


def losses_under(logits: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every reduction that the arguments allow, in one program."""
    reductions = ("mean",) if "denominator" in arguments else REDUCTIONS
    static = {k: arguments[k] for k in ("ignore_index", "axis", "label_smoothing", "z_loss") if k in arguments}
    traced = {k: v for k, v in arguments.items() if k not in static}
    return all_reductions(tuple(static.items()), reductions)(logits, traced)


def check_losses(logits: np.ndarray, arguments: dict[str, Any], *, ulp: float, dtype: Any, where: Any = "") -> None:
    oracle: Any = oracles.softmax_cross_entropy
    want = oracle(logits, **arguments)
    for reduction, got in losses_under(logits, arguments).items():
        expected = want.reduced(reduction)
        if isinstance(got, WeightedSum):
            assert_close(got.weight, expected[1], ulp=ulp, dtype=dtype, where=where)
            got, expected = got.total, expected[0]
        assert got.dtype == dtype
        assert_close(got, expected, ulp=ulp, dtype=dtype, where=where)


@pytest.mark.parametrize(("option", "dtype"), options_and_dtypes())
def test_every_option_and_reduction(option: str, dtype: str, rng: np.random.Generator):
    kind, result, ulp, _ = DTYPES[dtype]
    with precision(kind):
        check_losses(draw_logits(rng, (7, 5), kind), OPTIONS[option](rng, (7, 5)), ulp=ulp, dtype=result)


SHAPES = [
    *(((0, 5), -1), ((2, 0, 3), -1), ((3, 1), -1), ((1, 1), -1), ((7,), -1), ((5,), 0), ((6, 2), -1)),
    *(((2, 3, 5), -1), ((1, 5, 1), -2), ((5, 3), 0), ((2, 5, 3, 4), 1)),
]


@pytest.mark.parametrize(("of", "option"), covering(SHAPES, ["everything", "probabilities_everything"]))
def test_shapes(of: tuple[tuple[int, ...], int], option: str, rng: np.random.Generator):
    shape, axis = of
    last = (*np.delete(shape, axis), shape[axis])
    arguments = OPTIONS[option](rng, last)
    if np.issubdtype(arguments["targets"].dtype, np.floating):
        arguments["targets"] = np.moveaxis(arguments["targets"], -1, axis)
    check_losses(draw_logits(rng, shape), {**arguments, "axis": axis}, ulp=4, dtype=np.float32)


@pytest.mark.parametrize(
    ("count", "rows"),
    covering([1, 2, 10, 255, 256, 257, 1000, 2049, 4096, 4099, 32768, 32769, 50257, 65537], [5, 1]),
)
def test_class_counts(count: int, rows: int, rng: np.random.Generator):
    z, labels = draw_logits(rng, (rows, count)), draw_labels(rng, (rows,), count)
    z[-1, labels[-1]] = 12.0  # the label holds the maximum
    labels[0] = count - 1

    @jax.jit
    def rows_and_gradient(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, pull = jax.vjp(lambda z: softmax_cross_entropy(z, labels, reduction="none"), z)
        return losses, pull(jnp.ones_like(losses))[0]

    got, gradient = rows_and_gradient(z)
    want = [oracles.long_row_nll(z[n], labels[n]) for n in range(rows)]
    ulp = ulp_of_long_rows(count)
    assert_close(got, [value for value, _ in want], ulp=ulp, dtype=np.float32)
    assert_close(gradient, np.stack([g for _, g in want]), ulp=ulp, dtype=np.float32)


def ulp_of_long_rows(count: int) -> float:
    """A pairwise float32 sum over n terms of one sign is off by at most log2(n) / 2 ulp, and `exp` by 1 or 2."""
    return 4 + np.log2(count) / 2


@pytest.mark.parametrize("count", [1, 2, 10, 1000, 4096, 4099, 4106, 32768, 32771, 50257, 65537])
def test_class_counts_without_a_gradient(count: int, rng: np.random.Generator):
    labels = np.unique(np.clip([0, 255, 256, count // 2 - 1, count // 2, count - 257, count - 1], 0, count - 1))
    labels = np.repeat(labels, 4)
    losses = jax.jit(lambda z: softmax_cross_entropy(z, labels, reduction="none"))
    z = draw_logits(rng, (len(labels), count))
    for maximum in (False, True):
        if maximum:
            z[np.arange(len(labels)), labels] = 40.0  # a loss of 1e-15 or so
        want = [oracles.long_row_nll(z[n], label)[0] for n, label in enumerate(labels)]
        # At 40 the difference of two logits is rounded by up to 2e-6, and the loss with it.
        assert_close(losses(z), want, ulp=ulp_of_long_rows(count) + 16 * maximum, dtype=np.float32, where=maximum)


@pytest.mark.parametrize("shape", [(2**19, 9), (1031, 4099), (67, 65537)])
def test_many_logits_are_summed_in_blocks(shape: tuple[int, int], rng: np.random.Generator):
    z, labels = draw_logits(rng, shape), draw_labels(rng, shape[:1], shape[1])
    rows = np.arange(len(labels))
    z[::3][np.arange(len(labels[::3])), labels[::3]] = 40.0  # a loss of 1e-15 or so
    wide = z.astype(np.float64)
    largest = wide.max(-1)
    others = np.exp(wide - largest[:, None])
    others[rows, labels] = 0
    rest = others.sum(-1) + np.expm1(wide[rows, labels] - largest)
    want = largest - wide[rows, labels] + np.log1p(rest)
    z[5], labels[5], want[5] = np.nan, -100, 0
    losses = jax.jit(lambda z: softmax_cross_entropy(z, labels, reduction="none"))(z)
    np.testing.assert_allclose(losses, want, rtol=1e-5 if shape[1] > 10 else 2e-6)


@pytest.mark.parametrize("count", [4, 4096])
@pytest.mark.parametrize("apply", [lambda f: f, jax.vmap], ids=["batched", "vmap"])
def test_losses_large_and_tiny_side_by_side(count: int, apply: Any):
    # Rows are counted from the label's logit, and again from their maximum when a loss above 62 nats overflows there.
    inf, nan = np.inf, np.nan
    rows = [
        *([0, 1, 2, -1], [0, -41.0, -42.0, -inf], [-41.0, -41.0, 0, -41.0], [-61.0, 0, 0, 0], [-63.0, 0, -1.0, 0]),
        *([-90.0, 0, -1.0, 0], [-1e4, 1, 1, 1], [1e30, 0, 2e30, 0], [0, 0, 0, 0], [-1e38, 0, 1e38, 0]),
        *([-inf, 0, 1, -inf], [-inf, -inf, -inf, -inf], [inf, 0, 0, 0], [0, inf, 0, 0], [nan, 0, 0, 0], [0, 0, nan, 0]),
        *([nan, 0, inf, 0], [0, 100.0, 200.0, 0]),
    ]
    z = np.full((len(rows), count), -inf, np.float32)
    z[:, :4] = rows
    labels = np.zeros(len(rows), np.int32)
    labels[-2:] = -100, 7777
    want = oracles.softmax_cross_entropy(z[:, :4], np.where(labels == 7777, 0, labels)).losses
    want[-1] = nan
    program = jax.jit(apply(lambda z, labels: softmax_cross_entropy(z, labels, reduction="none")))
    assert_close(program(z, labels), want, ulp=8, dtype=np.float32)
    usual = np.s_[:3]  # and where nothing has to be counted again
    assert_close(program(z[usual], labels[usual]), want[usual], ulp=8, dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 10, 33])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_at_many_sizes(option: str, count: int, dtype: str, rng: np.random.Generator):
    kind, result, ulp, _ = DTYPES[dtype]
    with precision(kind):
        for rows in (1, 2, 9):
            shape = (rows, count)
            check_losses(draw_logits(rng, shape, kind), OPTIONS[option](rng, shape), ulp=ulp, dtype=result)


# ----------------------------------------------------------------------------------------------------------------------
# Shifts and magnitudes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_common_shift_changes_nothing(dtype: Any, rng: np.random.Generator):
    rows = draw_logits(rng, (6, 5), dtype)
    with precision(dtype):
        for shift in (-50.0, 1e4, -1e4, 1e30, -1e30):
            z = (rows + dtype(shift)).astype(dtype)
            check_losses(z, {"targets": draw_labels(rng, (6,), 5)}, ulp=4, dtype=dtype, where=shift)


def test_logits_near_ten_thousand():
    # logsumexp(z) - z_y gives 2.40723.
    z = np.array([[10000.0, 10001.0, 10002.0]], np.float32)
    got = softmax_cross_entropy(z, np.array([0]))
    assert_close(got, np.log(1 + np.exp(1.0) + np.exp(2.0)), ulp=2, dtype=np.float32)


def test_options_that_are_not_binary_fractions():
    # 0.1 is rounded to float32 before it is used.
    z = np.array([[0.5, -1.5, 2.0]], np.float32)
    targets = np.array([1])
    want = oracles.softmax_cross_entropy(
        z, targets, label_smoothing=float(np.float32(0.1)), z_loss=float(np.float32(1e-4))
    )
    got = softmax_cross_entropy(z, targets, label_smoothing=0.1, z_loss=1e-4)
    assert_close(got, want.mean, ulp=4, dtype=np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# The worked example of the design: target [0, 0, 1], probabilities [0.3, 0.3, 0.4]

NATS, BITS = 0.9162907318741551, 1.3219280948873624


@pytest.mark.usefixtures("x64")
def test_the_worked_example():
    p = np.array([0.3, 0.3, 0.4])
    one_hot = np.array([0.0, 0.0, 1.0])
    assert_close(nll_loss(np.log(p), 2), NATS, ulp=1, dtype=np.float64)
    assert_close(nll_loss(np.log2(p), 2), BITS, ulp=1, dtype=np.float64)
    assert_close(NATS / np.log(2), BITS, ulp=1, dtype=np.float64)
    assert_close(softmax_cross_entropy(np.log(p), 2), NATS, ulp=2, dtype=np.float64)
    assert_close(softmax_cross_entropy(np.log(p), one_hot), NATS, ulp=2, dtype=np.float64)
    # The tutorial's mistake: probabilities taken for logits, under either label.
    assert_close(softmax_cross_entropy(p, 1), np.log(2 + np.exp(0.1)), ulp=2, dtype=np.float64)
    assert_close(softmax_cross_entropy(p, 2), np.log(1 + 2 * np.exp(-0.1)), ulp=2, dtype=np.float64)
    assert round(float(softmax_cross_entropy(p, 1)), 4) == 1.1331
    assert round(float(softmax_cross_entropy(p, 2)), 4) == 1.0331


def test_the_worked_example_in_float32():
    p = np.array([0.3, 0.3, 0.4], np.float32)
    assert_close(nll_loss(np.log(p), 2), -np.log(np.float64(p[2])), ulp=1, dtype=np.float32)
    assert round(float(nll_loss(np.log(p), 2)), 4) == 0.9163


# ----------------------------------------------------------------------------------------------------------------------
# nll_loss and sigmoid_cross_entropy


@pytest.mark.parametrize(
    ("option", "axis"),
    covering(["plain", "where", "weights", "class_weights", "ignore_-100", "ignore_a_class"], [-1, 0]),
)
def test_nll_loss(option: str, axis: int, rng: np.random.Generator):
    log_p = draw_logits(rng, (7, 5)) - np.float32(8)
    arguments = OPTIONS[option](rng, (7, 5))
    labels = arguments.pop("targets")
    weights = np.ones(7) * arguments.get("weights", 1) * arguments.get("class_weights", np.ones(5))[labels.clip(0)]
    weights *= arguments.get("where", True) * (labels != arguments.get("ignore_index", -100))
    losses = -weights * log_p.astype(np.float64)[np.arange(7), labels.clip(0)]
    want = {"mean": losses.sum() / weights.sum(), "sum": losses.sum(), "none": losses}
    for reduction, value in want.items():
        got = nll_loss(np.moveaxis(log_p, -1, axis), labels, axis=axis, reduction=reduction, **arguments)
        assert_close(got, value, ulp=4, dtype=np.float32)
    pair = nll_loss(np.moveaxis(log_p, -1, axis), labels, axis=axis, reduction="sum_and_weight", **arguments)
    assert_close(pair.weight, weights.sum(), ulp=0, dtype=np.float32)
    got = nll_loss(np.moveaxis(log_p, -1, axis), labels, axis=axis, denominator=3.0, **arguments)
    assert_close(got, losses.sum() / 3, ulp=4, dtype=np.float32)


# exp(-86) is a normal float32; what is below the smallest normal number may be flushed to zero.
SIGMOID_LOGITS = [-1e30, -1e4, -104.0, -86.0, -20.0, -1.0, -0.0625, 0.0, 1e-8, 0.5, 3.0, 20.0, 86.0, 1e4, 1e30]


@pytest.mark.parametrize(("pos_weight", "dtype"), covering([None, 2.5, 0.0], [np.float32, np.float64]))
def test_sigmoid_cross_entropy(pos_weight: float | None, dtype: Any):
    scale = 1.0 if pos_weight is None else pos_weight
    with precision(dtype):
        z = np.array(SIGMOID_LOGITS, dtype)

        @jax.jit
        def ways(t: Any) -> Any:
            def loss(z: Any) -> Any:
                return sigmoid_cross_entropy(z, t, pos_weight=pos_weight, reduction="sum")

            losses = sigmoid_cross_entropy(z, t, pos_weight=pos_weight, reduction="none")
            return losses, jax.grad(loss)(z), jax.jacfwd(loss)(z)

        for target in (0.0, 0.25, 1.0):
            want = np.array([oracles.sigmoid_cross_entropy(v, target, scale) for v in z])
            losses, *slopes = ways(np.full_like(z, target))
            assert_close(losses, want[:, 0], ulp=3, dtype=dtype, where=target)
            for slope in slopes:  # its two terms cancel near its zero
                assert_close(slope, want[:, 1], ulp=4, dtype=dtype, size=0 if target != 0.25 else 1.0, where=target)


def test_sigmoid_reductions_and_weights(rng: np.random.Generator):
    z = draw_logits(rng, (4, 3))
    t = rng.integers(0, 2, size=(4, 3))
    weights = rng.integers(0, 4, size=(4, 3)) / 2
    where = rng.random((4, 3)) < 0.7
    pos_weight = np.array([0.5, 1.0, 3.0])
    each = np.array([oracles.sigmoid_cross_entropy(a, b, c)[0] for a, b, c in np.nditer([z, t, pos_weight])])
    counted = weights * where
    losses = each.reshape(4, 3) * counted
    want = {"mean": losses.sum() / counted.sum(), "sum": losses.sum(), "none": losses}
    for targets in (t, t.astype(bool), t.astype(np.float32)):
        for reduction, value in want.items():
            got = sigmoid_cross_entropy(
                z, targets, weights=weights, where=where, pos_weight=pos_weight, reduction=reduction
            )
            assert_close(got, value, ulp=4, dtype=np.float32)
    pair = sigmoid_cross_entropy(z, t, weights=weights, where=where, reduction="sum_and_weight")
    assert_close(pair.weight, counted.sum(), ulp=0, dtype=np.float32)
    got = sigmoid_cross_entropy(z, t, weights=weights, where=where, pos_weight=pos_weight, denominator=7)
    assert_close(got, losses.sum() / 7, ulp=4, dtype=np.float32)
