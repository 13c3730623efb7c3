"""Losses over eight devices: automatic, explicit and manual meshes give what one device gives, and send little."""

from typing import Any

import jax
import numpy as np
import pytest
from collectives import Collective, collectives
from meshes import (
    CASES,
    CLASSES,
    FEATURES,
    KINDS,
    MESHES,
    ROWS,
    SHARDABLE,
    TOP,
    compiled,
    make_mesh,
    placed,
    unsharded,
)

GRID = [
    pytest.param(case, shape, kind, marks=[] if shape == "2x4" or case in ("dense", "linear") else pytest.mark.slow)
    for case in CASES
    for shape in MESHES
    for kind in KINDS
    if kind != "manual" or case in SHARDABLE
]


def assert_same(got: Any, want: Any) -> None:
    """Equal but for sums in another order, measured against the largest entry."""

    def check(a: Any, b: Any) -> None:
        if b.dtype == np.int32:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(b), initial=1e-3))

    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(check, got, want)


def foreign(found: list[Collective], data: int, vocab: int) -> list[Collective]:
    """What is neither a sum of a few numbers a row, nor of one a class, nor of a gradient by hidden or kernel."""

    def is_due(extent: tuple[int, ...]) -> bool:
        if len(extent) < 2:
            return sum(extent) <= max(ROWS // data, CLASSES)
        few = [n for n in extent if n in (FEATURES, TOP, vocab)]
        many = [n for n in extent if n not in few]
        return len(many) <= 1 and sum(many) <= max(ROWS // data, CLASSES // vocab)

    return [c for c in found if c.kind not in ("all-reduce", "reduce-scatter") or not is_due(c.extent)]


@pytest.mark.parametrize(("case", "shape", "kind"), GRID)
def test_value_gradient_and_hessian_product(case: str, shape: str, kind: str):
    program = compiled(case, shape, kind)
    args = placed(case, make_mesh(shape, kind))
    got = program(*args)
    assert_same(got, unsharded(case))
    _, gradient, product = got
    for name, parameter, *results in zip(CASES[case].wanted, args, gradient, product, strict=False):
        for result in results[: 1 if case == "nll" else 2]:  # which is linear: its Hessian product is a constant
            assert result.sharding.is_equivalent_to(parameter.sharding, result.ndim), name
    assert foreign(collectives(program), *MESHES[shape]) == []
