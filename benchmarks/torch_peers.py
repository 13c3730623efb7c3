"""PyTorch, dense and fused, on the data that JAX holds."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import GRADIENT, IGNORED, Case
from benchmarks.harness import Contender, Effort, estimate
from benchmarks.inputs import Inputs

LEAST_CHUNK = 32
GIVEN_UP = 1.15  # heuristic: where a chunk is slower than the best one by this much, half of it is not tried


def threads() -> int:
    """What PyTorch uses, for the record: a comparison on CPU is between equals only if XLA has as many."""
    return importlib.import_module("torch").get_num_threads()


def _contender(name: str, case: Case, inputs: Inputs, loss_of: Callable[..., Any]) -> Contender:
    torch, tensors, labels, tangents = inputs.torch
    wait = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None

    def run() -> list[Any]:
        if case.mode == "value":
            with torch.no_grad():
                out = [loss_of(torch, *tensors, labels)]
        elif case.mode == GRADIENT:
            loss = loss_of(torch, *tensors, labels)
            out = [loss.detach(), *torch.autograd.grad(loss, tensors)]
        else:
            gradients = torch.autograd.grad(loss_of(torch, *tensors, labels), tensors, create_graph=True)
            out = list(torch.autograd.grad(gradients, tensors, tangents))
        wait()
        return out

    def temporaries() -> int | None:
        """PyTorch counts what its own allocator gives, on CUDA devices only."""
        if not tensors[0].is_cuda:
            return None
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        made = sum(x.numel() * x.element_size() for x in run())
        return max(torch.cuda.max_memory_allocated() - held - made, 0)

    def results() -> list[np.ndarray]:
        out = [x.detach().float().cpu() for x in run()]
        if case.hidden and case.mode != "value":
            out[-1] = out[-1].T.contiguous()
        return [x.numpy() for x in out]

    return Contender(name, run, results, temp_bytes=temporaries())


def products(inputs: Inputs, logits: Any, rows: int) -> dict[str, Callable[[], Any]]:
    """The three matrix products of a head alone; empty where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    torch, (hidden, kernel), _, _ = inputs.torch
    hidden, kernel, z = hidden.detach()[:rows], kernel.detach(), torch.from_dlpack(logits)
    wait = torch.cuda.synchronize if hidden.is_cuda else lambda: None

    def waited(product: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            out = product()
            wait()
            return out

        return run

    return {
        "logits": waited(lambda: hidden @ kernel.T),
        "by hidden": waited(lambda: z @ kernel),
        "by kernel": waited(lambda: z.T @ hidden),
    }


def dense(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender | None:
    if case.donated or case.mode in ("Gauss-Newton product", "gradient norms"):
        return None

    def loss(torch: Any, *tensors: Any) -> Any:
        *floats, labels = tensors
        functional = torch.nn.functional
        logits = functional.linear(*floats) if case.hidden else floats[0]
        return functional.cross_entropy(logits.float(), labels)  # as the others do: the loss of bfloat16 in float32

    return _contender(name, case, inputs, loss)


def fused(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender | None:
    """`linear_cross_entropy` at the rows a chunk that are fastest here: halved while that helps."""
    torch = importlib.import_module("torch")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions") or case.rows <= LEAST_CHUNK:
        return None  # so few rows are one chunk, as of dense code

    def with_chunk(rows: int | None) -> tuple[float, Contender]:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

        def loss(torch: Any, hidden: Any, kernel: Any, labels: Any) -> Any:
            function, ignored = torch.nn.functional.linear_cross_entropy, IGNORED if case.use else None
            return function(hidden, kernel, labels, ignore_index=ignored, options=options)

        label = f"{name}, {'automatic' if rows is None else rows} rows"
        contender = _contender(label, case, inputs, loss)
        return estimate(contender.call), contender

    best, rows = with_chunk(None), case.rows
    while rows >= LEAST_CHUNK:
        tried = with_chunk(rows)
        if tried[0] > GIVEN_UP * best[0] and rows < case.rows:
            break
        best = min(best, tried, key=lambda x: x[0])
        rows //= 2
    return best[1]
