"""`jaxent.torch_compat` compared with PyTorch itself, wherever it is installed: values and gradients.

The inputs are PyTorch's own samples (for which `torch.testing` needs `expecttest`), and the product of all shapes,
targets, weights, smoothings, ignored labels and reductions. In float64 the two agree to 1e-12. In the other types both
are measured against PyTorch in float64 on the same inputs: float32 to a few ulp, the narrow ones no worse than PyTorch.
"""

import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxent import torch_compat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch: Any = pytest.importorskip("torch")

twin: Any = torch_compat
DTYPES = ("float64", "float32", "bfloat16", "float16")
NARROW = ("bfloat16", "float16")
pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.filterwarnings("ignore")]

Call = Callable[..., Any]
Arguments = tuple[list[Any], dict[str, Any]]


def is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def to_jax(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return str(x).removeprefix("torch.")
    if not is_tensor(x):
        return x
    x = x.detach().contiguous()
    return jnp.asarray(x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy())


def to_double(x: Any) -> np.ndarray:
    return x.detach().double().numpy() if is_tensor(x) else np.asarray(x, np.float64)


def leaves(arguments: Arguments) -> list[Any]:
    return [x for x in (*arguments[0], *arguments[1].values()) if is_tensor(x) and x.requires_grad]


def mapped(f: Callable[[Any], Any], arguments: Arguments) -> Arguments:
    return [f(x) for x in arguments[0]], {k: f(x) for k, x in arguments[1].items()}


def of_torch(call: Call, arguments: Arguments, cotangent: Any) -> tuple[Any, list[Any]]:
    value = call(*arguments[0], **arguments[1])
    given = torch.tensor(cotangent).to(value.dtype)
    return value, list(torch.autograd.grad(value, leaves(arguments), given, allow_unused=True))


def of_twin(call: Call, arguments: Arguments, cotangent: np.ndarray) -> tuple[Any, list[Any]]:
    def f(*variables: jax.Array) -> jax.Array:
        left = iter(variables)
        args, options = mapped(lambda x: next(left) if is_tensor(x) and x.requires_grad else to_jax(x), arguments)
        return call(*args, **options)

    @jax.jit
    def derived(variables: list[jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, pull = jax.vjp(f, *variables)
        return value, pull(jnp.asarray(cotangent).astype(value.dtype))

    value, gradients = derived([to_jax(x) for x in leaves(arguments)])
    return value, list(gradients)


def widened(arguments: Arguments) -> Arguments:
    def widen(x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return torch.float64
        if not is_tensor(x) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    args, options = mapped(widen, arguments)
    return args, {k: v for k, v in options.items() if k != "options"}


class Errors:
    """The errors of the twin and of PyTorch against float64, each in units of the largest entry of its array."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.squares: dict[int, np.ndarray] = {}

    def compare(self, ours: Call, theirs: Call, arguments: Arguments) -> None:
        arguments = mapped(lambda x: x.detach().requires_grad_(x.requires_grad) if is_tensor(x) else x, arguments)
        with torch.no_grad():
            shape = tuple(theirs(*arguments[0], **arguments[1]).shape)
        cotangent = np.asarray((np.arange(int(np.prod(shape))).reshape(shape) % 7 + 2) / 4)
        exact, exact_gradients = of_torch(theirs, widened(arguments), cotangent)
        value, gradients = of_torch(theirs, arguments, cotangent)
        got, got_gradients = of_twin(ours, arguments, cotangent)
        assert got.shape == shape
        assert str(got.dtype) == str(value.dtype).removeprefix("torch.")
        rows = zip((got, *got_gradients), (value, *gradients), (exact, *exact_gradients), strict=True)
        for place, (mine, yours, want) in enumerate(rows):
            if want is not None:
                self._add(place, to_double(mine), to_double(yours), to_double(want))

    def _add(self, place: int, mine: np.ndarray, yours: np.ndarray, want: np.ndarray) -> None:
        if self.dtype == "float64":
            # PyTorch's products are summed in another order: against the largest entry.
            largest = np.max(np.abs(np.where(np.isfinite(want), want, 0)), initial=1)
            np.testing.assert_allclose(mine, want, rtol=1e-12, atol=1e-12 * largest)
            return
        np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(want))
        finite = np.where(np.isfinite(want), want, 0)
        largest = np.max(np.abs(finite), initial=0)
        if largest == 0:
            assert np.all(np.where(np.isfinite(want), mine, 0) == 0)
            return
        errors = [np.max(np.abs(np.where(np.isfinite(want), x, 0) - finite)) / largest for x in (mine, yours)]
        self.squares[place] = self.squares.get(place, np.zeros(2)) + np.square(errors)
        if self.dtype == "float32":
            assert errors[0] <= max(16 * 2**-23, 2 * errors[1]), f"{errors[0] * 2**23:.3g} ulp"

    def check(self) -> None:
        """Over all inputs: one of them may round better in either, where products of bf16 are summed."""
        for place, (mine, yours) in self.squares.items():
            if self.dtype in NARROW:
                # Results in float64, of a `dtype` argument, are exact in both.
                assert mine <= 1.01 * yours + 1e-24, (
                    f"output {place}: {np.sqrt(mine):.3g}, PyTorch {np.sqrt(yours):.3g}"
                )


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's own samples


NAMES = (
    "softmax",
    "log_softmax",
    "nn.functional.cross_entropy",
    "nn.functional.nll_loss",
    "nn.functional.kl_div",
    "nn.functional.binary_cross_entropy",
    "nn.functional.binary_cross_entropy_with_logits",
    "nn.functional.linear_cross_entropy",
)


def operators() -> list[Any]:
    pytest.importorskip("expecttest")
    samples = importlib.import_module("torch.testing._internal.common_methods_invocations")
    return [op for op in samples.op_db if op.name in NAMES]


def compare_samples(name: str, dtype: str, stride: int) -> None:
    function = name.removeprefix("nn.functional.")
    ours, theirs = getattr(twin, function), getattr(torch.nn.functional, function)
    variants = [op for op in operators() if op.name == name]
    assert variants
    for op in variants:
        torch.manual_seed(0)
        errors = Errors(dtype)
        samples = list(op.sample_inputs("cpu", getattr(torch, dtype), requires_grad=True))
        for sample in samples[::stride]:
            errors.compare(ours, theirs, ([sample.input, *sample.args], dict(sample.kwargs)))
        errors.check()


@pytest.mark.parametrize("name", NAMES)
def test_some_samples_of_pytorch(name: str):
    compare_samples(name, "float64", 20 if "linear" in name else 5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_all_samples_of_pytorch(name: str, dtype: str):
    compare_samples(name, dtype, 1)


MODULES = ("CrossEntropyLoss", "NLLLoss", "KLDivLoss", "BCELoss", "BCEWithLogitsLoss", "Softmax", "LogSoftmax")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_all_module_samples_of_pytorch(name: str):
    pytest.importorskip("expecttest")
    samples = importlib.import_module("torch.testing._internal.common_modules")
    (info,) = [info for info in samples.module_db if info.name == f"nn.{name}"]
    torch.manual_seed(0)
    for sample in info.module_inputs_func(info, "cpu", torch.float64, True, False):
        built = sample.constructor_input
        ours = getattr(twin, name)(*map(to_jax, built.args), **{k: to_jax(v) for k, v in built.kwargs.items()})
        theirs = getattr(torch.nn, name)(*built.args, **built.kwargs)
        given = sample.forward_input
        Errors("float64").compare(ours, theirs, (list(given.args), dict(given.kwargs)))


# ----------------------------------------------------------------------------------------------------------------------
# The product of all options


SHAPES = ((5,), (3, 5), (1, 1), (0, 5), (2, 5, 3), (2, 3, 0), (2, 3, 2, 2))
WEIGHTS = ("none", "positive", "some zero")
IGNORED = ("none", "some", "all", "a class")
REDUCTIONS = ("mean", "sum", "none")


def drawn(rng: np.random.Generator, dtype: str, *shape: int) -> Any:
    return torch.tensor(rng.normal(size=shape) * 2).to(getattr(torch, dtype)).requires_grad_()


def class_arguments(
    rng: np.random.Generator, dtype: str, shape: tuple[int, ...], target: str, weights: str, ignored: str
) -> tuple[list[Any], dict[str, Any]]:
    axis = 0 if len(shape) == 1 else 1
    count, rows = shape[axis], shape[:axis] + shape[axis + 1 :]
    options: dict[str, Any] = {}
    if weights != "none":
        weight = torch.tensor(rng.uniform(0.5, 2, count)).to(getattr(torch, dtype))
        weight[0] = 0 if weights == "some zero" else 1
        options["weight"] = weight
    if target == "probabilities":
        p = torch.tensor(rng.uniform(0.05, 1, size=shape)).softmax(axis).to(getattr(torch, dtype))
        return [drawn(rng, dtype, *shape), p.requires_grad_()], options
    labels = np.asarray(rng.integers(0, count, size=rows))
    if ignored == "some":
        labels = np.where(rng.random(rows) < 0.4, -100, labels)
    elif ignored == "all":
        labels = np.full(rows, -100)
    elif ignored == "a class":
        options["ignore_index"] = count - 1
    return [drawn(rng, dtype, *shape), torch.tensor(labels)], options


def products(targets: tuple[str, ...], smoothings: tuple[float, ...]) -> Iterator[tuple[str, str, float, str, str]]:
    for target, weights, smoothing, ignored, reduction in itertools.product(
        targets, WEIGHTS, smoothings, IGNORED, REDUCTIONS
    ):
        if target == "labels" or ignored == "none":
            yield target, weights, smoothing, ignored, reduction


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", ["cross_entropy", "nll_loss"])
def test_every_combination_of_options(function: str, shape: tuple[int, ...], dtype: str, rng: np.random.Generator):
    plain = function == "nll_loss"
    targets, smoothings = (("labels",), (0.0,)) if plain else (("labels", "probabilities"), (0.0, 0.125, 1.0))
    errors = Errors(dtype)
    for target, weights, smoothing, ignored, reduction in products(targets, smoothings):
        args, options = class_arguments(rng, dtype, shape, target, weights, ignored)
        options |= {"reduction": reduction} if plain else {"reduction": reduction, "label_smoothing": smoothing}
        errors.compare(getattr(twin, function), getattr(torch.nn.functional, function), (args, options))
    errors.check()


@pytest.mark.slow
@pytest.mark.parametrize("places", [(), (2,), (2, 3)], ids=str)
def test_every_combination_of_options_of_the_linear_loss(places: tuple[int, ...], rng: np.random.Generator):
    errors = Errors("float64")
    for target, weights, smoothing, ignored, reduction in products(("labels", "probabilities"), (0.0, 0.125)):
        (_, targets), options = class_arguments(rng, "float64", (4, 5, *places), target, weights, ignored)
        options |= {"reduction": reduction, "label_smoothing": smoothing}
        if reduction != "sum":
            options["linear_bias"] = drawn(rng, "float64", 5, *places)
        args = [drawn(rng, "float64", 4, 3), drawn(rng, "float64", 5, *places, 3), targets]
        errors.compare(twin.linear_cross_entropy, torch.nn.functional.linear_cross_entropy, (args, options))


def second_order_cases(rng: np.random.Generator) -> list[tuple[str, list[Any], dict[str, Any]]]:
    def p(*shape: int) -> Any:
        return torch.tensor(rng.uniform(0.05, 0.95, size=shape)).requires_grad_()

    z = drawn(rng, "float64", 3, 4)
    labels, weight = torch.tensor([1, -100, 3]), torch.tensor([0.5, 2, 1, 0.25], dtype=torch.float64)
    return [
        ("cross_entropy", [z, labels], {"weight": weight, "label_smoothing": 0.125}),
        ("cross_entropy", [z, p(3, 4)], {"weight": weight}),
        ("nll_loss", [z, labels], {"weight": weight}),
        ("kl_div", [z, p(3, 4)], {"reduction": "batchmean"}),
        ("kl_div", [z, p(3, 4)], {"reduction": "sum", "log_target": True}),
        ("binary_cross_entropy", [p(3, 4), p(3, 4)], {"weight": weight}),
        ("binary_cross_entropy_with_logits", [z, p(3, 4)], {"pos_weight": weight}),
        ("log_softmax", [z, 1], {}),
        ("softmax", [z, 0], {}),
        ("linear_cross_entropy", [z, drawn(rng, "float64", 5, 4), labels], {"label_smoothing": 0.125}),
    ]


@pytest.mark.grid
@pytest.mark.parametrize("at", range(10))
def test_second_derivatives_and_forward_mode_are_those_of_pytorch(at: int, rng: np.random.Generator):
    name, args, options = second_order_cases(rng)[at]
    variables = [x for x in args if is_tensor(x) and x.requires_grad]
    steps = [rng.normal(size=x.shape) for x in variables]

    def squared(functions: Any, convert: Callable[[Any], Any]) -> Call:
        """A scalar whose derivative with respect to the result is not the same for any two entries."""

        def f(*given: Any) -> Any:
            left = iter(given)
            replaced = [next(left) if is_tensor(x) and x.requires_grad else convert(x) for x in args]
            return (getattr(functions, name)(*replaced, **{k: convert(v) for k, v in options.items()}) ** 2).sum()

        return f

    theirs, ours = squared(torch.nn.functional, lambda x: x), squared(twin, to_jax)
    # PyTorch adds 1e-12 to `x` and `1 - x` in the second derivative of the binary loss, through which its `jvp` goes.
    rtol = 1e-10 if name == "binary_cross_entropy" else 1e-12
    want = torch.autograd.functional.hessian(theirs, tuple(variables))
    _, want_step = torch.autograd.functional.jvp(theirs, tuple(variables), tuple(map(torch.tensor, steps)))
    places = tuple(range(len(variables)))
    primals = [to_jax(x) for x in variables]
    for got in (
        jax.jit(jax.hessian(ours, places))(*primals),
        jax.jit(jax.jacrev(jax.grad(ours, places), places))(*primals),
    ):
        for rows in zip(got, want, strict=True):
            for block, wanted in zip(*rows, strict=True):
                np.testing.assert_allclose(block, to_double(wanted), rtol=rtol, atol=1e-13)
    _, step = jax.jvp(ours, primals, [jnp.asarray(s) for s in steps])
    np.testing.assert_allclose(step, to_double(want_step), rtol=rtol)


def test_chunks_are_those_of_pytorch():
    for method, rows, features, classes in itertools.product(
        ("aspect_ratio", "aspect_ratio:2", "aspect_ratio:7"), (1, 5, 64, 1000), (3, 64), (2, 64, 1000)
    ):
        theirs = torch.nn.LinearCrossEntropyOptions(chunking_method=method)
        want = theirs._adjust(rows, features, classes, torch.float32).batch_chunk_size
        assert twin.LinearCrossEntropyOptions(chunking_method=method).chunk_rows(rows, features, classes) == want


def test_tensors_are_accepted():
    z, t = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]])
    y, w = torch.tensor([2, 0]), torch.tensor([0.5, 2.0, 1.0])
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("cross_entropy", (z, y), {"weight": w}),
        ("cross_entropy", (z, t), {"label_smoothing": 0.125}),
        ("nll_loss", (z.log_softmax(1), y), {"weight": w}),
        ("kl_div", (z.log_softmax(1), t), {"reduction": "batchmean"}),
        ("binary_cross_entropy", (t, t.flip(0)), {}),
        ("binary_cross_entropy_with_logits", (z, t), {"pos_weight": w}),
        ("linear_cross_entropy", (z, torch.eye(3), y), {}),
        ("softmax", (z, 1), {}),
        ("log_softmax", (z.bfloat16(), 1), {}),
    ]
    for name, args, options in calls:
        got, want = getattr(twin, name)(*args, **options), getattr(torch.nn.functional, name)(*args, **options)
        assert str(got.dtype) == str(want.dtype).removeprefix("torch.")
        np.testing.assert_allclose(to_double(got), to_double(want), rtol=1e-2 if name == "log_softmax" else 1e-5)
    with pytest.raises(TypeError, match=r"torch_compat.cross_entropy: `input` must be array-like .*detach"):
        twin.cross_entropy(z.requires_grad_(), y)
