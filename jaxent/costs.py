"""What a linear loss will cost: known before anything runs, from the shapes and the device."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.reduction import Reduction, check_reduction
from jaxent._engine.chunking import Chunking, chunking_of, default_chunk_rows
from jaxent._engine.devices import DEVICES, Target, device_named, target_of, with_rates
from jaxent._engine.footprint import Sizes, held_bytes
from jaxent._engine.roofline import LOSS, Milliseconds, Work, roofline
from jaxent._errors import ArgumentTypeError, ArgumentValueError, public
from jaxent._typing import DTypeLike
from jaxent.linear import linear_softmax_cross_entropy
from jaxent.linear_divergence import linear_kl_divergence
from jaxent.linear_functions import linear_loss, linear_rows
from jaxent.token_statistics import linear_token_statistics

MOST_INDEX = 2**31 - 1  # rows beyond it cannot be counted by int32, and nothing is compiled for them


class _Function(NamedTuple):
    """A function and the matrix products of it and its gradient, each of N x D x V multiply-adds."""

    call: Callable[..., Any]
    work: Work
    by_rows: Work
    """Of `reduction="none"`, whose logits are computed twice."""


_ROWS = Work(2, 2, sums=2)
_FUNCTIONS = {
    "linear_softmax_cross_entropy": _Function(linear_softmax_cross_entropy, LOSS, _ROWS),
    "linear_token_statistics": _Function(linear_token_statistics, Work(1, 0, sums=2), Work(1, 0, sums=2)),
    "linear_kl_divergence": _Function(linear_kl_divergence, Work(2, 2, sums=8, heads=2), Work(4, 2, sums=16, heads=2)),
    "linear_loss": _Function(linear_loss, LOSS, _ROWS),
    "linear_rows": _Function(linear_rows, _ROWS, _ROWS),
}
# Options that are arrays, by their sizes: rows or classes.
_OF_ROWS = {"weights": np.float32, "where": np.bool_}
_OF_CLASSES = "class_weights", "bias", "bias_p", "bias_q"
# Numbers, and what stands for one that is only said to be on.
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
_WITHOUT_COST = {"vocab_axis", "params", "has_aux"}


@dataclasses.dataclass(frozen=True)
class Call:
    """The call that is planned."""

    function: str
    sizes: Sizes
    reduction: Reduction
    chunk_rows: int | None
    options: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one value and gradient of a linear loss costs on one device; of statistics, the value."""

    device: str
    """The name in the library's table; else what JAX or the caller calls it."""
    chunk_rows: int
    """Rows at a time."""
    num_chunks: int
    """How many times."""
    matrix_products: int
    """Matrix products of N x D x V multiply-adds: 3, or 4 for per-row losses, whose logits are computed twice."""
    multiply_adds: int
    """Of all products."""
    chunk_bytes: int
    """The logits of one chunk, and their gradient in the operands' dtype where that is another one."""
    dense_logits_bytes: int
    """What dense code holds instead: the logits of all rows."""
    milliseconds: Milliseconds | None
    """The least time at the rates that were given or that the device's maker states, with its terms: `products`,
    `passes` over the logits, `kernel_gradient` (dW) and `collectives`. None for a device whose rates are not known.
    """
    bytes_moved: int
    """To and from the device's memory."""
    note: str | None
    """What is not known about the device."""
    call: Call = dataclasses.field(repr=False)
    """What is planned."""
    is_own: bool = dataclasses.field(repr=False)
    """Whether the device is this process's."""

    @functools.cached_property
    def temp_bytes(self) -> int:
        """What XLA allocates beside arguments and results.

        For this process's own device XLA is asked, which takes it a second or more at the first look; nothing runs. For
        another one it is the sum of what has to be held.
        """
        allocated = _allocated(self.call) if self.is_own and self.call.sizes.rows <= MOST_INDEX else None
        return self.estimated_temp_bytes if allocated is None else allocated

    @property
    def estimated_temp_bytes(self) -> int:
        """The same without asking XLA: chunk of logits, its gradient, dW's sum, gradient of the rows, cast kernel."""
        return held_bytes(self.call.sizes, self.chunk_rows, _work(self.call), DEVICES.get(self.device))

    def __str__(self) -> str:
        mib = 2**20
        time = "" if self.milliseconds is None else f", at least {self.milliseconds:.3g} ms on {self.device}"
        return (
            f"{self.num_chunks} chunks of {self.chunk_rows} rows, {self.matrix_products} matrix products, "
            f"about {self.temp_bytes / mib:.0f} MiB of temporaries where the logits take "
            f"{self.dense_logits_bytes / mib:.0f} MiB{time}"
        )


