"""`jaxent.torch_compat` against results of PyTorch that `golden/make_torch_golden.py` has written down."""

import dataclasses
import functools
import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
