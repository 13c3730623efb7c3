"""PyTorch's classification losses, for JAX: the same names, arguments, defaults, class axis and numbers.

    import jaxent.torch_compat as nn
    criterion = nn.CrossEntropyLoss()
    loss = criterion(outputs, labels)

The functions are those of `torch.nn.functional`, the classes those of `torch.nn`, as of PyTorch 2.13. They are this
library's losses with PyTorch's conventions: classes on axis 1 (axis 0 of a single row), results in the type of `input`
as PyTorch types them (without 64-bit types in JAX, float64 is float32), a mean over nothing is nan, with derivative 0,
and so is a class whose share in the loss is 0 and whose log-probability is -inf.

What differs:

1. No value raises: a label out of range gives nan, and so does a probability outside [0, 1] in `binary_cross_entropy`.
2. More is accepted: labels of any integer type, inputs of several types, `ignore_index=None` for no ignored rows,
   derivatives of any order and with respect to every argument, weights included.
3. Sums are float32 or wider whatever the inputs, and a loss keeps its relative accuracy however small it is.
4. Derivatives at nan and infinite inputs are those of the table "At the edges" in docs/exactness.md: an ignored row has
   derivative 0 whatever it holds, and in `kl_div`, where PyTorch's is nan, so has a target of 0.
5. Errors are `TypeError` or `ValueError`; deprecated arguments give a `DeprecationWarning`.
"""

import dataclasses
from dataclasses import InitVar
from typing import Any

import jax

from jaxent._typing import ArrayLike
from jaxent.torch_compat import _conventions
from jaxent.torch_compat._entrywise import binary_cross_entropy as binary_cross_entropy
from jaxent.torch_compat._entrywise import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from jaxent.torch_compat._entrywise import kl_div as kl_div
from jaxent.torch_compat._functional import cross_entropy as cross_entropy
from jaxent.torch_compat._functional import log_softmax as log_softmax
from jaxent.torch_compat._functional import nll_loss as nll_loss
from jaxent.torch_compat._functional import softmax as softmax
from jaxent.torch_compat._linear import LinearCrossEntropyOptions as LinearCrossEntropyOptions
from jaxent.torch_compat._linear import linear_cross_entropy as linear_cross_entropy

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "LinearCrossEntropyOptions",
    "LogSoftmax",
    "NLLLoss",
    "Softmax",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "kl_div",
    "linear_cross_entropy",
    "log_softmax",
    "nll_loss",
    "softmax",
]


def __getattr__(name: str) -> Any:
    message = f"module {__name__!r} has no attribute {name!r}"
    if not name.startswith("_"):
        message += (
            ": it has PyTorch's classification losses only (layers are those of flax or equinox, optimizers optax's)"
        )
    raise AttributeError(message, name=name)


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


class _Module:
    """Equality and hash of the frozen classes: options by value, weights, which have no hash, by identity.

    `jax.jit(module)` needs a hash.
    """

    def _key(self: Any) -> tuple[Any, ...]:
        values = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return (type(self), *(value if f.metadata.get("static") else id(value) for f, value in values))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Module) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


class _Loss(_Module):
    """A loss with the deprecated flags of the constructor, which override `reduction`."""

    def __post_init__(self, size_average: bool | None, reduce: bool | None) -> None:
        if size_average is not None or reduce is not None:
            reduction = _conventions.legacy_reduction(size_average, reduce, stacklevel=3)
            object.__setattr__(self, "reduction", reduction)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CrossEntropyLoss(_Loss):
    """`cross_entropy` with its options, as `torch.nn.CrossEntropyLoss`: a pytree whose leaf is `weight`.

    >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
    >>> criterion(jnp.array([[0.0, 0.0]]), jnp.array([1]))
    Array(0.6931472, dtype=float32)
    """

    weight: ArrayLike | None = None
    size_average: InitVar[bool | None] = None
    ignore_index: int | None = _static(-100)
    reduce: InitVar[bool | None] = None
    reduction: str = _static("mean")
    label_smoothing: float = _static(0.0)

    def __call__(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NLLLoss(_Loss):
    """`nll_loss` with its options, as `torch.nn.NLLLoss`: a pytree whose leaf is `weight`.

    >>> NLLLoss(reduction="sum")(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([0]))
    Array(1.3862944, dtype=float32)
    """

    weight: ArrayLike | None = None
    size_average: InitVar[bool | None] = None
    ignore_index: int | None = _static(-100)
    reduce: InitVar[bool | None] = None
    reduction: str = _static("mean")

    def __call__(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KLDivLoss(_Loss):
    """`kl_div` with its options, as `torch.nn.KLDivLoss`: a pytree without leaves.

    >>> KLDivLoss(reduction="batchmean")(jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([[1.0, 0.0]]))
    Array(1.3862944, dtype=float32)
    """

    size_average: InitVar[bool | None] = None
    reduce: InitVar[bool | None] = None
    reduction: str = _static("mean")
    log_target: bool = _static(False)

    def __call__(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BCELoss(_Loss):
    """`binary_cross_entropy` with its options, as `torch.nn.BCELoss`: a pytree whose leaf is `weight`.

    >>> BCELoss()(jnp.array([0.25]), jnp.array([1.0]))
    Array(1.3862944, dtype=float32)
    """

    weight: ArrayLike | None = None
    size_average: InitVar[bool | None] = None
    reduce: InitVar[bool | None] = None
    reduction: str = _static("mean")

    def __call__(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BCEWithLogitsLoss(_Loss):
    """`binary_cross_entropy_with_logits` with its options, as `torch.nn.BCEWithLogitsLoss`: a pytree whose leaves are
    `weight` and `pos_weight`.

    >>> BCEWithLogitsLoss(pos_weight=jnp.array([2.0]))(jnp.array([0.0]), jnp.array([1.0]))
    Array(1.3862944, dtype=float32)
    """

    weight: ArrayLike | None = None
    size_average: InitVar[bool | None] = None
    reduce: InitVar[bool | None] = None
    reduction: str = _static("mean")
    pos_weight: ArrayLike | None = None

    def __call__(self, input: ArrayLike, target: ArrayLike) -> jax.Array:
        return binary_cross_entropy_with_logits(
            input, target, weight=self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Softmax(_Module):
    """`softmax` along `dim`, as `torch.nn.Softmax`: a pytree without leaves.

    >>> Softmax(dim=1)(jnp.array([[0.0, 0.0]]))
    Array([[0.5, 0.5]], dtype=float32)
    """

    dim: int | None = _static(None)

    def __call__(self, input: ArrayLike) -> jax.Array:
        return softmax(input, self.dim, _stacklevel=4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LogSoftmax(_Module):
    """`log_softmax` along `dim`, as `torch.nn.LogSoftmax`: a pytree without leaves.

    >>> LogSoftmax(dim=1)(jnp.array([[0.0, 0.0]]))
    Array([[-0.6931472, -0.6931472]], dtype=float32)
    """

    dim: int | None = _static(None)

    def __call__(self, input: ArrayLike) -> jax.Array:
        return log_softmax(input, self.dim, _stacklevel=4)
