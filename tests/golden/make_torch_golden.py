"""Writes `torch.json` next to this file: what PyTorch returns, so that the tests of `torch_compat` need no PyTorch.

    python tests/golden/make_torch_golden.py

Everything is computed in float64. Numbers lie on coarse grids, so that every dtype holds them exactly.
"""

import dataclasses
import importlib
import inspect
import json
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

torch: Any = importlib.import_module("torch")  # not installed where types are checked
F: Any = torch.nn.functional

FILE = Path(__file__).with_name("torch.json")
INF = np.inf
SHAPES = ((5,), (3, 5), (2, 3, 2, 2))
FUNCTIONS = (
    "softmax",
    "log_softmax",
    "cross_entropy",
    "nll_loss",
    "kl_div",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "linear_cross_entropy",
)
CLASSES = ("CrossEntropyLoss", "NLLLoss", "KLDivLoss", "BCELoss", "BCEWithLogitsLoss", "Softmax", "LogSoftmax")

# Labels that are all ignored, logits with a removed class, and class weights of 0 for it.
NOTHING, REMOVED = np.full(3, -100), np.array([[0.0, -INF, 1.0]] * 2)
WITHOUT = {"weight": np.array([1.0, 0.0, 1.0])}

rng = np.random.default_rng(0)


def logits(*shape: int) -> np.ndarray:
    return np.asarray(np.round(rng.normal(size=shape) * 48) / 16)


def positive(*shape: int) -> np.ndarray:
    return np.asarray(rng.integers(1, 9, size=shape) / 4)


def inside(*shape: int) -> np.ndarray:
    """Between 0 and 1, without the ends."""
    return np.asarray(rng.integers(1, 64, size=shape) / 64)


