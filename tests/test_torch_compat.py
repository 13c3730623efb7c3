"""`jaxent.torch_compat` behaves as PyTorch: its warnings, its types, its classes."""

import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracles import assert_close

from jaxent import torch_compat

nn: Any = torch_compat  # as people write it; untyped, since tables of options are dictionaries


# ----------------------------------------------------------------------------------------------------------------------
# Warnings


LEGACY = [
    (True, None, "mean"),
    (False, None, "sum"),
    (None, True, "mean"),
    (None, False, "none"),
    (True, True, "mean"),
    (True, False, "none"),
    (False, True, "sum"),
    (False, False, "none"),
]
PROBABILITIES = np.array([[0.25, 0.5, 0.25], [0.5, 0.125, 0.375]], np.float32)
PAIRS = {
    ("cross_entropy", "CrossEntropyLoss"): (np.log(PROBABILITIES), np.array([1, 2])),
    ("nll_loss", "NLLLoss"): (np.log(PROBABILITIES), np.array([1, 2])),
    ("kl_div", "KLDivLoss"): (np.log(PROBABILITIES), PROBABILITIES[::-1]),
    ("binary_cross_entropy", "BCELoss"): (PROBABILITIES, PROBABILITIES[::-1]),
    ("binary_cross_entropy_with_logits", "BCEWithLogitsLoss"): (np.log(PROBABILITIES), PROBABILITIES[::-1]),
}


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: names[0])
def test_deprecated_flags_override_the_reduction_and_warn(names: tuple[str, str]):
    function, module = getattr(nn, names[0]), getattr(nn, names[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kl_div: reduction='mean'", UserWarning)
        want = {r: np.asarray(function(*PAIRS[names], reduction=r)) for r in ("mean", "sum", "none")}
    assert not np.allclose(want["mean"], want["sum"])
    for size_average, reduce, reduction in LEGACY:
        flags = {"size_average": size_average, "reduce": reduce, "reduction": "none" if reduction == "sum" else "sum"}
        with pytest.warns(DeprecationWarning, match=f"reduction='{reduction}'") as caught:
            got, criterion = function(*PAIRS[names], **flags), module(**flags)
        assert [w.filename for w in caught] == [__file__] * 2
        np.testing.assert_array_equal(got, want[reduction])
        assert criterion.reduction == reduction
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = function(*PAIRS[names], reduction="elementwise_mean")
    assert "elementwise_mean" in str(caught[0].message)
    np.testing.assert_array_equal(got, want["mean"])


def test_a_mean_of_kl_terms_warns_and_batchmean_is_the_divergence():
    log_q, p = PAIRS["kl_div", "KLDivLoss"]
    divergence = np.sum(p * (np.log(p) - log_q)) / 2
    with pytest.warns(UserWarning, match="batchmean") as caught:
        assert_close(nn.kl_div(log_q, p), divergence / 3, ulp=4, dtype=np.float32)
    assert caught[0].filename == __file__
    assert_close(nn.KLDivLoss(reduction="batchmean")(log_q, p), divergence, ulp=4, dtype=np.float32)
    # The flags replace the sum, and the division by the batch stays.
    with pytest.warns(DeprecationWarning, match="reduction='mean'"):
        got = nn.kl_div(log_q, p, size_average=True, reduction="batchmean")
    assert_close(got, divergence / 6, ulp=4, dtype=np.float32)


def test_a_target_of_zero_adds_nothing_to_the_derivatives():
    x, t = np.array([-2.0, 3.0, 0.5], np.float32), np.array([0.0, 0.0, 0.25], np.float32)
    by_x, by_t = jax.grad(functools.partial(nn.kl_div, reduction="sum"), (0, 1))(x, t)
    assert_close(by_x, -t, ulp=0, dtype=np.float32)
    assert_close(by_t, [0, 0, np.log(0.25) + 1 - 0.5], ulp=4, dtype=np.float32)  # nan at 0 in PyTorch


@pytest.mark.parametrize(("shape", "dim"), [((), 0), ((3,), 0), ((2, 3), 1), ((2, 3, 2), 0), ((1, 3, 1, 2), 1)])
def test_softmax_without_a_dim_takes_the_one_of_pytorch_and_warns(shape: tuple[int, ...], dim: int):
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    for function, module in ((nn.softmax, nn.Softmax), (nn.log_softmax, nn.LogSoftmax)):
        with pytest.warns(UserWarning, match="Implicit dimension") as caught:
            got = [function(x), module()(x)]
        assert {w.filename for w in caught} == {__file__}
        for result in (*got, module(dim)(x)):
            np.testing.assert_array_equal(result, function(x, dim))


# ----------------------------------------------------------------------------------------------------------------------
# Types


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
def test_the_type_of_the_result():
    half, brain, single, double = np.float16, ml_dtypes.bfloat16, np.float32, np.float64

    def ones(dtype: Any, *shape: int) -> np.ndarray:
        return np.ones(shape, dtype)

    def kl(*args: Any) -> jax.Array:
        return nn.kl_div(*args, reduction="sum")

    sigmoid, label, row = nn.binary_cross_entropy_with_logits, np.array([0]), (1, 2)
    table = [
        (nn.cross_entropy(ones(brain, *row), label), brain),
        (nn.cross_entropy(ones(single, *row), label, weight=ones(double, 2)), single),  # PyTorch raises
        (nn.cross_entropy(ones(single, *row), ones(double, *row)), double),
        (nn.cross_entropy(ones(brain, *row), ones(half, *row)), single),
        (nn.cross_entropy(ones(single, *row), ones(single, *row), weight=ones(double, 2)), double),
        (nn.nll_loss(ones(half, *row), label), half),
        (kl(ones(single, 3), ones(double, 3)), double),
        (kl(ones(single, 3), ones(double)), single),
        (kl(ones(single), ones(double)), double),
        (nn.binary_cross_entropy(ones(half, 3), ones(half, 3), weight=ones(double, 3)), half),
        (sigmoid(ones(single, 3), ones(double, 3)), double),
        (sigmoid(ones(double, 3), ones(single, 3)), single),
        (sigmoid(ones(single, 3), ones(single, 3), weight=ones(double, 3), pos_weight=ones(double, 3)), single),
        (sigmoid(ones(half, 3), ones(bool, 3)), half),  # PyTorch raises
        (nn.softmax(ones(brain, 3), 0), brain),
        (nn.softmax(ones(np.int32, 3), 0, dtype=jnp.float16), half),
        (nn.log_softmax(ones(half, 3), 0, dtype="float64"), double),
        (nn.linear_cross_entropy(ones(brain, *row), ones(brain, 3, 2), label), brain),
        (nn.linear_cross_entropy(ones(half, *row), ones(half, 3, 2, 2), label[:, None] + [[0, 1]]), half),
    ]
    for at, (result, dtype) in enumerate(table):
        assert result.dtype == dtype, at
    # The cast to `dtype` comes before the softmax.
    assert np.isnan(nn.softmax(np.array([1e5, 0.0]), 0, dtype=jnp.float16)).all()


def test_labels_of_every_integer_type():
    z = np.log(PROBABILITIES)
    want = -z[[0, 1], [1, 2]]
    for dtype in (np.int8, np.uint8, np.int16, np.uint32, np.int32):
        got = nn.cross_entropy(z, np.array([1, 2], dtype), reduction="none")
        assert_close(got, want, ulp=6, dtype=np.float32)
    assert_close(nn.cross_entropy(z, np.array([1, 255], np.uint8), ignore_index=255), want[0], ulp=6, dtype=np.float32)


def test_a_label_out_of_range_is_nan_where_pytorch_raises():
    z, labels = np.log(PROBABILITIES), np.array([1, 3])
    for loss in (nn.cross_entropy, nn.nll_loss, functools.partial(nn.cross_entropy, label_smoothing=0.1)):
        np.testing.assert_array_equal(np.isnan(loss(z, labels, reduction="none")), [False, True])
    for x in (-0.25, 1.25, np.nan):
        value, gradients = jax.value_and_grad(nn.binary_cross_entropy, (0, 1))(np.float32(x), np.float32(0.5))
        assert np.isnan([value, gradients[0]]).all()
    assert np.isnan(nn.binary_cross_entropy(np.float32(0.5), np.float32(1.25)))


def test_no_ignore_index_ignores_nothing():
    z, labels = np.log(PROBABILITIES), np.array([1, -100])
    for function in (nn.cross_entropy, nn.nll_loss):
        np.testing.assert_array_equal(np.isnan(function(z, labels, ignore_index=None, reduction="none")), [False, True])
    want = nn.cross_entropy(z, PROBABILITIES)
    assert_close(nn.cross_entropy(z, PROBABILITIES, ignore_index=None), want, ulp=1, dtype=np.float32)
    assert_close(nn.CrossEntropyLoss(ignore_index=None)(z, PROBABILITIES), want, ulp=1, dtype=np.float32)


def test_a_binary_target_out_of_range_goes_into_pytorchs_formula():
    z, t = np.array([1.0, -2.0, 0.5], np.float32), np.array([255.0, -1.0, 1.5], np.float32)
    wide = z.astype(np.float64)
    want = np.logaddexp(0, wide) - t * wide
    assert_close(nn.binary_cross_entropy_with_logits(z, t, reduction="none"), want, ulp=4, dtype=np.float32, size=300)


@pytest.mark.parametrize(("z", "t"), [(20.0, 0.0), (15.0, 1.0), (-25.0, 0.5), (1.0, 2.0)])
def test_higher_derivatives_of_the_binary_loss_far_out(z: float, t: float):
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    third = jax.grad(jax.hessian(nn.binary_cross_entropy_with_logits))
    got = jax.jit(lambda z: (jax.hessian(nn.binary_cross_entropy_with_logits)(z, t), third(z, t)))(z)
    np.testing.assert_allclose(got, [p * q, p * q * (q - p)], rtol=1e-5)


def test_forward_mode_at_the_ends_of_a_probability():
    x, t = np.array([0.0, 0.5, 1.0], np.float32), np.array([0.5, 0.25, 1.0], np.float32)
    loss = functools.partial(nn.binary_cross_entropy, reduction="none")
    by_t = jax.jacfwd(loss, 1)(x, t)
    np.testing.assert_array_equal(by_t, jax.jacrev(loss, 1)(x, t))
    np.testing.assert_array_equal(by_t, np.diag([np.inf, 0, -np.inf]).astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# The classes


def test_the_classic_snippet():
    outputs, labels = np.log(PROBABILITIES), np.array([1, 2])
    criterion = nn.CrossEntropyLoss()
    loss = criterion(outputs, labels)
    assert_close(loss, -np.log([0.5, 0.375]).mean(), ulp=4, dtype=np.float32)


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: names[0])
def test_a_class_is_its_function_with_the_options_kept(names: tuple[str, str]):
    function, module = getattr(nn, names[0]), getattr(nn, names[1])
    weight = np.array([0.5, 2.0, 1.0], np.float32)
    options = {
        "weight": weight,
        "ignore_index": 1,
        "label_smoothing": 0.25,
        "pos_weight": 3 * weight,
        "log_target": True,
    }
    taken = {k: v for k, v in options.items() if k in inspect.signature(module).parameters}
    criterion = module(**taken, reduction="sum")
    want = function(*PAIRS[names], **taken, reduction="sum")
    np.testing.assert_array_equal(criterion(*PAIRS[names]), want)
    assert_close(jax.jit(criterion)(*PAIRS[names]), want, ulp=4, dtype=np.float32)
    assert_close(jax.jit(lambda c, *args: c(*args))(criterion, *PAIRS[names]), want, ulp=4, dtype=np.float32)
    leaves = [v for k, v in taken.items() if k.endswith("weight")]
    assert all(a is b for a, b in zip(jax.tree.leaves(criterion), leaves, strict=True))
    with pytest.raises(AttributeError):
        criterion.reduction = "mean"


def test_derivatives_with_respect_to_class_weights_of_a_criterion():
    z, labels = np.log(PROBABILITIES), np.array([1, 2])
    criterion = nn.CrossEntropyLoss(weight=jnp.array([1.0, 2.0, 3.0]))
    nll = -np.log([0.5, 0.375])
    mean = (2 * nll[0] + 3 * nll[1]) / 5
    gradient = jax.grad(lambda c: c(z, labels))(criterion)
    assert type(gradient) is nn.CrossEntropyLoss
    assert_close(gradient.weight, [0, (nll[0] - mean) / 5, (nll[1] - mean) / 5], ulp=8, dtype=np.float32, size=0.1)
    several = jax.vmap(lambda c: c(z, labels))(nn.CrossEntropyLoss(weight=jnp.array([[1.0, 2, 3], [5, 1, 1]])))
    assert_close(several, [mean, nll.mean()], ulp=4, dtype=np.float32)


def test_classes_are_equal_and_hashed_by_their_options():
    weight = jnp.ones(3)
    same = [
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss()),
        (nn.CrossEntropyLoss(weight, label_smoothing=0.5), nn.CrossEntropyLoss(weight=weight, label_smoothing=0.5)),
        (nn.Softmax(1), nn.Softmax(dim=1)),
    ]
    for a, b in same:
        assert a == b
        assert hash(a) == hash(b)
    others = [
        nn.NLLLoss(),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(weight),
        nn.CrossEntropyLoss(jnp.ones(3)),
    ]
    assert len({nn.CrossEntropyLoss(), *others, *others}) == 5
    assert nn.Softmax(1) != nn.LogSoftmax(1)
