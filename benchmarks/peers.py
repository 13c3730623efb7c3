"""What else one could use: each peer that can be imported, with its version; the rest is listed as absent.

A peer turns a case and its data into a contender, or says None: it has nothing for that case.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import sharded, torch_peers
from benchmarks.cases import CHUNKS, GRADIENT, IGNORED, Case, Resources
from benchmarks.harness import Contender, Effort, compiled, failure
from benchmarks.inputs import Inputs
from jaxent import linear_ggn_vector_product, linear_gradient_norms, linear_softmax_cross_entropy, softmax_cross_entropy

Prepare = Callable[[str, Case, Inputs, Effort], Contender | None]


@dataclass(frozen=True)
class Peer:
    package: str
    name: str
    suites: tuple[str, ...]
    prepare: Prepare

    @property
    def version(self) -> str | None:
        """None if it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @property
    def label(self) -> str:
        return self.name if self.package in ("jaxent", "jax") else f"{self.name} {self.version}"

    def contender(self, case: Case, inputs: Inputs, effort: Effort) -> Contender | None:
        contender = self.prepare(self.label, case, inputs, effort)
        return None if contender is None else dataclasses.replace(contender, peer=self.name)


# ----------------------------------------------------------------------------------------------------------------------
# JAX: a loss of logits or of hidden states becomes a contender


def derived(case: Case, loss: Callable[..., Any]) -> Callable[..., Any]:
    """What the case computes of `loss(*floats, labels)` alone, as a function of the case's data."""
    wanted = tuple(range(2 if case.hidden else 1))
    if case.mode == "value":
        return loss
    if case.mode == GRADIENT:
        return jax.value_and_grad(loss, argnums=wanted)

    def hessian_product(*data: jax.Array) -> Any:
        floats, labels, tangents = data[: len(wanted)], data[len(wanted)], data[len(wanted) + 1 :]
        gradient = jax.grad(lambda *floats: loss(*floats, labels), argnums=wanted)
        return jax.jvp(gradient, floats, tangents)[1]

    return hessian_product


def _jaxent_function(case: Case) -> Callable[..., Any]:
    if case.mode == "Gauss-Newton product":
        return lambda hidden, kernel, labels, *v: linear_ggn_vector_product(hidden, kernel, v)
    if case.mode == "gradient norms":
        return lambda *data: linear_gradient_norms(*data)[:3]
    return derived(case, linear_softmax_cross_entropy if case.hidden else softmax_cross_entropy)


