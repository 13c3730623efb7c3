"""How exact every installed loss is, against the definition: value, gradient and curvature, on the same float32 input.

Nothing is timed. A result is a case's value, its gradient, or its Hessian times a vector.
"""

import datetime
import functools
import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.accuracy_cases import QUANTITIES, SIZES, Case, Quantity, cases
from benchmarks.cases import IGNORED
from benchmarks.harness import failure
from benchmarks.report import commit, machine, one_line_lists
from jaxent import linear_softmax_cross_entropy, softmax_cross_entropy

EPSILON, TINY = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).tiny)
WRONG = 0.5  # relative error
Results = dict[Quantity, np.ndarray]
Loss = Callable[[Any], Any]


@dataclass(frozen=True)
class Peer:
    """`loss(case)` is a function of the logits, or None where the peer has nothing for the case."""

    name: str
    package: str
    loss: Callable[[Case], Loss | None]
    evaluate: Callable[[Loss, Case], dict[Quantity, np.ndarray | Exception]]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


# ----------------------------------------------------------------------------------------------------------------------
# JAX


def _with_jax(loss: Loss, case: Case) -> dict[Quantity, np.ndarray | Exception]:
    z, v = jnp.asarray(case.logits), jnp.asarray(case.tangent)
    try:
        (value, gradient), (_, curvature) = _all_of(loss)(z, v)
        return {"value": np.asarray(value), "gradient": np.asarray(gradient), "curvature": np.asarray(curvature)}
    except Exception as error:  # of the curvature, unless the others have one too
        return {
            "value": _attempt(lambda: jax.jit(loss)(z)),
            "gradient": _attempt(lambda: jax.jit(jax.grad(loss))(z)),
            "curvature": error,
        }


@functools.lru_cache(maxsize=1)
def _all_of(loss: Loss) -> Callable[..., Any]:
    """In one program, which cases of one loss share."""
    return jax.jit(lambda z, v: jax.jvp(jax.value_and_grad(loss), (z,), (v,)))


def _attempt(function: Callable[[], Any]) -> np.ndarray | Exception:
    try:
        return np.asarray(function())
    except Exception as error:
        return error


def _jaxent(case: Case) -> Loss:
    return lambda z: softmax_cross_entropy(
        z, case.targets, where=case.where, weights=case.weights, ignore_index=IGNORED, reduction="sum"
    )


def _by_rows(rows: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[Case], Loss]:
    """Rows that do not count are masked as users do it: after their loss."""

    def loss(case: Case) -> Loss:
        def total(z: jax.Array) -> jax.Array:
            losses = jnp.where(jnp.asarray(case.counts), rows(z, jnp.asarray(case.targets)), 0)
            return jnp.sum(losses if case.weights is None else losses * case.weights)

        return total

    return loss


def _log_softmax_rows(z: jax.Array, targets: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(z)
    if targets.ndim == 2:
        return -jnp.sum(targets * log_p, axis=-1)
    return -jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]


def _optax_rows(z: jax.Array, targets: jax.Array) -> jax.Array:
    if targets.ndim == 2:
        return optax.softmax_cross_entropy(z, targets)
    return optax.softmax_cross_entropy_with_integer_labels(z, targets)


def _from_hidden(
    loss: Callable[[Case, Any], Any | None], *, weights: bool = False, where: bool = False
) -> Callable[[Case], Loss | None]:
    """A loss of hidden states and a kernel gets the logits as hidden states and the identity as kernel.

    An infinite logit times the zeros of the identity would be nan: such rows are left out.
    """

    def prepare(case: Case) -> Loss | None:
        stated = case.by_label and (weights or case.weights is None) and (where or case.where is None)
        return loss(case, np.eye(case.logits.shape[1], dtype=np.float32)) if stated and _is_finite(case) else None

    return prepare


def _is_finite(case: Case) -> bool:
    return bool(np.all(np.isfinite(case.logits[case.counts])))


def _jaxent_linear(case: Case, kernel: np.ndarray) -> Loss:
    return lambda z: linear_softmax_cross_entropy(
        z, kernel, case.targets, where=case.where, weights=case.weights, ignore_index=IGNORED, reduction="sum"
    )


def _tokamax(case: Case, kernel: np.ndarray) -> Loss:
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
    loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    labels, weights = jnp.asarray(case.targets), jnp.asarray(kernel)
    return lambda z: loss(z, labels, weights, reduction="sum", implementation="xla")


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch


def _with_torch(loss: Loss, case: Case) -> dict[Quantity, np.ndarray | Exception]:
    torch = importlib.import_module("torch")
    v = torch.from_numpy(case.tangent)

    def leaf() -> Any:
        return torch.from_numpy(case.logits.copy()).requires_grad_()

    def gradient() -> Any:
        z = leaf()
        return torch.autograd.grad(loss(z), z)[0]

    def curvature() -> Any:
        z = leaf()
        first = torch.autograd.grad(loss(z), z, create_graph=True)[0]
        return torch.autograd.grad(torch.sum(first * v), z)[0]

    functions = {"value": lambda: loss(leaf()).detach(), "gradient": gradient, "curvature": curvature}
    return {quantity: _attempt(functions[quantity]) for quantity in QUANTITIES}


