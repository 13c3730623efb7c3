"""What `jaxent.torch_compat` refuses, by name of function and argument, and what people from PyTorch try first."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxent import torch_compat

nn: Any = torch_compat  # as people write it; untyped, since tables of options are dictionaries


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