def _dense_function(loss_of_logits: Callable[[jax.Array, jax.Array], jax.Array], case: Case) -> Callable[..., Any]:
    """The same from a mean loss of logits: dense code makes the logits first."""
    by_logits = jax.grad(loss_of_logits)

    def gauss_newton_product(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, *v: jax.Array) -> Any:
        logits, tangent = jax.jvp(jnp.matmul, (hidden, kernel), v)
        product = jax.jvp(lambda z: by_logits(z, labels), (logits,), (tangent,))[1]
        return jax.vjp(jnp.matmul, hidden, kernel)[1](product)

    def gradient_norms(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        gradient = by_logits(hidden @ kernel, labels) * len(labels)
        residual, by_hidden, sizes = (jnp.linalg.norm(x, axis=-1) for x in (gradient, gradient @ kernel.T, hidden))
        return residual, by_hidden, residual * sizes

    if case.mode == "Gauss-Newton product":
        return gauss_newton_product
    if case.mode == "gradient norms":
        return gradient_norms

    def loss(*data: jax.Array) -> jax.Array:
        *floats, labels = data
        return loss_of_logits(floats[0] @ floats[1] if case.hidden else floats[0], labels)

    return derived(case, loss)


def _jax_case(name: str, case: Case, inputs: Inputs, effort: Effort, function: Callable[..., Any]) -> Contender:
    return compiled(name, function, *inputs.arrays, effort=effort, donate=case.donated)


def _jaxent(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender:
    return _jax_case(name, case, inputs, effort, _jaxent_function(case))


def _jaxent_in_chunks(count: int) -> Prepare:
    def prepare(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender:
        loss = functools.partial(linear_softmax_cross_entropy, chunk_rows=-(-case.rows // count))
        return _jax_case(name, case, inputs, effort, derived(case, loss))

    return prepare


def _jaxent_not_donated(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender | None:
    if not case.donated:
        return None
    return _jaxent(name, dataclasses.replace(case, donated=False), inputs, effort)


def _on_logits(loss_of_logits: Callable[[jax.Array, jax.Array], jax.Array]) -> Prepare:
    def prepare(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender:
        return _jax_case(name, case, inputs, effort, _dense_function(loss_of_logits, case))

    return prepare


def _optax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))


def _log_softmax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1))


def _of_kept_rows(losses: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the rows that count, as dense code has it."""
    kept = labels != IGNORED
    return jnp.sum(jnp.where(kept, losses, 0)) / jnp.sum(kept, dtype=losses.dtype)


def _optax(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender | None:
    def of_kept(logits: jax.Array, labels: jax.Array) -> jax.Array:
        classes = jnp.where(labels == IGNORED, 0, labels)
        return _of_kept_rows(optax.softmax_cross_entropy_with_integer_labels(logits, classes), labels)

    return _on_logits(of_kept if case.use else _optax_loss)(name, case, inputs, effort)


def _where(holds: Callable[[Case], bool], prepare: Prepare) -> Prepare:
    return lambda name, case, inputs, effort: prepare(name, case, inputs, effort) if holds(case) else None


def _is_no_sweep(case: Case) -> bool:
    """A sweep shows how cost grows, of fused and of dense code; more of either would only take time."""
    return not case.sweep


def _is_plain(case: Case) -> bool:
    """Where some rows do not count, most fused losses have no word for it, and one dense loss stands for all."""
    return not case.sweep and not case.use


def _is_plain_shape(case: Case) -> bool:
    return _is_plain(case) and not case.head


def _tokamax(implementation: str) -> Prepare:
    def prepare(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender:
        # It reads its flags from the command line, where ours are.
        importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
        loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss

        def mean(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
            return loss(hidden, labels, kernel, reduction="mean", implementation=implementation)

        return _jax_case(name, case, inputs, effort, derived(case, mean))

    return _where(_is_plain, prepare)


def _on_mesh(kind: sharded.Kind, function_of: Callable[[Case], Callable[..., Any]]) -> Prepare:
    def prepare(name: str, case: Case, inputs: Inputs, effort: Effort) -> Contender:
        mesh = sharded.mesh_of(case, kind)
        in_shard_map = derived(case, sharded.mean_in_shard_map(case, mesh))
        with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
            function = in_shard_map if kind == "shard_map" else function_of(case)
            return compiled(name, function, *sharded.placed(case, mesh, inputs.arrays), effort=effort)

    return prepare


# ----------------------------------------------------------------------------------------------------------------------

LOGITS = ("dense", "linear", "curvature", "chunks")
LINEAR = ("linear", "chunks")
PEERS = (
    Peer("jaxent", "jaxent", LOGITS, _jaxent),
    Peer("jaxent", "jaxent, not donated", ("dense",), _jaxent_not_donated),
    Peer("optax", "optax", LOGITS, _optax),
    Peer("jax", "jax.nn.log_softmax", LOGITS, _where(_is_plain_shape, _on_logits(_log_softmax_loss))),
    Peer("torch", "torch dense", LOGITS, _where(_is_plain, torch_peers.dense)),
    Peer("torch", "torch fused", LINEAR, _where(_is_no_sweep, torch_peers.fused)),
    *(Peer("tokamax", f"tokamax {i}", LINEAR, _tokamax(i)) for i in ("xla", "chunked_xla", "mosaic_tpu")),
    *(Peer("jaxent", f"jaxent, {count} chunks", ("chunks",), _jaxent_in_chunks(count)) for count in CHUNKS),
    Peer("jaxent", "jaxent, one device", ("sharded",), _jaxent),
    Peer("jaxent", "jaxent, automatic", ("sharded",), _on_mesh("automatic", _jaxent_function)),
    Peer("jaxent", "jaxent, explicit", ("sharded",), _on_mesh("explicit", _jaxent_function)),
    Peer("jaxent", "jaxent, shard_map", ("sharded",), _on_mesh("shard_map", _jaxent_function)),
    Peer(
        "optax",
        "optax, automatic",
        ("sharded",),
        _on_mesh("automatic", functools.partial(_dense_function, _optax_loss)),
    ),
)


def present(suite: str) -> tuple[list[Peer], list[str]]:
    """The peers that can be used, jaxent first, and the names of those that are not installed."""
    peers = [p for p in PEERS if suite in p.suites]
    return [p for p in peers if p.version], [p.name for p in peers if not p.version]


def prepared(case: Case, inputs: Inputs, effort: Effort, at_hand: Resources) -> tuple[list[Contender], dict[str, str]]:
    """Contenders, ours first, and why the others cannot run: no kernel for this device or shape, too little memory."""
    contenders, left_out = [], {}
    for peer in present(case.suite)[0]:
        try:
            contender = peer.contender(case, inputs, effort)
        except Exception as error:
            if not contenders:  # ours, which the others are compared with
                raise
            left_out[peer.label] = failure(error)
            continue
        if contender is None:
            continue
        needed = (contender.temp_bytes or 0) + (contender.result_bytes or 0)
        if needed > at_hand.memory_bytes:
            left_out[peer.label] = f"needs {needed / 2**30:.1f} GiB, {at_hand.memory_bytes / 2**30:.1f} GiB are at hand"
        else:
            contenders.append(contender)
    return contenders, left_out