def distributions(shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/64 that sum to one along the class axis, 1 if there is a batch."""
    axis = 0 if len(shape) == 1 else 1
    rows = shape[:axis] + shape[axis + 1 :]
    return np.moveaxis(rng.multinomial(64, np.full(shape[axis], 1 / shape[axis]), size=rows) / 64, -1, axis)


def labels(shape: tuple[int, ...]) -> np.ndarray:
    axis = 0 if len(shape) == 1 else 1
    return np.asarray(rng.integers(0, shape[axis], size=shape[:axis] + shape[axis + 1 :]))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: NumPy arrays, and options of which some are arrays."""

    function: str
    args: tuple[Any, ...]
    options: dict[str, Any]


def case(function: str, *args: Any, **options: Any) -> Case:
    return Case(function, args, options)


def class_losses() -> Iterator[Case]:
    """Each number of dimensions with each reduction, the options in turn."""
    turn = 0
    for shape in SHAPES:
        count = shape[0 if len(shape) == 1 else 1]
        for reduction in ("mean", "sum", "none"):
            for target in (labels(shape), distributions(shape)):
                options = [{}, {"weight": positive(count)}, {"label_smoothing": 0.125}]
                options += [{"weight": positive(count), "label_smoothing": 0.125}]
                if target.dtype == np.int64 and target.ndim:
                    options += [{"ignore_index": int(target.flat[-1]), "weight": positive(count)}]
                chosen = options[turn % len(options)]
                if target.dtype == np.int64 and target.ndim and "ignore_index" not in chosen:
                    target.flat[0] = -100
                yield case("cross_entropy", logits(*shape), target, reduction=reduction, **chosen)
                turn += 1
            weight = {} if turn % 4 < 2 else {"weight": positive(count) - 1.125}
            yield case("nll_loss", logits(*shape), labels(shape), reduction=reduction, **weight)
    yield case("cross_entropy", logits(3, 5), labels((3, 5)), label_smoothing=1.0)
    yield case("cross_entropy", logits(3, 5), labels((3, 5)), weight=positive(5) - 1.125, label_smoothing=0.125)


def divergences() -> Iterator[Case]:
    """Each reduction, probabilities and their logarithms, and what is broadcast."""
    for reduction in ("mean", "sum", "none", "batchmean"):
        yield case("kl_div", logits(3, 5), distributions((3, 5)), reduction=reduction)
        yield case("kl_div", logits(3, 2, 2), logits(3, 2, 2), reduction=reduction, log_target=True)
    yield case("kl_div", logits(), inside(), reduction="batchmean")
    yield case("kl_div", logits(3, 5), distributions((5,)), reduction="batchmean")
    yield case("kl_div", logits(5), distributions((3, 5)), reduction="batchmean")


def binary_losses() -> Iterator[Case]:
    """With and without weights."""
    for reduction in ("mean", "sum", "none"):
        yield case("binary_cross_entropy", inside(4, 3), inside(4, 3), reduction=reduction)
        yield case("binary_cross_entropy", inside(4, 3), inside(4, 3), weight=positive(3) - 1.125, reduction=reduction)
        yield case("binary_cross_entropy_with_logits", logits(4, 3), inside(4, 3), reduction=reduction)
        options = {"weight": positive(4, 1) - 1.125, "pos_weight": positive(3)}
        yield case("binary_cross_entropy_with_logits", logits(4, 3), inside(4, 3), reduction=reduction, **options)
    yield case("binary_cross_entropy", inside(), inside())
    yield case("binary_cross_entropy_with_logits", logits(), inside(), pos_weight=positive())


def softmaxes() -> Iterator[Case]:
    """Each number of dimensions, and no entries."""
    for function in ("softmax", "log_softmax"):
        for shape, dim in (((), 0), ((5,), -1), ((3, 5), 1), ((3, 5), -2), ((2, 3, 4), 1), ((0, 3), 1), ((3, 0), 1)):
            yield case(function, logits(*shape), dim=dim)


def linear_losses() -> Iterator[Case]:
    """Each reduction, with one layer and with one for each place."""
    for reduction, places in (*product(("mean", "sum", "none"), ((), (2,))), ("mean", (2, 2))):
        shape = (4, 5, *places)
        linear = (logits(4, 3) / 4, logits(5, *places, 3) / 4)
        yield case("linear_cross_entropy", *linear, labels(shape), weight=positive(5), reduction=reduction)
        options = {"linear_bias": logits(5, *places), "label_smoothing": 0.125}
        yield case("linear_cross_entropy", *linear, distributions(shape), reduction=reduction, **options)
    yield case("linear_cross_entropy", logits(3) / 4, logits(5, 3) / 4, labels((5,)), linear_bias=logits(5))


def edges_of_cross_entropy() -> Iterator[Case]:
    """Nothing to take the mean of, weights of 0, and infinities."""
    for options in ({}, {"weight": positive(5)}, {"label_smoothing": 0.125}):
        yield case("cross_entropy", logits(3, 5), NOTHING, **options)
    for reduction in ("sum", "none"):
        yield case("cross_entropy", logits(3, 5), NOTHING, reduction=reduction)
    yield case("cross_entropy", logits(0, 5), NOTHING[:0], label_smoothing=0.125)
    yield case("cross_entropy", logits(0, 5), logits(0, 5))
    yield case("cross_entropy", logits(2, 5, 0), np.zeros((2, 0), np.int64))
    yield case("cross_entropy", logits(3, 5), np.array([1, 0, 1]), weight=np.array([1.0, 0.0, 1.0, 1.0, 1.0]))
    yield case("cross_entropy", logits(2, 5), np.array([1, 1]), weight=np.array([1.0, 0.0, 1.0, 1.0, 1.0]))
    yield case(
        "cross_entropy", logits(5), np.array(1), weight=np.array([1.0, 0.0, 1.0, 1.0, 1.0]), label_smoothing=0.125
    )
    yield case("cross_entropy", logits(2, 5), distributions((2, 5)), weight=np.zeros(5))
    for options in ({}, WITHOUT, {"label_smoothing": 0.125}, {"label_smoothing": 1.0}):
        yield case("cross_entropy", REMOVED, np.array([0, 1]), reduction="none", **options)
    yield case("cross_entropy", REMOVED[:1], np.array([0]), label_smoothing=0.125, **WITHOUT)
    for options in ({}, {"label_smoothing": 0.125}):
        yield case("cross_entropy", REMOVED, np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]), reduction="none", **options)
    yield case("cross_entropy", np.full((1, 3), -INF), np.array([1]))
    yield case("cross_entropy", np.array([[0.0, INF, 1.0]]), np.array([0]))


def edges_of_other_class_losses_and_divergences() -> Iterator[Case]:
    """Nothing to take the mean of, removed classes, and infinities of both arguments."""
    yield case("nll_loss", logits(3, 5), NOTHING)
    yield case("nll_loss", logits(0, 5), NOTHING[:0])
    yield case("nll_loss", REMOVED, np.array([0, 1]), reduction="sum", **WITHOUT)
    yield case("nll_loss", REMOVED, np.array([0, 1]))
    for reduction in ("mean", "batchmean", "sum"):
        yield case("kl_div", logits(0, 5), logits(0, 5), reduction=reduction)
    yield case("kl_div", np.array([-1.0, -INF, -INF, 0.0]), np.array([0.5, 0.0, 0.25, 1.0]), reduction="none")
    yield case("kl_div", np.array([-1.0, -INF, -1.0]), np.array([-INF, -INF, 0.0]), reduction="none", log_target=True)


