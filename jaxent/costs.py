"""What a linear loss will cost: known before anything runs, from the shapes and the device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.reduction import Reduction
from jaxent._engine.chunking import Chunking, chunking_of, default_chunk_rows
from jaxent._engine.devices import DEVICES, Target, device_named, target_of, with_rates
from jaxent._engine.footprint import Sizes, held_bytes
from jaxent._engine.roofline import Milliseconds, roofline
from jaxent._errors import ArgumentTypeError, ArgumentValueError, public
from jaxent._typing import DTypeLike
from jaxent.planned_calls import Call, allocated, checked_call

MOST_INDEX = 2**31 - 1  # rows beyond it cannot be counted by int32, and nothing is compiled for them


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a linear loss and its gradient cost on one device; for other functions, the value alone."""

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
        """What XLA allocates in addition to arguments and results.

        For this process's own device XLA is asked, which takes a second or more the first time; nothing runs. For
        another one it is the sum of what has to be held.
        """
        found = allocated(self.call) if self.is_own and self.call.sizes.rows <= MOST_INDEX else None
        return self.estimated_temp_bytes if found is None else found

    @property
    def estimated_temp_bytes(self) -> int:
        """The same without asking XLA: chunk of logits, its gradient, dW's sum, gradient of the rows, cast kernel."""
        device, split = DEVICES.get(self.device), self.call.splits_classes
        return held_bytes(self.call.sizes, self.chunk_rows, self.call.work, device, split_classes=split)

    def __str__(self) -> str:
        mib = 2**20
        chunks = "1 chunk" if self.num_chunks == 1 else f"{self.num_chunks} chunks"
        time = "" if self.milliseconds is None else f", at least {self.milliseconds:.3g} ms on {self.device}"
        return (
            f"{chunks} of {self.chunk_rows} rows, {self.matrix_products} matrix products, "
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

    $$\lceil N / R \rceil \text{ chunks}, \qquad 3\,N D V \text{ multiply-adds, for per-row results } 4\,N D V$$

    Gradients are with respect to `hidden` and `kernel`, for `linear_kl_divergence` those of Q's head. Statistics,
    gradient norms and curvature are planned without a gradient, curvature products for steps of both arguments. Where
    memory still grows: `vmap` over examples with a shared kernel holds a kernel gradient per example (flatten the
    batch), and the gradient of a `scan` of losses one per step (take the gradient inside the step, or wrap the loss in
    `jax.checkpoint`).

    **Arguments:**

    - `num_rows`, `features` and `num_classes`: N, D and V of `hidden (N, D)` and `kernel (D, V)` on one device.
    - `dtype`: of the hidden states and the operands of the products. `kernel_dtype`: of the kernel, if it is another.
    - `device`: a name such as `"h100"`, `"v5p"` or what JAX calls a device; None is this process's own.
    - `function`: the name of any function of hidden states, such as `"linear_token_statistics"`. For `linear_loss` and
      `linear_rows`, your own row function is taken to cost what the loss of a label costs.
    - `reduction`, `chunk_rows` (R) and `options` (`label_smoothing=0.1`, `soft_cap=30.0`, `with_statistics=True`,
      `weights=True`, ...): of the call. Whether an option is on is what counts. `top_k` is also how many classes were
      stored for `linear_kl_divergence_from_top`, and `tokens` how many rows make a sequence with `per="sequence"`.
      With a `vocab_axis` the classes are split over devices, and the sizes are those of one.
    - `flops_per_second` and `bytes_per_second`: measured rates of matrix products and of memory, for a CPU or any other
      device, in place of those that its maker states. `python -m benchmarks` measures both.

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
    operand = _floating("dtype", dtype)
    kernel = operand if kernel_dtype is None else _floating("kernel_dtype", kernel_dtype)
    sizes = Sizes(num_rows, features, num_classes, operand, kernel)
    call = checked_call(function, sizes, reduction, chunk_rows, options)
    target, name, note = _target(device)
    rates = _rates(flops_per_second, bytes_per_second)
    rated = target.device if rates is None else with_rates(target.device, operand, *rates)
    work = call.work
    chunking = _chunking(target, call)
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


def _chunking(target: Target, call: Call) -> Chunking:
    sizes, together = call.sizes, call.tokens
    default = default_chunk_rows(target, sizes.features, call.work.heads * sizes.classes, sizes.dtype)
    if together == 1:
        return chunking_of(sizes.rows, call.chunk_rows, default)
    rows = chunking_of(sizes.rows, call.chunk_rows, default).chunk_rows
    found = chunking_of(sizes.rows // together, max(1, rows // together), default)
    return Chunking(sizes.rows, found.chunk_rows * together)
