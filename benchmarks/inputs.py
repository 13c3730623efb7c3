"""The data of a case on the device, for JAX and for torch, which shares JAX's memory."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case


class Inputs:
    """`arrays` as `Case.data` orders them; what torch needs of them is made when it is first asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.arrays: tuple[jax.Array, ...] = tuple(jnp.asarray(x) for x in case.data())

    @functools.cached_property
    def torch(self) -> tuple[Any, list[Any], Any, list[Any]]:
        """The module, the floating inputs (a kernel in torch's layout, `(V, D)`), the labels, the tangents."""
        torch = importlib.import_module("torch")
        count = 2 if self.case.hidden else 1
        tensors = [torch.from_dlpack(x) for x in self.arrays]
        floats, labels, tangents = tensors[:count], tensors[count], tensors[count + 1 :]
        for group in (floats, tangents):
            if len(group) == 2:
                group[1] = group[1].T.contiguous()
        for tensor in floats:
            tensor.requires_grad_(self.case.mode != "value")
        return torch, floats, labels.long(), tangents
