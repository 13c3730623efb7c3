"""`check_gradient` takes every kind of function: curvature, norms, statistics, measures and PyTorch's losses."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import marked, softmax_cross_entropy

import jaxent
import jaxent.torch_compat as nn
from jaxent import check_gradient
from jaxent._check.gradient import DIFFERENCES

H = np.array([[0.5, -1.0], [0.25, 2.0], [-0.75, 1.5]], np.float32)
W = np.array([[1.0, -0.5, 0.25, 0.5], [-1.5, 0.75, 0.5, 1.0]], np.float32)
Y = np.array([2, 0, 3])
STEP = np.array([[0.5, -1.0, 0.25, 0.75]], np.float32)
SIMPLEX = np.array([[0.125, 0.25, 0.125, 0.5], [0.5, 0.25, 0.125, 0.125]], np.float32)

COVERED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], bool]] = {
    "logit_hessian_product": (
        lambda z, v: jnp.sum(jaxent.logit_hessian_product(z, v) ** 2),
        (H @ W, H @ W * 0.5),
        False,
    ),
    "ggn_vector_product": (
        lambda w: jnp.sum(jaxent.ggn_vector_product(lambda w: H.astype(w.dtype) @ w, w, w * w) ** 2),
        (W,),
        False,
    ),
    "fisher_vector_product": (
        lambda w: jnp.sum(jaxent.fisher_vector_product(lambda w: H.astype(w.dtype) @ w, w, Y, w * w) ** 2),
        (W,),
        False,
    ),
    "linear_gradient_norms": (lambda h, w: jnp.sum(jaxent.linear_gradient_norms(h, w, Y).kernel), (H, W), False),
    "token_statistics": (lambda z: jnp.sum(jaxent.token_statistics(z, Y).entropy), (H @ W,), True),
    "linear_token_statistics": (lambda h, w: jnp.sum(jaxent.linear_token_statistics(h, w, Y).entropy), (H, W), False),
    "entropy": (lambda p: jnp.sum(jaxent.entropy(p)), (SIMPLEX,), True),
    "kl_divergence": (lambda p, q: jnp.sum(jaxent.kl_divergence(p, q)), (SIMPLEX, SIMPLEX[::-1]), True),
    "renyi_divergence": (lambda p, q: jnp.sum(jaxent.renyi_divergence(p, q, 2.5)), (SIMPLEX, SIMPLEX[::-1]), True),
    "mutual_information": (lambda p: jaxent.mutual_information(p), (SIMPLEX / 2,), True),
    "softmax_cross_entropy": (softmax_cross_entropy, (H @ W, Y), True),
    "linear_softmax_cross_entropy": (jaxent.linear_softmax_cross_entropy, (H, W, Y), True),
    "twin cross_entropy": (nn.CrossEntropyLoss(label_smoothing=0.125), (H @ W, Y), True),
    "twin kl_div": (functools.partial(nn.kl_div, reduction="batchmean"), (np.log(SIMPLEX[::-1]), SIMPLEX), True),
    "twin binary": (nn.BCEWithLogitsLoss(), (H @ W, np.tile(SIMPLEX[:1], (3, 1))), True),
}


# Of each kind one; `OTHERS` has more, of first order.
KINDS = (
    *("fisher_vector_product", "renyi_divergence", "mutual_information", "softmax_cross_entropy"),
    *("linear_softmax_cross_entropy", "twin kl_div"),
)


@pytest.mark.grid
@pytest.mark.parametrize("name", marked(COVERED, KINDS))
def test_check_gradient_takes_every_kind_of_function(name: str):
    """Curvature, norms, statistics, measures and PyTorch's losses, and what is due of second order."""
    function, args, second_order = COVERED[name]
    report = check_gradient(function, *args, tolerance=64, second_order=second_order)
    assert report.ok, str(report)
    assert {c.way for c in report.comparisons} == {"value", "jax.grad", "jax.jvp", DIFFERENCES}


_HIDDEN = np.array([[0.5, -1.0], [1.5, 0.25]], np.float32)
_KERNEL = np.array([[1.0, -0.5, 0.25], [0.75, 0.5, -1.0]], np.float32)
_LABELS = np.array([0, 2])
_ggn_product: Any = jaxent.linear_ggn_vector_product
OTHERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], bool]] = {
    "curvature": (
        lambda h, w: jnp.sum(jnp.square(_ggn_product(h, w, (None, w))[1])),
        (_HIDDEN, _KERNEL),
        False,
    ),
    "a diagonal": (lambda h, w: jnp.sum(jaxent.linear_ggn_diagonal(h, w).kernel), (_HIDDEN, _KERNEL), False),
    "norms": (
        lambda h, w: jnp.sum(jaxent.linear_gradient_norms(h, w, _LABELS, per="sequence").kernel),
        (_HIDDEN, _KERNEL),
        False,
    ),
    "statistics": (
        lambda h, w: jnp.sum(jaxent.linear_token_statistics(h, w, _LABELS).entropy),
        (_HIDDEN, _KERNEL),
        False,
    ),
    "a measure, second order": (jaxent.kl_divergence, (np.array([0.5, 0.5]), np.array([0.25, 0.75])), True),
    "torch_compat": (lambda z: nn.cross_entropy(z, _LABELS), (_HIDDEN @ _KERNEL,), False),
}


# What check_gradient does with them does not depend on the function; of these there is no other test.
@pytest.mark.parametrize("name", marked(OTHERS, ["curvature", "a diagonal", "norms"]))
def test_curvature_norms_statistics_and_measures(name: str):
    function, args, second_order = OTHERS[name]
    report = check_gradient(function, *args, second_order=second_order)
    assert report.ok, str(report)
    assert {c.way for c in report.comparisons} >= {"jax.grad", "jax.jvp", DIFFERENCES}