@public
def plan(
    num_rows: int,
    features: int,
    num_classes: int,
    *,
    dtype: DTypeLike = jnp.float32,
    kernel_dtype: DTypeLike | None = None,
    device: str | None = None,
    function: str = "linear_softmax_cross_entropy",
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    flops_per_second: float | None = None,
    bytes_per_second: float | None = None,
    **options: Any,
) -> Plan:
    r"""What a linear loss and its gradient will take, in bytes, multiply-adds and milliseconds, before they run.

    $$\lceil N / R \rceil \text{ chunks}, \qquad 3\,N D V \text{ multiply-adds, or } 4\,N D V \text{ by rows}$$

    Gradients are those with respect to `hidden` and `kernel`; of `linear_kl_divergence` those of Q's head, and
    `linear_token_statistics` is taken without one. What memory cannot be had: `vmap` over examples with a shared kernel
    holds a kernel gradient per example (flatten the batch), and the gradient of a `scan` of losses one per step (take
    the gradient in the step, or wrap the loss in `jax.checkpoint`).

    **Arguments:**

    - `num_rows`, `features` and `num_classes`: N, D and V of `hidden (N, D)` and `kernel (D, V)` on one device.
    - `dtype`: of the hidden states and the operands of the products. `kernel_dtype`: of the kernel, if it is another.
    - `device`: a name such as `"h100"`, `"v5p"` or what JAX calls a device; None is this process's own.
    - `function`: `"linear_softmax_cross_entropy"`, `"linear_token_statistics"`, `"linear_kl_divergence"`,
      `"linear_loss"` or `"linear_rows"` (with the loss of a label for your own row function).
    - `reduction`, `chunk_rows` (R) and `options` (`label_smoothing=0.1`, `soft_cap=30.0`, `with_statistics=True`,
      `weights=True`, ...): of the call. Whether an option is on is what counts.
    - `flops_per_second` and `bytes_per_second`: what was measured of matrix products and of memory, for a CPU or any
      device, in place of what its maker states. `python -m benchmarks` measures both.

    **Returns:** a `Plan`. Times are those of a roofline: the larger of work and traffic of each kernel.

    **Raises:** `TypeError` for a wrong type and for an option that the function does not take, `ValueError` for a wrong
    value, for sizes that are not positive (`num_rows` may be 0), and for one rate without the other.

    >>> found = plan(32768, 4096, 128256, dtype="bfloat16", device="v5p")
    >>> found.chunk_rows, found.temp_bytes // 2**20, found.dense_logits_bytes // 2**20, round(found.milliseconds)
    (2048, 2260, 16032, 233)
    """
    num_rows, features, num_classes = (
        _size(argument, size, least)
        for argument, size, least in (
            ("num_rows", num_rows, 0),
            ("features", features, 1),
            ("num_classes", num_classes, 1),
        )
    )
    check_reduction(reduction, None)
    operand = _floating("dtype", dtype)
    kernel = operand if kernel_dtype is None else _floating("kernel_dtype", kernel_dtype)
    sizes = Sizes(num_rows, features, num_classes, operand, kernel)
    if function not in _FUNCTIONS:
        raise ArgumentValueError(f"`function` must be one of {', '.join(map(repr, _FUNCTIONS))}, got {function!r}")
    call = Call(function, sizes, reduction, chunk_rows, _checked_options(function, options))
    target, name, note = _target(device)
    rates = _rates(flops_per_second, bytes_per_second)
    rated = target.device if rates is None else with_rates(target.device, operand, *rates)
    work = _work(call)
    chunking = _chunking(target, call, work)
    narrow, wide = operand.itemsize, max(4, operand.itemsize)
    passed = roofline(rated, num_rows, features, num_classes, chunking.chunk_rows, operand, work=work)
    return Plan(
        device=name,
        chunk_rows=chunking.chunk_rows,
        num_chunks=chunking.chunks,
        matrix_products=work.products,
        multiply_adds=work.products * num_rows * features * num_classes,
        chunk_bytes=chunking.chunk_rows * num_classes * (wide * work.heads + (narrow if narrow < wide else 0)),
        dense_logits_bytes=num_rows * num_classes * wide,
        milliseconds=passed.milliseconds,
        bytes_moved=passed.bytes_moved,
        note=None if rates and target.on_cpu else note,
        call=call,
        is_own=target == target_of() and (device is None or target.on_cpu or target.device is not None),
    )


def _size(argument: str, size: int, least: int) -> int:
    size = arrays.as_int(argument, size)
    if size < least:
        raise ArgumentValueError(f"`{argument}` must be at least {least}, got {size}")
    return size


def _floating(argument: str, dtype: DTypeLike) -> np.dtype:
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError as error:
        raise arrays.dtype_error(argument, "be a dtype, such as jnp.bfloat16 or 'bfloat16'", dtype) from error
    if not is_floating:
        raise arrays.dtype_error(argument, "be floating", np.dtype(dtype).name)
    return np.dtype(dtype)


