"""`jaxent.torch_compat` against results of PyTorch that `golden/make_torch_golden.py` has written down."""

import dataclasses
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, precision
from oracles import assert_close

from jaxent import torch_compat

nn: Any = torch_compat  # as people write it; untyped, since tables of options are dictionaries
GOLDEN = json.loads(Path(__file__).parent.joinpath("golden", "torch.json").read_text(encoding="utf-8"))

Derivatives = tuple[np.ndarray, tuple[np.ndarray, ...]]


def unpacked(x: Any, dtype: Any = np.float64) -> Any:
    if not isinstance(x, dict):
        return x
    array = np.array(x["data"], x["dtype"]).reshape(x["shape"])
    return array.astype(dtype) if x["dtype"] == "float64" else array


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One call, and what PyTorch returns in float64: the value, and its gradients weighted by a cotangent."""

    index: int
    packed: dict[str, Any] = dataclasses.field(hash=False, repr=False)

    @property
    def function(self) -> str:
        return self.packed["function"]

    @property
    def value(self) -> np.ndarray:
        return unpacked(self.packed["value"])

    @property
    def gradients(self) -> list[np.ndarray]:
        return [unpacked(g) for g in self.packed["gradients"]]

    def is_finite(self, *fields: str) -> bool:
        arrays = [x for field in fields for x in np.atleast_1d(self.packed[field])]
        return all(np.all(np.isfinite(x["data"])) for x in arrays)

    @property
    def fits_half_precision(self) -> bool:
        """Finite, with something to differentiate, and within the range of float16."""
        largest = max(map(abs, self.packed["gradients"][0]["data"]), default=0)
        return self.is_finite("args", "value", "gradients") and bool(self.packed["cotangent"]["data"]) and largest < 6e4

    def variables(self, dtype: Any) -> list[np.ndarray]:
        """What is differentiated: the floating arguments, and the bias of a linear loss."""
        args = [unpacked(a, dtype) for a in self.packed["args"]]
        bias = self.packed["options"].get("linear_bias")
        return [a for a in args if a.dtype == dtype] + ([] if bias is None else [unpacked(bias, dtype)])

    def differentiated(self, variables: list[Any], dtype: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def call(*variables: jax.Array) -> jax.Array:
            left = iter(variables)
            args = [unpacked(a, dtype) for a in self.packed["args"]]
            args = [next(left) if a.dtype == dtype else a for a in args]
            options = {k: unpacked(v, dtype) for k, v in self.packed["options"].items()}
            if "linear_bias" in options:
                options["linear_bias"] = next(left)
            return getattr(nn, self.function)(*args, **options)

        value, pull = jax.vjp(call, *variables)
        return value, pull(jnp.asarray(unpacked(self.packed["cotangent"], value.dtype)))


CASES = [GoldenCase(i, packed) for i, packed in enumerate(GOLDEN["cases"])]
# Cases that are compiled together: one program for each would take several times as long.
TOGETHER = 16


def golden_params() -> Iterator[Any]:
    """Every case in float64; in float32 and bfloat16 one in six of those that they can hold; the others are slow."""
    for function in sorted({case.function for case in CASES}):
        of_function = [case for case in CASES if case.function == function]
        narrow = [case for case in of_function if case.fits_half_precision]
        seldom = [case for i, case in enumerate(narrow) if i % 6]
        for dtype, cases, slow in (
            ("float64", of_function, False),
            *((dtype, narrow[::6], False) for dtype in ("float32", "bfloat16")),
            *((dtype, seldom, True) for dtype in ("float32", "bfloat16")),
            ("float16", narrow, True),
        ):
            for start in range(0, len(cases), TOGETHER):
                group = tuple(cases[start : start + TOGETHER])
                for case in group:
                    marks = [pytest.mark.slow] if slow else []
                    yield pytest.param(case, group, dtype, id=f"{function}-{case.index}-{dtype}", marks=marks)


@functools.cache
def derivatives(group: tuple[GoldenCase, ...], dtype: str) -> dict[int, Derivatives]:
    """Of all cases of a group, from one program."""
    kind = DTYPES[dtype][0]
    with precision(kind), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "kl_div: reduction='mean'", UserWarning)
        variables = [case.variables(kind) for case in group]
        program = jax.jit(lambda every: [c.differentiated(v, kind) for c, v in zip(group, every, strict=True)])
        return {case.index: found for case, found in zip(group, jax.device_get(program(variables)), strict=True)}


@pytest.mark.parametrize(("case", "group", "dtype"), list(golden_params()))
def test_values_and_gradients_are_those_of_pytorch(case: GoldenCase, group: tuple[GoldenCase, ...], dtype: str):
    value, gradients = derivatives(group, dtype)[case.index]
    assert value.dtype == DTYPES[dtype][0]
    if dtype == "float64":
        assert_equal_in_float64(case, value, gradients)
    else:
        assert_rounded_once(case, value, gradients, dtype)


def assert_equal_in_float64(case: GoldenCase, value: np.ndarray, gradients: tuple[np.ndarray, ...]) -> None:
    np.testing.assert_allclose(value, case.value, rtol=1e-12, atol=1e-12)
    if case.is_finite("args") or case.function not in ("kl_div", "binary_cross_entropy_with_logits"):
        for got, want in zip(gradients, case.gradients, strict=True):
            # A removed class without a share is as if it were not there; PyTorch's slope there is infinite.
            want = np.where(np.isinf(want) & (got == 0), 0, want) if case.function == "cross_entropy" else want
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def assert_rounded_once(case: GoldenCase, value: np.ndarray, gradients: tuple[np.ndarray, ...], dtype: str) -> None:
    """The sums are float32: terms that cancel are seen against the largest entry, and those of a softmax's gradient,
    `p (g - <p, g>)`, against `p g`: PyTorch's own float32 errs by 15 ulp.
    """
    kind, _, ulp, gradient_ulp = DTYPES[dtype]
    narrow = dtype != "float32"

    def close(got: np.ndarray, want: np.ndarray, unit: float, *terms: np.ndarray) -> None:
        largest = max(np.max(np.abs(x), initial=0) for x in (want, *terms))
        assert_close(got, want, ulp=0.51 if narrow else unit, dtype=kind, size=largest / (64 if narrow else 1))

    close(value, case.value, ulp)
    if narrow and case.function == "linear_cross_entropy":
        return  # rounded in the products too
    terms = [case.value * unpacked(case.packed["cotangent"])] if case.function == "softmax" else []
    for got, want in zip(gradients, case.gradients, strict=True):
        close(got, want, gradient_ulp, *terms)


def test_signatures_are_those_of_pytorch():
    for name, parameters in GOLDEN["signatures"].items():
        found = inspect.signature(getattr(nn, name)).parameters.values()
        assert [[p.name, p.kind.name, None if p.default is p.empty else p.default] for p in found] == parameters, name


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


# ----------------------------------------------------------------------------------------------------------------------
# The linear loss


def linear_case(
    rng: np.random.Generator, places: tuple[int, ...], targets: str
) -> tuple[Any, Any, Any, dict[str, Any]]:
    target = rng.integers(0, 3, size=(4, *places))
    if targets == "probabilities":
        target = np.moveaxis(rng.dirichlet(np.ones(3), size=(4, *places)), -1, 1)
    h, w = rng.normal(size=(4, 2)), rng.normal(size=(3, *places, 2))
    return (
        h,
        w,
        target,
        {"linear_bias": rng.normal(size=(3, *places)), "weight": rng.uniform(0.5, 2, 3), "label_smoothing": 0.125},
    )


@pytest.mark.grid
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("places", "targets"), [((), "probabilities"), ((2,), "probabilities"), ((2, 1), "labels")])
def test_the_linear_loss_has_the_derivatives_that_pytorchs_chunks_refuse(
    places: tuple[int, ...], targets: str, rng: np.random.Generator
):
    h, w, target, options = linear_case(rng, places, targets)
    chunked = nn.LinearCrossEntropyOptions(batch_chunk_size=3)

    def streamed(h: Any, w: Any, bias: Any) -> jax.Array:
        return nn.linear_cross_entropy(h, w, target, **options | {"linear_bias": bias}, options=chunked)

    def dense(h: Any, w: Any, bias: Any) -> jax.Array:
        z = jnp.einsum("nd,c...d->nc...", h, w) + bias[None]
        rest = {k: v for k, v in options.items() if k != "linear_bias"}
        return nn.cross_entropy(z, target, **rest)

    at = (h, w, options["linear_bias"])
    steps = tuple(rng.normal(size=x.shape) for x in at)
    both = [jax.jit(lambda f=f: jax.jvp(jax.value_and_grad(f, (0, 1, 2)), at, steps))() for f in (streamed, dense)]
    for got, want in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_chunks_as_pytorch_cuts_them():
    sizes = (8192, 4096, 128256)
    table: list[tuple[dict[str, Any], int | None]] = [
        ({}, None),
        ({"batch_chunk_size": 1000}, 1000),
        ({"batch_chunk_size": 10**6}, 8192),
        ({"chunking_method": None}, 8192),
        ({"chunking_method": "aspect_ratio"}, 256),
        ({"chunking_method": "aspect_ratio:2"}, 128),
        ({"chunking_method": "aspect_ratio:1000"}, 1),
        ({"chunking_method": "aspect_ratio:2", "batch_chunk_size": 128, "acc_policy": "compact"}, 128),
    ]
    for options, want in table:
        assert nn.LinearCrossEntropyOptions(**options).chunk_rows(*sizes) == want, options
    with pytest.raises(ValueError, match="agree"):
        nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio", batch_chunk_size=7).chunk_rows(*sizes)
    for wrong in ({"batch_chunk_size": 0}, {"chunking_method": "aspect_ratio:x"}, {"acc_policy": "fast"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            nn.LinearCrossEntropyOptions(**wrong)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_of_all_rows_are_never_held(reduction: str, rng: np.random.Generator):
    h, w, target, options = linear_case(rng, (7,), "labels")

    def loss(h: Any, w: Any) -> jax.Array:
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
        return jnp.sum(nn.linear_cross_entropy(h, w, target, **options, reduction=reduction, options=chunks))

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(h, w))
    assert "[2,3,7]" in program
    assert not any(shape in program for shape in ("[4,21]", "[4,3,7]"))


@pytest.mark.grid
def test_an_ignored_row_of_a_linear_loss_is_as_if_deleted(rng: np.random.Generator):
    h, w, target, options = linear_case(rng, (2,), "labels")
    target[1], target[3, 0] = -100, -100
    h[1] = np.nan
    kept = [0, 2, 3]
    gradient = jax.grad(functools.partial(nn.linear_cross_entropy, **options), (0, 1))
    by_h, by_w = gradient(h, w, target)
    want_h, want_w = gradient(h[kept], w, target[kept])
    assert np.all(by_h[1] == 0)
    assert_close(by_h[jnp.array(kept)], want_h, ulp=4, dtype=np.float32, size=1)
    assert_close(by_w, want_w, ulp=4, dtype=np.float32, size=1)


# ----------------------------------------------------------------------------------------------------------------------
# Transformations and errors


def test_forward_mode_at_the_ends_of_a_probability():
    x, t = np.array([0.0, 0.5, 1.0], np.float32), np.array([0.5, 0.25, 1.0], np.float32)
    loss = functools.partial(nn.binary_cross_entropy, reduction="none")
    by_t = jax.jacfwd(loss, 1)(x, t)
    np.testing.assert_array_equal(by_t, jax.jacrev(loss, 1)(x, t))
    np.testing.assert_array_equal(by_t, np.diag([np.inf, 0, -np.inf]).astype(np.float32))


ONES = np.ones((2, 3), np.float32)
LABELS = np.array([0, 1])
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: nn.cross_entropy(np.ones((2, 3), np.int32), LABELS),
        TypeError,
        "cross_entropy: `input` must have a floating",
    ),
    (lambda: nn.cross_entropy(np.float32(1), 0), ValueError, "cross_entropy: `input` must have shape"),
    (lambda: nn.cross_entropy(ONES, np.array([0, 1, 2])), ValueError, "cross_entropy: `target` must have shape"),
    (lambda: nn.cross_entropy(ONES, ONES[:, :2]), ValueError, "cross_entropy: `target` must have shape"),
    (lambda: nn.cross_entropy(ONES, ONES, ignore_index=1), ValueError, "cross_entropy: `ignore_index` goes with"),
    (lambda: nn.cross_entropy(ONES, LABELS, weight=np.ones(2)), ValueError, "cross_entropy: `weight` must have shape"),
    (
        lambda: nn.cross_entropy(ONES, LABELS, label_smoothing=1.5),
        ValueError,
        "cross_entropy: `label_smoothing` must lie",
    ),
    (lambda: nn.cross_entropy(ONES, LABELS, reduction="batchmean"), ValueError, "cross_entropy: `reduction` must be"),
    (
        lambda: nn.cross_entropy(ONES, LABELS, ignore_index="7"),
        TypeError,
        "cross_entropy: `ignore_index` must be an int",
    ),
    (lambda: nn.CrossEntropyLoss(ignore_index=True)(ONES, LABELS), TypeError, "`ignore_index` must be an int or None"),
    (lambda: nn.nll_loss(ONES, LABELS, ignore_index=7.0), TypeError, "nll_loss: `ignore_index` must be an int or None"),
    (
        lambda: nn.linear_cross_entropy(ONES, ONES, LABELS, ignore_index=1.5),
        TypeError,
        "linear_cross_entropy: `ignore_index` must be an int or None",
    ),
    (
        lambda: nn.cross_entropy(np.ones((2, 1, 5, 3), np.float32), np.zeros((2, 1, 5), int)),
        ValueError,
        r"`target` must have shape \(2, 5, 3\) .* the 1 classes lie on axis 1 .* jnp.moveaxis\(input, -1, 1\)",
    ),
    (
        lambda: nn.nll_loss(np.ones((2, 4, 3), np.float32), np.zeros((2, 4), int)),
        ValueError,
        r"`target` must have shape \(2, 3\) .* axis 1 of shape \(2, 4, 3\)",
    ),
    (
        lambda: nn.cross_entropy(np.ones((2, 4, 3), np.float32), np.ones((2, 3, 4), np.float32)),
        ValueError,
        "`target` must have shape .* axis 1",
    ),
    (lambda: nn.softmax(ONES, 1, dtype="bf16"), TypeError, "softmax: `dtype` must be a floating dtype, got 'bf16'"),
    (lambda: nn.log_softmax(ONES, 1, dtype=7), TypeError, "log_softmax: `dtype` must be a floating dtype, got 7"),
    (lambda: nn.nll_loss(ONES, ONES), TypeError, "nll_loss: `target` must have an integer"),
    (lambda: nn.kl_div(ONES, ONES[:, :2], reduction="sum"), ValueError, "kl_div: `target` must broadcast"),
    (lambda: nn.kl_div(ONES, LABELS, reduction="sum"), TypeError, "kl_div: `target` must have a floating"),
    (lambda: nn.kl_div(ONES, ONES, reduction="avg"), ValueError, "kl_div: `reduction` must be one of 'batchmean'"),
    (lambda: nn.binary_cross_entropy(ONES, ONES[0]), ValueError, "binary_cross_entropy: `target` must have shape"),
    (
        lambda: nn.binary_cross_entropy_with_logits(ONES, ONES, pos_weight=np.ones((2, 2, 3))),
        ValueError,
        "with_logits: `pos_weight` must broadcast",
    ),
    (lambda: nn.softmax(np.ones(3, np.int32), 0), TypeError, "softmax: `input` must have a floating"),
    (lambda: nn.softmax(ONES, 0, dtype=jnp.int32), TypeError, "softmax: `dtype` must be a floating dtype"),
    (lambda: nn.log_softmax(ONES, 2), ValueError, "log_softmax: `dim` must lie"),
    (lambda: nn.linear_cross_entropy(ONES[None], ONES, LABELS), ValueError, "`input` must have shape"),
    (lambda: nn.linear_cross_entropy(ONES, ONES[:, :2], LABELS), ValueError, "`linear_weight` must have shape"),
    (
        lambda: nn.linear_cross_entropy(ONES[0], np.ones((4, 2, 3)), LABELS),
        ValueError,
        "`linear_weight` must have shape",
    ),
    (
        lambda: nn.linear_cross_entropy(ONES, ONES, LABELS, linear_bias=ONES),
        ValueError,
        "`linear_bias` must have shape",
    ),
    (lambda: nn.linear_cross_entropy(ONES, ONES, np.ones((2, 4))), ValueError, "`target` must have shape"),
    (
        lambda: nn.linear_cross_entropy(ONES, ONES[:2], ONES[:, :2], ignore_index=-100),
        ValueError,
        "`ignore_index` goes with",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[f"{i}" for i in range(len(ERRORS))])
def test_errors_name_function_and_argument(call: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("jaxent.torch_compat.")


def test_what_people_from_pytorch_try_first():
    with pytest.raises(AttributeError, match=r"has no attribute 'Linear': .*layers are those of flax or equinox"):
        nn.Linear(3, 4)
    assert not hasattr(nn, "MSELoss")
    assert not hasattr(nn, "__wrapped__")
    with pytest.raises(ValueError, match=r"torch_compat\.cross_entropy: `target` must .* class indices are integers"):
        nn.cross_entropy(np.zeros((2, 3), np.float32), np.array([0.0, 1.0]))
