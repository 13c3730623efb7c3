"""What else one could use: each peer that can be imported, with its version; the rest is listed as absent.

A peer turns a case and its data into a contender, or says None: it has nothing for that case.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cases import Case
from benchmarks.harness import Contender, Effort, compiled, seconds_of
from jaxent.linear import linear_softmax_cross_entropy
from jaxent.losses import softmax_cross_entropy

Data = tuple[jax.Array, ...]
Prepare = Callable[[str, Case, Data, Effort], Contender | None]


@dataclass(frozen=True)
class Peer:
    package: str
    name: str
    suites: tuple[str, ...]
    prepare: "Prepare"

    @property
    def version(self) -> str | None:
        """None if it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def contender(self, case: Case, data: Data, effort: Effort) -> Contender | None:
        label = self.name if self.package in ("jaxent", "jax") else f"{self.name} {self.version}"
        return self.prepare(label, case, data, effort)


# ----------------------------------------------------------------------------------------------------------------------
# JAX: a loss of logits or of hidden states becomes a contender


def _jax_case(name: str, case: Case, data: Data, effort: Effort, loss: Callable[..., Any]) -> Contender:
    *floats, labels = data
    function = loss
    if case.mode == "value and gradient":
        function = jax.value_and_grad(loss, argnums=tuple(range(len(floats))))
    return compiled(name, function, *floats, labels, effort=effort)


def _on_logits(loss_of_logits: Callable[[jax.Array, jax.Array], jax.Array]) -> Prepare:
    """The same loss for both suites: dense code makes the logits first."""

    def linear(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return loss_of_logits(hidden @ kernel, labels)

    def prepare(name: str, case: Case, data: Data, effort: Effort) -> Contender:
        return _jax_case(name, case, data, effort, linear if case.hidden else loss_of_logits)

    return prepare


def _jaxent(name: str, case: Case, data: Data, effort: Effort) -> Contender:
    loss = linear_softmax_cross_entropy if case.hidden else softmax_cross_entropy
    return _jax_case(name, case, data, effort, loss)


def _optax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.mean(losses)


def _log_softmax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1))


def _tokamax(implementation: str | None) -> Prepare:
    def prepare(name: str, case: Case, data: Data, effort: Effort) -> Contender | None:
        tokamax = importlib.import_module("tokamax")

        def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
            return tokamax.linear_softmax_cross_entropy_loss(
                hidden, labels, kernel, reduction="mean", implementation=implementation
            )

        try:
            return _jax_case(name, case, data, effort, loss)
        except (NotImplementedError, ValueError):  # no kernel for this device or shape
            return None

    return prepare


def products(data: Data, effort: Effort) -> Contender:
    """The three matrix products of a linear loss and nothing else, with the logits as their own gradient."""
    hidden, kernel, _ = data

    def three(hidden: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = hidden @ kernel
        return logits @ kernel.T, hidden.T @ logits

    contender = compiled("three products alone", three, hidden, kernel, effort=effort)
    return Contender(contender.name, contender.call, None, contender.compile_seconds, contender.temp_bytes)


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch


def _torch_data(case: Case, data: Data) -> tuple[Any, list[Any], Any]:
    """The module, the floating inputs (a kernel in its layout, `(V, D)`), the labels, all in JAX's memory."""
    torch = importlib.import_module("torch")
    *tensors, labels = (torch.from_dlpack(x) for x in data)
    if case.hidden:
        tensors[1] = tensors[1].T.contiguous()
    for tensor in tensors:
        tensor.requires_grad_(case.mode == "value and gradient")
    return torch, tensors, labels.long()


def torch_threads() -> dict[str, int]:
    """What PyTorch uses, for the record: a comparison on CPU is between equals only if XLA has as many."""
    if Peer("torch", "torch", (), _torch_dense).version is None:
        return {}
    return {"torch": importlib.import_module("torch").get_num_threads()}


def _torch_case(name: str, case: Case, data: Data, loss_of: Callable[..., Any]) -> Contender:
    torch, tensors, labels = _torch_data(case, data)
    wait = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None

    def run() -> list[Any]:
        for tensor in tensors:
            tensor.grad = None
        if case.mode == "value":
            with torch.no_grad():
                out = [loss_of(torch, *tensors, labels)]
        else:
            loss = loss_of(torch, *tensors, labels)
            loss.backward()
            out = [loss.detach(), *(tensor.grad for tensor in tensors)]
        wait()
        return out

    def results() -> list[np.ndarray]:
        value, *gradients = (x.float().cpu().numpy() for x in run())
        return [value, *(g.T if i == 1 else g for i, g in enumerate(gradients))]

    return Contender(name, run, results)


def _torch_dense(name: str, case: Case, data: Data, effort: Effort) -> Contender:
    def loss(torch: Any, *tensors: Any) -> Any:
        *floats, labels = tensors
        functional = torch.nn.functional
        logits = functional.linear(*floats) if case.hidden else floats[0]
        return functional.cross_entropy(logits, labels)

    return _torch_case(name, case, data, loss)


def _torch_fused(name: str, case: Case, data: Data, effort: Effort) -> Contender | None:
    """`linear_cross_entropy` at the rows a chunk that are fastest here, found by trying."""
    torch = importlib.import_module("torch")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None

    def with_chunk(rows: int | None) -> Contender:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

        def loss(torch: Any, hidden: Any, kernel: Any, labels: Any) -> Any:
            return torch.nn.functional.linear_cross_entropy(hidden, kernel, labels, options=options)

        return _torch_case(f"{name}, {'automatic' if rows is None else rows} rows", case, data, loss)

    sizes = [case.rows >> k for k in range(8) if case.rows >> k >= 16]
    contenders = [with_chunk(rows) for rows in (None, *sizes)]
    seconds = [min(seconds_of(c.call) for _ in range(3)) for c in contenders]
    return contenders[int(np.argmin(seconds))]


# ----------------------------------------------------------------------------------------------------------------------

PEERS = (
    Peer("jaxent", "jaxent", ("dense", "linear"), _jaxent),
    Peer("optax", "optax", ("dense", "linear"), _on_logits(_optax_loss)),
    Peer("jax", "jax.nn.log_softmax", ("dense", "linear"), _on_logits(_log_softmax_loss)),
    Peer("torch", "torch dense", ("dense", "linear"), _torch_dense),
    Peer("torch", "torch fused", ("linear",), _torch_fused),
    Peer("tokamax", "tokamax", ("linear",), _tokamax(None)),
    Peer("tokamax", "tokamax chunked", ("linear",), _tokamax("chunked_xla")),
)


def present(suite: str) -> tuple[list[Peer], list[str]]:
    """The peers that can be used, jaxent first, and the names of those that are not installed."""
    peers = [p for p in PEERS if suite in p.suites]
    return [p for p in peers if p.version], [p.name for p in peers if not p.version]
