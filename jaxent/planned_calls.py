"""The calls that `plan` knows: what each function does to the logits, and its program from shapes alone."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.reduction import Reduction, check_matrix_reduction, check_reduction
from jaxent._engine.footprint import Sizes, temporaries
from jaxent._engine.roofline import LOSS, Work
from jaxent._errors import ArgumentTypeError, ArgumentValueError
from jaxent.gradient_norms import linear_gradient_norms
from jaxent.linear import linear_softmax_cross_entropy
from jaxent.linear_curvature import linear_fisher_vector_product, linear_ggn_vector_product
from jaxent.linear_diagonal import linear_ggn_diagonal
from jaxent.linear_divergence import linear_kl_divergence, linear_kl_divergence_from_top
from jaxent.linear_functions import linear_loss, linear_rows
from jaxent.token_statistics import linear_token_statistics


class Function(NamedTuple):
    """A function and the matrix products of it and its gradient, each of N x D x V multiply-adds."""

    call: Callable[..., Any]
    work: Work
    by_rows: Work
    """Of `reduction="none"`, whose logits are computed twice."""
    wanted: tuple[str, ...] = ("hidden", "kernel")
    """What the gradient is with respect to, if one is taken."""


_ROWS = Work(2, 2, sums=2)
_STATISTICS = Work(1, 0, sums=2)
_NORMS = Work(2, 0, sums=4)
_CURVATURE = Work(3, 2, sums=4, heads=2)
_DIAGONAL = Work(1, 3, sums=4)
_DIVERGENCE = (
    Work(2, 2, sums=8, spared_on_tpu=2, heads=2, drops_rows=False),
    Work(4, 2, sums=16, spared_on_tpu=4, heads=2, drops_rows=False),
)
FUNCTIONS = {
    f.call.__name__: f
    for f in (
        Function(linear_softmax_cross_entropy, LOSS, _ROWS),
        Function(linear_token_statistics, _STATISTICS, _STATISTICS, ()),
        Function(linear_kl_divergence, *_DIVERGENCE, ("hidden_q", "kernel_q")),
        Function(linear_kl_divergence_from_top, LOSS, _ROWS),
        Function(linear_loss, LOSS, _ROWS),
        Function(linear_rows, _ROWS, _ROWS),
        Function(linear_gradient_norms, _NORMS, _NORMS, ()),
        Function(linear_ggn_vector_product, _CURVATURE, _CURVATURE, ()),
        Function(linear_fisher_vector_product, _CURVATURE, _CURVATURE, ()),
        Function(linear_ggn_diagonal, _DIAGONAL, _DIAGONAL, ()),
    )
}
# Sizes that only an argument's shape determines, with their defaults: options of `plan` alone.
_SIZES = {"linear_kl_divergence_from_top": ("top_k", 8), "linear_gradient_norms": ("tokens", None)}
# Options that are arrays, by their sizes: rows or classes.
_OF_ROWS = {"weights": np.float32, "where": np.bool_}
_OF_CLASSES = "class_weights", "bias", "bias_p", "bias_q"
# Options that are numbers, and the value taken for one that is only said to be on.
_NUMBERS = {
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "soft_cap": 30.0,
    "soft_cap_p": 30.0,
    "soft_cap_q": 30.0,
    "temperature": 2.0,
    "mixture": 0.5,
    "denominator": 2.0,
}
_NOT_PLANNED = {"chunk_rows", "dtype", "reduction"}  # arguments of `plan` itself
_WITHOUT_COST = {"params", "has_aux"}


@dataclasses.dataclass(frozen=True)
class Call:
    """The call that is planned."""

    function: str
    sizes: Sizes
    reduction: Reduction
    chunk_rows: int | None
    options: tuple[tuple[str, Any], ...]

    @property
    def work(self) -> Work:
        found = FUNCTIONS[self.function]
        return found.by_rows if self.reduction == "none" else found.work

    @property
    def tokens(self) -> int:
        """Rows that stay together."""
        return dict(self.options).get("tokens", 1)

    @property
    def splits_classes(self) -> bool:
        """Whether the classes are split over devices; sizes are those of one."""
        return "vocab_axis" in dict(self.options)


def checked_call(name: str, sizes: Sizes, reduction: Any, chunk_rows: int | None, options: dict[str, Any]) -> Call:
    if name not in FUNCTIONS:
        raise ArgumentValueError(f"`function` must be one of {', '.join(map(repr, FUNCTIONS))}, got {name!r}")
    check_reduction(reduction, None)
    if FUNCTIONS[name].work in (_CURVATURE, _DIAGONAL):
        check_matrix_reduction(reduction)
    call = Call(name, sizes, reduction, chunk_rows, _checked_options(name, options))
    if dict(call.options).get("per") == "sequence" and (call.tokens == 1 or sizes.rows % call.tokens):
        raise ArgumentValueError(
            f"`tokens` must tell how many of the {sizes.rows} rows make a sequence, with per='sequence'"
        )
    return call


def _checked_options(called: str, options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Those that are on, in order; arrays as True."""
    signature = inspect.signature(FUNCTIONS[called].call).parameters
    known = {p.name: p.default for p in signature.values() if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_PLANNED}
    size, default = _SIZES.get(called, ("", None))
    known |= {size: default} if size else {}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ArgumentTypeError(f"`{unknown[0]}` is not an option of {called}, which takes {', '.join(sorted(known))}")
    found = {}
    for name, value in options.items():
        if name in _WITHOUT_COST or (value is None and known[name] is None):
            continue
        if name in _OF_ROWS or name in _OF_CLASSES or name == "targets":
            value = value is not False
        elif name == "vocab_axis":
            value = True
        elif name in _NUMBERS:
            value = _number(name, value, known[name])
        elif name == size:
            value = arrays.as_int(name, value)
        if value is not False and value != known[name]:
            found[name] = value
    return tuple(sorted(found.items()))