def _checked_options(called: str, options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Those that are on, in order; arrays as True."""
    signature = inspect.signature(_FUNCTIONS[called].call).parameters
    known = {p.name: p.default for p in signature.values() if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_PLANNED}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ArgumentTypeError(f"`{unknown[0]}` is no option of {called}, which takes {', '.join(sorted(known))}")
    found = {}
    for name, value in options.items():
        if name in _WITHOUT_COST or (value is None and known[name] is None):
            continue
        if name in _OF_ROWS or name in _OF_CLASSES:
            value = value is not False
        elif name in _NUMBERS:
            value = _number(name, value, known[name])
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


def _target(device: Any) -> tuple[Target, str, str | None]:
    """What the plan is for, its name, and what is not known of it."""
    if device is None:
        own = target_of()
        kind = "cpu" if own.on_cpu else jax.devices()[0].device_kind
    elif not isinstance(device, str):
        raise ArgumentTypeError(f"`device` must be a name or None, got {device!r}")
    else:
        own, kind = Target(device.lower() == "cpu", device_named(device)), device
    if own.device is not None:
        return own, own.device.name, None
    if own.on_cpu:
        return own, "cpu", "a CPU's rates are not known: pass those that `python -m benchmarks` measures"
    note = f"no figures for {kind!r}, so no time, and chunks as on any accelerator; known are {', '.join(DEVICES)}"
    return own, kind, note


def _rates(flops_per_second: Any, bytes_per_second: Any) -> tuple[float, float] | None:
    given = {"flops_per_second": flops_per_second, "bytes_per_second": bytes_per_second}
    absent = [name for name, rate in given.items() if rate is None]
    if len(absent) == len(given):
        return None
    if absent:
        raise ArgumentValueError(f"`{absent[0]}` is needed, too: a time follows from both rates")
    for name, rate in given.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number)):
            raise ArgumentTypeError(f"`{name}` must be a number or None, got {rate!r}")
        if not 0 < rate < float("inf"):
            raise ArgumentValueError(f"`{name}` must be positive and finite, got {rate}")
    return float(flops_per_second), float(bytes_per_second)


def _work(call: Call) -> Work:
    found = _FUNCTIONS[call.function]
    return found.by_rows if call.reduction == "none" else found.work


def _chunking(target: Target, call: Call, work: Work) -> Chunking:
    sizes = call.sizes
    default = default_chunk_rows(target, sizes.features, work.heads * sizes.classes, sizes.dtype)
    return chunking_of(sizes.rows, call.chunk_rows, default)


# ----------------------------------------------------------------------------------------------------------------------
# What XLA says


@functools.lru_cache(maxsize=256)
def _allocated(call: Call) -> int | None:
    function, arguments = _program(call)
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def _program(call: Call) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The call as a function of arrays, and their shapes."""
    like, sizes = jax.ShapeDtypeStruct, call.sizes
    options: dict[str, Any] = {"chunk_rows": call.chunk_rows, **dict(call.options)}
    function = _FUNCTIONS[call.function].call
    takes = inspect.signature(function).parameters
    if "reduction" in takes:
        options["reduction"] = call.reduction
    if "dtype" in takes and sizes.kernel_dtype != sizes.dtype:
        options["dtype"] = sizes.dtype
    given: dict[str, Any] = {n: like((sizes.rows,), d) for n, d in _OF_ROWS.items() if options.pop(n, False)}
    given |= {n: like((sizes.classes,), sizes.kernel_dtype) for n in _OF_CLASSES if options.pop(n, False)}
    head = (
        like((sizes.rows, sizes.features), sizes.dtype),
        like((sizes.features, sizes.classes), sizes.kernel_dtype),
    )
    labels = like((sizes.rows,), np.int32)

    def reduced(result: Any) -> tuple[jax.Array, Any]:
        loss, aux = result if options.get("with_statistics") else (result, None)
        return (jnp.sum(loss) if call.reduction == "none" else jnp.mean(jax.tree.leaves(loss)[0])), aux

    def of_labels(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, given: dict[str, Any]) -> Any:
        return function(hidden, kernel, labels, **options, **given)

    def of_row_function(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, given: dict[str, Any]) -> Any:
        return function(_label_loss, hidden, kernel, labels, **options, **given)

    if call.function == "linear_token_statistics":
        return of_labels, (*head, labels, given)
    if call.function == "linear_kl_divergence":

        def of_heads(hidden_p: Any, kernel_p: Any, hidden_q: Any, kernel_q: Any, given: dict[str, Any]) -> Any:
            return reduced(function(hidden_p, kernel_p, hidden_q, kernel_q, **options, **given))

        return jax.value_and_grad(of_heads, (2, 3), has_aux=True), (*head, *head, given)
    own = of_row_function if call.function in ("linear_loss", "linear_rows") else of_labels
    if call.function == "linear_rows":
        return jax.value_and_grad(lambda *a: (jnp.sum(own(*a)), None), (0, 1), has_aux=True), (*head, labels, given)
    return jax.value_and_grad(lambda *a: reduced(own(*a)), (0, 1), has_aux=True), (*head, labels, given)


def _label_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What stands for a row function of the user's own."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
