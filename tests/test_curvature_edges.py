"""Curvature of rows that do not count, and bad input of its functions."""

from typing import Any

import jax
import numpy as np
import pytest
from cases import draw_labels, draw_logits
from curvature_heads import (
    COUNT,
    ROWS,
    draw_head,
    fisher_vector_product,
    ggn_vector_product,
    linear_fisher_vector_product,
    linear_ggn_vector_product,
)

from jaxent import logit_hessian, logit_hessian_product


@pytest.mark.grid
def test_rows_that_do_not_count(rng: np.random.Generator):
    hidden, kernel, _ = (x.astype(np.float32) for x in draw_head(rng))
    labels, v = draw_labels(rng, (ROWS,), COUNT), rng.normal(size=kernel.shape).astype(np.float32)
    broken, marked = hidden.copy(), labels.copy()
    broken[[1, 3]] = np.nan
    marked[1] = -100
    weights = np.array([1, 1, 2, 0, 0], np.float32)
    kept = np.array([0, 2])
    steps = np.full_like(hidden, np.nan)
    steps[kept] = 1
    every, none = np.ones(ROWS, bool), np.zeros(ROWS, bool)

    def ggn(hidden: Any, labels: Any, steps: Any, **options: Any) -> Any:
        return linear_ggn_vector_product(hidden, kernel, (steps, v), targets=labels, chunk_rows=2, **options)

    def fisher(hidden: Any, labels: Any, steps: Any, **options: Any) -> Any:
        return linear_fisher_vector_product(hidden, kernel, labels, (steps, v), chunk_rows=2, **options)

    for product in map(jax.jit, (ggn, fisher)):
        want = product(hidden[kept], labels[kept], np.ones_like(hidden[kept]), weights=weights[kept], where=every[kept])
        steps[4] = 1
        got = product(broken, marked, steps, weights=weights, where=every)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
        np.testing.assert_allclose(got[0][kept], want[0], rtol=1e-6)
        np.testing.assert_array_equal(got[0][np.array([1, 3, 4])], 0)
        for nothing in product(broken, labels, steps, weights=weights, where=none):
            np.testing.assert_array_equal(nothing, 0)
        beyond = np.where(np.arange(ROWS) == 0, COUNT, labels)
        outside = product(hidden, beyond, np.ones_like(hidden), weights=weights, where=every)
        assert np.isnan(outside[1]).all()
        assert np.isnan(outside[0][0]).all()

    def dense(logits: Any, labels: Any) -> Any:
        return ggn_vector_product(lambda z: z, logits, np.ones_like(logits), targets=labels)

    z = draw_logits(rng, (2, COUNT))
    z[0] = np.nan
    np.testing.assert_array_equal(dense(z, np.array([-100, 0]))[0], 0)
    assert np.isnan(dense(z, np.array([0, 0]))[0]).all()


TREE = {"w": np.zeros((2, 3), np.float32)}
BAD = [
    (
        lambda: logit_hessian(np.zeros((2, 3), np.int32)),
        TypeError,
        ["logit_hessian", "`logits`", "floating", "int32[2,3]"],
    ),
    (lambda: logit_hessian_product(np.zeros((2, 3)), np.zeros(3)), ValueError, ["`v`", "(2, 3)", "float32[3]"]),
    (lambda: ggn_vector_product(lambda p: p["w"], TREE, np.zeros((2, 3))), ValueError, ["`v`", "structure", "'w'"]),
    (lambda: ggn_vector_product(lambda p: p["w"], TREE, {"w": np.zeros(2)}), ValueError, ["`v['w']`", "(2, 3)"]),
    (
        lambda: ggn_vector_product(lambda p: p["w"], {"w": np.arange(3)}, {"w": np.zeros(3)}),
        TypeError,
        ["ggn_vector_product", "`params['w']`", "floating"],
    ),
    (lambda: ggn_vector_product(lambda p: p, TREE, TREE), TypeError, ["`logits_fn`", "floating logits", "dict"]),
    (
        lambda: ggn_vector_product(lambda p: p["w"], TREE, TREE, reduction="none"),
        ValueError,
        ["`reduction`", "'mean' or 'sum'", "'none'"],
    ),
    (
        lambda: fisher_vector_product(lambda p: p["w"], TREE, np.zeros(3, np.int32), TREE),
        ValueError,
        ["fisher_vector_product", "(2,)", "int32[3]"],
    ),
    (
        lambda: linear_ggn_vector_product(np.zeros((2, 3)), np.zeros((3, 4)), np.zeros((3, 4))),
        TypeError,
        ["linear_ggn_vector_product", "`v`", "(v_hidden, v_kernel)"],
    ),
    (
        lambda: linear_ggn_vector_product(np.zeros((2, 3)), np.zeros((3, 4)), (None, np.zeros((3, 5)))),
        ValueError,
        ["`v_kernel`", "(3, 4)", "float32[3,5]"],
    ),
    (
        lambda: linear_fisher_vector_product(
            np.zeros((2, 3)), np.zeros((3, 4)), np.zeros(2, np.int32), (None, None, np.zeros(4))
        ),
        ValueError,
        ["linear_fisher_vector_product", "`v_bias`", "no `bias`"],
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case: int):
    call, error, parts = BAD[case]
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