def _torch(case: Case) -> Loss:
    torch = importlib.import_module("torch")
    kept, targets = torch.from_numpy(case.counts), torch.from_numpy(case.targets)
    targets = targets.long() if case.by_label else targets.float()

    def total(z: Any) -> Any:
        losses = torch.nn.functional.cross_entropy(z, targets, reduction="none", ignore_index=IGNORED)
        losses = torch.where(kept, losses, 0.0)
        return torch.sum(losses if case.weights is None else losses * torch.from_numpy(case.weights))

    return total


def _torch_fused(case: Case, kernel: np.ndarray) -> Loss | None:
    torch = importlib.import_module("torch")
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    weight, targets = torch.from_numpy(kernel), torch.from_numpy(case.targets).long()
    loss = torch.nn.functional.linear_cross_entropy
    return lambda z: loss(z, weight, targets, reduction="sum", ignore_index=IGNORED)


PEERS = (
    Peer("jaxent", "jaxent", _jaxent, _with_jax),
    Peer("jaxent, from hidden", "jaxent", _from_hidden(_jaxent_linear, weights=True, where=True), _with_jax),
    Peer("optax", "optax", _by_rows(_optax_rows), _with_jax),
    Peer("jax.nn.log_softmax", "jax", _by_rows(_log_softmax_rows), _with_jax),
    Peer("torch dense", "torch", _torch, _with_torch),
    Peer("torch fused", "torch", _from_hidden(_torch_fused), _with_torch),
    Peer("tokamax xla", "tokamax", _from_hidden(_tokamax), _with_jax),
)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def score(got: np.ndarray | Exception, due: np.ndarray, size: np.ndarray) -> dict[str, Any]:
    """One result: its largest and all errors in ulp where numbers are due, and what is amiss beyond that."""
    if isinstance(got, Exception):
        return {"verdict": "raises", "reason": failure(got), "ulp": []}
    got = got.astype(due.dtype)
    finite = np.isfinite(due) & np.isfinite(got)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - due) / np.maximum(np.maximum(np.abs(due), size), TINY)
    error = np.where((np.abs(due) < TINY) & (got == 0), 0, error)  # below the smallest normal number there is 0
    same = np.where(finite, error <= WRONG, (got == due) | (np.isnan(got) & np.isnan(due)))
    is_nan = np.any(np.isnan(got) & ~np.isnan(due))
    verdict = "nan" if is_nan else "right" if np.all(same) else "wrong"
    return {"verdict": verdict, "ulp": [float(x) for x in np.ravel(error[finite & (due != 0)] / EPSILON)]}


def measure(peer: Peer) -> list[dict[str, Any]]:
    """A result for each quantity of each case that the peer can state."""
    results, loss, group = [], None, ""
    for case in cases():
        if not case.group == group == "sizes":  # those differ in their logits alone
            loss, group = peer.loss(case), case.group
        if loss is None:
            continue
        found, due = peer.evaluate(loss, case), case.due()
        for quantity in QUANTITIES:
            scored = score(found[quantity], *due[quantity])
            results.append({"group": case.group, "case": case.name, "quantity": quantity, **scored})
    return results


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of each quantity and how many results are amiss; down to which size of the loss three digits are right."""
    of_cases = [r for r in results if r["group"] != "sizes"]
    errors = {q: [x for r in of_cases if r["quantity"] == q for x in r["ulp"]] for q in QUANTITIES}
    verdicts = [r["verdict"] for r in of_cases]
    return {
        "results": len(of_cases),
        "down_to": {q: _down_to([r for r in results if r["group"] == "sizes" and r["quantity"] == q]) for q in errors},
        **{q: {"largest": max(x), "median": statistics.median(x)} if x else None for q, x in errors.items()},
        **{verdict: verdicts.count(verdict) for verdict in ("nan", "wrong", "raises")},
    }


def _down_to(results: list[dict[str, Any]]) -> float | None:
    """The least size above which every result has three digits; None if the largest has not."""
    worst = [max(r["ulp"], default=float("inf")) for r in results]
    bad = [i for i, ulp in enumerate(worst) if not ulp * EPSILON <= 1e-3]
    first = bad[-1] + 1 if bad else 0
    return float(SIZES[first]) if first < len(worst) else None


def run(path: Path) -> dict[str, Any]:
    """The record: for each peer its scores, what is amiss and the largest error at each size of the loss."""
    record: dict[str, Any] = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("jaxent", "jax", "optax")},
        "absent": [peer.name for peer in PEERS if not peer.installed],
        "scores": {},
        "amiss": {},
        "sizes": {},
    }
    for peer in (peer for peer in PEERS if peer.installed):
        results = measure(peer)
        if peer.package not in record["versions"]:
            record["versions"][peer.package] = version(peer.package)
        record["scores"][peer.name] = summary(results)
        record["amiss"][peer.name] = [
            f"{r['case']}, {r['quantity']}: {r.get('reason', r['verdict'])}"
            for r in results
            if r["verdict"] != "right" and r["group"] != "sizes"
        ]
        record["sizes"][peer.name] = {
            q: [max(r["ulp"], default=None) for r in results if r["group"] == "sizes" and r["quantity"] == q]
            for q in QUANTITIES
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(one_line_lists(json.dumps(record, indent=1)) + "\n", encoding="utf-8")
    return record
