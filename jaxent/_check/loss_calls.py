"""What a function takes: a loss of this library, of `torch_compat`, or of the user's own, told by its parameters."""

import dataclasses
import functools
import inspect
from typing import Any, Literal

from jaxent._arguments import arrays

Kind = Literal["logits", "log_probs", "hidden", "binary", "binary_probabilities", "kl_div", "score", "measure"]

# By the first parameter. Whatever else comes first counts as logits, since a loss of the user's own may call them so.
KINDS: dict[str, Kind] = {
    "hidden": "hidden",
    "log_probs": "log_probs",
    "p": "measure",
    "pxy": "measure",
    "pxyz": "measure",
    "distributions": "measure",
    "probabilities": "score",
    "p_logits": "measure",
}
# PyTorch calls everything `input` and `target`: by the name of the function or class.
PYTORCH_KINDS: dict[str, Kind] = {
    "nll_loss": "log_probs",
    "NLLLoss": "log_probs",
    "kl_div": "kl_div",
    "KLDivLoss": "kl_div",
    "binary_cross_entropy": "binary_probabilities",
    "BCELoss": "binary_probabilities",
    "binary_cross_entropy_with_logits": "binary",
    "BCEWithLogitsLoss": "binary",
}
# What takes logits or hidden states, but is no loss with targets.
NO_TARGETS = ("row_loss", "row_fn", "hidden_p", "logits_fn", "labels")


@dataclasses.dataclass(frozen=True)
class LossSignature:
    """How a loss is called, and which of its conventions the checks need."""

    kind: Kind
    name: str
    signature: inspect.Signature
    kept: dict[str, Any]
    """The options that a callable object holds, such as those of `torch.nn.CrossEntropyLoss`."""
    pytorch: bool

    def bind(self, *args: Any, **options: Any) -> dict[str, Any]:
        """All arguments of a call by this library's names; data is in the order of the call."""
        bound = self.signature.bind(*args, **options)
        bound.apply_defaults()
        arguments = {**self.kept, **bound.arguments}
        for parameter in self.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(parameter.name)
        if self.pytorch:
            names = {"weight": "weights" if self.kind.startswith("binary") else "class_weights"}
            arguments = {names.get(name, name): value for name, value in arguments.items()}
        return arguments

    def data(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The positional arguments: arrays, in their order."""
        return {
            name: arguments[name]
            for name, parameter in self.signature.parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name in arguments
        }

    def takes(self, option: str) -> bool:
        parameters = self.signature.parameters
        return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def class_axis(self, arguments: dict[str, Any], ndim: int) -> int:
        """Counted from the end; PyTorch's is 1, or 0 of a single row."""
        if not self.pytorch:
            return arrays.canonical_axis(arguments.get("axis", -1), ndim)
        return (0 if ndim == 1 else 1) - ndim


def read_signature(loss: Any) -> LossSignature:
    """The loss's own, or a `TypeError`."""
    if not callable(loss):
        raise arrays.dtype_error("loss", "be a function", loss)
    signature, named = inspect.signature(loss), _inner(loss)
    kept = {}
    if dataclasses.is_dataclass(named) and not isinstance(named, type):
        kept = {field.name: getattr(named, field.name) for field in dataclasses.fields(named)}
    data = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = "be a loss of logits, probabilities or hidden states and targets, or a measure of distributions"
    if not data or data[0] in NO_TARGETS:
        raise arrays.dtype_error("loss", expected, loss)
    pytorch = data[0] == "input"
    name = getattr(named, "__name__", type(named).__name__)
    if "kernel" in data or "linear_weight" in data:
        kind: Kind = "hidden"
    elif pytorch and name in PYTORCH_KINDS:
        kind = PYTORCH_KINDS[name]
    elif "pos_weight" in signature.parameters or "pos_weight" in kept:
        kind = "binary"
    elif data[0] == "logits" and len(data) == 1:
        kind = "measure"
    else:
        kind = KINDS.get(data[0], "logits")
    if kind == "score" and len(data) < 2:
        kind = "measure"
    if kind != "measure" and len(data) < 2:
        raise arrays.dtype_error("loss", expected, loss)
    return LossSignature(kind, name, signature, kept, pytorch)


def _inner(loss: Any) -> Any:
    """What a `functools.partial`, or a function that wraps another, stands for."""
    while True:
        if isinstance(loss, functools.partial):
            loss = loss.func
        elif hasattr(loss, "__wrapped__"):
            loss = loss.__wrapped__
        else:
            return loss