def edges_of_binary_losses() -> Iterator[Case]:
    """Probabilities of 0 and 1, and infinite logits."""
    ends = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), np.array([0.0, 0.25, 1.0, 0.0, 0.25, 1.0])
    yield case("binary_cross_entropy", *ends, reduction="none")
    yield case("binary_cross_entropy", logits(0), logits(0))
    far = np.array([INF, INF, INF, INF, -INF, -INF, -INF, -INF, 512.0, -512.0, 512.0, -512.0])
    targets = np.array([0.0, 0.25, 1.0, 2.0, 0.0, 0.25, 1.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    yield case("binary_cross_entropy_with_logits", far, targets, reduction="none")
    yield case("binary_cross_entropy_with_logits", far, targets, pos_weight=np.zeros(12), reduction="none")
    yield case("binary_cross_entropy_with_logits", logits(0), logits(0))


def edges_of_softmaxes() -> Iterator[Case]:
    """Infinities."""
    for function in ("softmax", "log_softmax"):
        for values in ([-INF, 0.0, 1.0], [-INF, -INF], [INF, 0.0]):
            yield case(function, np.array(values), dim=0)


def edges_of_linear_losses() -> Iterator[Case]:
    """Nothing to take the mean of, no places, and a bias of -inf."""
    for places in ((), (2,)):
        for size in (0, 3):
            target = np.full((size, *places), -100)
            yield case(
                "linear_cross_entropy", logits(size, 3), logits(5, *places, 3), target, linear_bias=logits(5, *places)
            )
    yield case("linear_cross_entropy", logits(2, 3), logits(5, 0, 3), np.zeros((2, 0), np.int64))
    bias = np.array([-INF, 0.0, 1.0])
    yield case("linear_cross_entropy", logits(2, 3) / 4, logits(3, 3) / 4, np.array([1, 2]), linear_bias=bias)


def no_classes_and_masks() -> Iterator[Case]:
    """No classes, weights that sum to 0, and a mask as weight."""
    for reduction in ("mean", "sum", "none"):
        for options in ({}, {"label_smoothing": 0.125}):
            yield case("cross_entropy", logits(3, 0), NOTHING, reduction=reduction, **options)
            yield case("cross_entropy", logits(2, 0, 3), logits(2, 0, 3), reduction=reduction, **options)
        yield case("nll_loss", logits(0), NOTHING[0], reduction=reduction)
        yield case("linear_cross_entropy", logits(3, 2), logits(0, 2), NOTHING, reduction=reduction)
    for options in ({}, {"weight": np.zeros(5)}, {"weight": np.array([1.0, -1.0, 0.0, 0.0, 2.0])}):
        yield case("nll_loss", logits(3, 5), np.array([0, 1, -100]), **options)
    mask = np.array([[True], [False]])
    yield case("binary_cross_entropy", inside(2, 3), inside(2, 3), weight=mask)
    yield case("binary_cross_entropy_with_logits", logits(2, 3), inside(2, 3), weight=mask)


# In this order, in which the numbers are drawn.
GROUPS = (
    class_losses,
    divergences,
    binary_losses,
    softmaxes,
    linear_losses,
    edges_of_cross_entropy,
    edges_of_other_class_losses_and_divergences,
    edges_of_binary_losses,
    edges_of_softmaxes,
    edges_of_linear_losses,
    no_classes_and_masks,
)


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What the gradient is weighted with: not the same for any two entries."""
    size = int(np.prod(shape))
    return (np.arange(size, dtype=np.float64).reshape(shape) + 3) / 4


def packed(x: Any) -> dict[str, Any]:
    x = np.asarray(x)
    return {"dtype": str(x.dtype), "shape": list(x.shape), "data": x.ravel().tolist()}


def run(call: Case) -> dict[str, Any]:
    tensors = [torch.tensor(a, requires_grad=a.dtype == np.float64) for a in call.args]
    keywords = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in call.options.items()}
    if "linear_bias" in keywords:
        keywords["linear_bias"].requires_grad_()
    wanted = [x for x in (*tensors, keywords.get("linear_bias")) if x is not None and x.requires_grad]
    value = getattr(F, call.function)(*tensors, **keywords)
    weighting = cotangent(tuple(value.shape))
    gradients = torch.autograd.grad(value, wanted, torch.tensor(weighting))
    return {
        "function": call.function,
        "args": [packed(a) for a in call.args],
        "options": {k: packed(v) if isinstance(v, np.ndarray) else v for k, v in call.options.items()},
        "value": packed(value.detach().numpy()),
        "cotangent": packed(weighting),
        "gradients": [packed(g.numpy()) for g in gradients],
    }


def parameters(function: Any) -> list[list[Any]]:
    """Name, kind and default of each parameter."""
    return [
        [p.name, p.kind.name, None if p.default is p.empty else p.default]
        for p in inspect.signature(function).parameters.values()
    ]


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [run(call) for group in GROUPS for call in group()]
    signatures = {name: parameters(getattr(F, name)) for name in FUNCTIONS}
    signatures |= {name: parameters(getattr(torch.nn, name)) for name in CLASSES}
    lines = ",\n".join(json.dumps(result) for result in results)
    head = json.dumps({"torch": torch.__version__, "numpy": np.__version__, "signatures": signatures})
    FILE.write_text(f'{head[:-1]},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