def _number(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, bool):
        return _NUMBERS[name] if value else default
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"`{name}` must be a number, or whether it is on, got {value!r}") from error


# ----------------------------------------------------------------------------------------------------------------------
# What XLA says


@functools.lru_cache(maxsize=256)
def allocated(call: Call) -> int | None:
    """The temporaries of the call as XLA compiles it for this process's device; nothing runs."""
    program, arguments = _program(call)
    memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
    return None if memory is None else temporaries(memory, on_tpu=jax.default_backend() == "tpu")


def _program(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The call as a function of arrays, and their shapes."""
    found, sizes = FUNCTIONS[call.function], call.sizes
    takes = inspect.signature(found.call).parameters
    options: dict[str, Any] = {"chunk_rows": call.chunk_rows, **dict(call.options)}
    options.pop("vocab_axis", None)  # XLA is asked for one device
    size, default = _SIZES.get(call.function, ("", None))
    top_k = options.pop(size, default) if size else None
    batch = (sizes.rows,) if call.tokens == 1 else (sizes.rows // call.tokens, call.tokens)
    hidden = jax.ShapeDtypeStruct((*batch, sizes.features), sizes.dtype)
    kernel = jax.ShapeDtypeStruct((sizes.features, sizes.classes), sizes.kernel_dtype)
    labels = jax.ShapeDtypeStruct(batch, np.int32)
    shapes: dict[str, Any] = dict.fromkeys(("hidden", "hidden_p", "hidden_q"), hidden)
    shapes |= dict.fromkeys(("kernel", "kernel_p", "kernel_q"), kernel)
    shapes |= {"labels": labels, "targets": labels, "row_args": labels, "v": (hidden, kernel)}
    if "classes" in takes:
        shapes["classes"] = jax.ShapeDtypeStruct((*batch, top_k), np.int32)
        shapes["log_probs"] = jax.ShapeDtypeStruct((*batch, top_k), np.float32)
    shapes |= {name: jax.ShapeDtypeStruct(batch, dtype) for name, dtype in _OF_ROWS.items()}
    shapes |= {name: jax.ShapeDtypeStruct((sizes.classes,), sizes.kernel_dtype) for name in _OF_CLASSES}
    if "reduction" in takes:
        options["reduction"] = call.reduction
    if "dtype" in takes and sizes.kernel_dtype != sizes.dtype:
        options["dtype"] = sizes.dtype
    of_rows = [p for p in ("row_loss", "row_fn") if p in takes]
    data = [p.name for p in takes.values() if p.kind is not p.KEYWORD_ONLY and p.name not in of_rows]
    if "class_weights" in options and "targets" in takes:
        options["targets"] = True  # a loss that looks at them, where they may be left out
    on = [name for name in (*_OF_ROWS, *_OF_CLASSES, "targets") if options.pop(name, False) and name not in data]

    def run(moving: dict[str, Any], fixed: dict[str, Any]) -> Any:
        given = moving | fixed
        start = [_label_loss] if of_rows else []
        result = found.call(*start, *(given[name] for name in data), **options, **{name: given[name] for name in on})
        if not found.wanted:
            return result
        loss, aux = result if options.get("with_statistics") else (result, None)
        by_row = call.reduction == "none" or call.function == "linear_rows"
        return (jnp.sum(loss) if by_row else jnp.mean(jax.tree.leaves(loss)[0])), aux

    moving = {name: shapes[name] for name in found.wanted}
    fixed = {name: shapes[name] for name in (*data, *on) if name not in moving}
    return (jax.value_and_grad(run, has_aux=True) if found.wanted else run), (moving, fixed)


def _label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What stands for a row function of the user's own."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
