"""Bad input: the right exception, whose message names function, argument, what was expected and what came.

What can be known while tracing (dtypes, shapes, options) raises, under jit too; what cannot (values) is nan.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    nll_loss,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_gradient,
    token_statistics,
)

pytestmark = pytest.mark.rows  # nothing is compiled

Z = np.zeros((2, 3), np.float32)
Y = np.array([0, 1])
SOFTMAX: dict[str, Any] = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "softmax_cross_entropy_gradient": softmax_cross_entropy_gradient,
}

# Options, exception, parts of the message.
Case = tuple[dict[str, Any], type[Exception], list[str]]
REDUCTION: list[Case] = [
    ({"reduction": "average"}, ValueError, ["`reduction`", "'mean', 'sum', 'none' or 'sum_and_weight'", "'average'"]),
    ({"reduction": None}, ValueError, ["`reduction`", "None"]),
    ({"denominator": -1.0}, ValueError, ["`denominator`", "[0, inf)", "-1.0"]),
    ({"denominator": np.nan}, ValueError, ["`denominator`", "nan"]),
    ({"denominator": np.ones(2)}, ValueError, ["`denominator`", "scalar", "float32[2]"]),
    ({"denominator": "4"}, TypeError, ["`denominator`", "a number", "'4' (str)"]),
    ({"denominator": 2.0, "reduction": "sum"}, ValueError, ["`denominator`", "reduction='mean'", "'sum'"]),
]
ROW: list[Case] = [
    ({"where": np.ones(2)}, TypeError, ["`where`", "bool", "float64[2]"]),
    ({"where": np.ones(2, np.int32)}, TypeError, ["`where`", "bool", "int32[2]"]),
    ({"weights": np.ones(2, np.complex64)}, TypeError, ["`weights`", "floating", "complex64[2]"]),
    ({"weights": {"not": "an array"}}, TypeError, ["`weights`", "dict"]),
]
ROW_SHAPE: list[Case] = [
    ({"where": np.ones(3, bool)}, ValueError, ["`where`", "(2,)", "bool[3]"]),
    ({"where": np.ones((2, 1), bool)}, ValueError, ["`where`", "(2,)", "bool[2,1]"]),
    ({"where": np.array(True)}, ValueError, ["`where`", "(2,)", "bool[]"]),
    ({"weights": np.ones(3)}, ValueError, ["`weights`", "(2,)", "float32[3]"]),
    ({"weights": 2.0}, ValueError, ["`weights`", "(2,)", "float32[]"]),
]
CLASSES: list[Case] = [
    ({"class_weights": np.ones(2)}, ValueError, ["`class_weights`", "(3,)", "float32[2]"]),
    ({"class_weights": np.ones((1, 3))}, ValueError, ["`class_weights`", "(3,)", "float32[1,3]"]),
    ({"ignore_index": 1.0}, TypeError, ["`ignore_index`", "int or None", "1.0"]),
    ({"ignore_index": True}, TypeError, ["`ignore_index`", "int or None", "True"]),
    ({"axis": 2}, ValueError, ["`axis`", "[-2, 2)", "2"]),
    ({"axis": -3}, ValueError, ["`axis`", "[-2, 2)", "-3"]),
    ({"axis": 1.0}, TypeError, ["`axis`", "int", "1.0"]),
    ({"axis": None}, TypeError, ["`axis`", "int", "None"]),
    ({"axis": True}, TypeError, ["`axis`", "int", "True"]),
]
OPTIONS: list[Case] = [
    ({"label_smoothing": -0.1}, ValueError, ["`label_smoothing`", "[0, 1]", "-0.1"]),
    ({"label_smoothing": 1.5}, ValueError, ["`label_smoothing`", "[0, 1]", "1.5"]),
    ({"label_smoothing": np.nan}, ValueError, ["`label_smoothing`", "[0, 1]", "nan"]),
    ({"label_smoothing": np.ones(3)}, ValueError, ["`label_smoothing`", "scalar", "float32[3]"]),
    ({"label_smoothing": None}, TypeError, ["`label_smoothing`"]),
    ({"z_loss": -1e-4}, ValueError, ["`z_loss`", "[0, inf)", "-0.0001"]),
    ({"z_loss": np.ones(1)}, ValueError, ["`z_loss`", "scalar", "float32[1]"]),
    ({"z_loss": "x"}, TypeError, ["`z_loss`"]),
    ({"vocab_axis": "model"}, ValueError, ["`vocab_axis`", "mesh axis", "'model'"]),
    ({"vocab_axis": 0}, TypeError, ["`vocab_axis`", "name of a mesh axis", "0"]),
]


def check(function: Any, name: str, args: tuple, options: dict[str, Any], error: type, parts: list[str]) -> None:
    """Called directly, and while jit traces the arguments that can be traced."""
    traced = {i: a for i, a in enumerate(args) if isinstance(a, np.ndarray) and a.dtype.kind in "fiub"}

    def under_jit(traced: dict[int, jax.Array]) -> Any:
        return function(*(traced.get(i, a) for i, a in enumerate(args)), **options)

    for call in (lambda: function(*args, **options), lambda: jax.jit(under_jit)(traced)):
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"jaxent.{name}: "), message
        for part in (*parts, " must ", " got ") if "goes with" not in message else parts:
            assert part in message, f"{part!r} is not in {message!r}"


def ids(value: Any) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize(("options", "error", "parts"), [*REDUCTION, *ROW, *ROW_SHAPE, *CLASSES, *OPTIONS], ids=ids)
def test_options_of_the_softmax_loss(name: str, options: dict, error: type, parts: list[str]):
    check(SOFTMAX[name], name, (Z, Y), options, error, parts)


@pytest.mark.parametrize(("options", "error", "parts"), [*REDUCTION, *ROW, *ROW_SHAPE, *CLASSES], ids=ids)
def test_options_of_nll_loss(options: dict, error: type, parts: list[str]):
    check(nll_loss, "nll_loss", (Z, Y), options, error, parts)


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        *REDUCTION,
        *ROW,
        ({"where": np.ones(3, bool)}, ValueError, ["`where`", "(2, 3)", "bool[3]"]),
        ({"weights": np.ones(3)}, ValueError, ["`weights`", "(2, 3)", "float32[3]"]),
        ({"pos_weight": np.ones(2)}, ValueError, ["`pos_weight`", "broadcast", "(2, 3)", "float32[2]"]),
        ({"pos_weight": np.ones((1, 2, 3))}, ValueError, ["`pos_weight`", "(2, 3)", "float32[1,2,3]"]),
    ],
    ids=ids,
)
def test_options_of_sigmoid_cross_entropy(options: dict, error: type, parts: list[str]):
    check(sigmoid_cross_entropy, "sigmoid_cross_entropy", (Z, Z), options, error, parts)


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"axis": 2}, ValueError, ["`axis`", "[-2, 2)", "2"]),
        ({"axis": "last"}, TypeError, ["`axis`", "int", "'last'"]),
        ({"top_k": 4}, ValueError, ["`top_k`", "[0, 3]", "4"]),
        ({"top_k": -1}, ValueError, ["`top_k`", "[0, 3]", "-1"]),
        ({"top_k": 1.0}, TypeError, ["`top_k`", "int", "1.0"]),
        ({"top_k": True}, TypeError, ["`top_k`", "int", "True"]),
        ({"vocab_axis": "model"}, ValueError, ["`vocab_axis`", "mesh axis", "'model'"]),
    ],
    ids=ids,
)
def test_options_of_token_statistics(options: dict, error: type, parts: list[str]):
    check(token_statistics, "token_statistics", (Z, Y), options, error, parts)


LOGITS: list[tuple[Any, type, list[str]]] = [
    (np.zeros((2, 3), np.int32), TypeError, ["floating", "int32[2,3]"]),
    (np.zeros((2, 3), bool), TypeError, ["floating", "bool[2,3]"]),
    (np.zeros((2, 3), np.complex64), TypeError, ["floating", "complex64[2,3]"]),
    ("logits", TypeError, ["floating", "<U6"]),
    (None, TypeError, ["None"]),
    (np.float32(1.0), ValueError, ["class axis", "float32[]"]),
    (np.zeros((2, 0), np.float32), ValueError, ["at least one class", "(2, 0)"]),
]


@pytest.mark.parametrize(("logits", "error", "parts"), LOGITS, ids=lambda v: str(getattr(v, "dtype", "")) or None)
@pytest.mark.parametrize("name", [*SOFTMAX, "nll_loss", "token_statistics"])
def test_logits(name: str, logits: Any, error: type, parts: list[str]):
    function = {**SOFTMAX, "nll_loss": nll_loss, "token_statistics": token_statistics}[name]
    argument = "`log_probs`" if name == "nll_loss" else "`logits`"
    check(function, name, (logits, Y), {}, error, [argument, *parts])


@pytest.mark.parametrize("logits", [np.zeros((2, 3), np.int32), np.zeros((2, 3), bool), "x", None])
def test_sigmoid_logits(logits: Any):
    check(sigmoid_cross_entropy, "sigmoid_cross_entropy", (logits, Z), {}, TypeError, ["`logits`"])


@pytest.mark.parametrize(
    ("targets", "error", "parts"),
    [
        (np.zeros(2, bool), TypeError, ["integer class indices or floating class probabilities", "bool[2]"]),
        (np.zeros(2, np.complex64), TypeError, ["integer class indices", "complex64[2]"]),
        (None, TypeError, ["integer class indices", "None"]),
        (["a", "b"], TypeError, ["integer class indices"]),
        (np.zeros(3, np.int32), ValueError, ["(2,)", "int32[3]"]),
        (np.zeros((2, 1), np.int32), ValueError, ["(2,)", "int32[2,1]"]),
        (
            np.zeros((2, 3), np.int32),
            ValueError,
            ["(2,)", "one-hot targets and", "int32[2,3]"],
        ),
        (
            np.zeros(2, np.float32),
            ValueError,
            ["(2, 3)", "class indices are integers", "float32[2]"],
        ),
        (np.zeros((2, 4), np.float32), ValueError, ["(2, 3)", "float32[2,4]"]),
        (np.zeros((3, 2), np.float32), ValueError, ["(2, 3)", "float32[3,2]"]),
    ],
)
@pytest.mark.parametrize("name", SOFTMAX)
def test_targets(name: str, targets: Any, error: type, parts: list[str]):
    check(SOFTMAX[name], name, (Z, targets), {}, error, ["`targets`", *parts])


@pytest.mark.parametrize(
    ("labels", "error", "parts"),
    [
        (np.zeros(2, np.float32), TypeError, ["integer", "float32[2]"]),
        (np.zeros(2, bool), TypeError, ["integer", "bool[2]"]),
        (np.zeros(3, np.int32), ValueError, ["(2,)", "int32[3]"]),
        (0, ValueError, ["(2,)", "int32[]"]),
    ],
)
@pytest.mark.parametrize("name", ["nll_loss", "token_statistics"])
def test_labels(name: str, labels: Any, error: type, parts: list[str]):
    function = {"nll_loss": nll_loss, "token_statistics": token_statistics}[name]
    check(function, name, (Z, labels), {}, error, ["`labels`", *parts])


@pytest.mark.parametrize(
    ("targets", "error", "parts"),
    [
        (np.zeros((2, 3), np.complex64), TypeError, ["floating", "complex64[2,3]"]),
        (np.zeros(3, np.float32), ValueError, ["(2, 3)", "float32[3]"]),
        (np.zeros((2, 1), np.int32), ValueError, ["(2, 3)"]),
        (None, TypeError, ["None"]),
    ],
)
def test_sigmoid_targets(targets: Any, error: type, parts: list[str]):
    check(sigmoid_cross_entropy, "sigmoid_cross_entropy", (Z, targets), {}, error, ["`targets`", *parts])


def test_options_are_keyword_only():
    for function in (*SOFTMAX.values(), nll_loss, sigmoid_cross_entropy, token_statistics):
        with pytest.raises(TypeError, match="positional argument"):
            function(Z, Y, 0)


def test_a_traced_option_out_of_range_is_nan():
    # Nothing can raise on a value under jit; a plausible number would be worse.
    for option in ("label_smoothing", "z_loss", "denominator"):
        got = jax.jit(lambda x, option=option: softmax_cross_entropy(Z, Y, **{option: x}))(jnp.float32(-0.5))
        assert np.isnan(got)
