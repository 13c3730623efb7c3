"""The linear cross-entropy of `torch_compat`, and its options."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxent import _arrays, _torch_rules, linear
from jaxent._sharding import ClassAxis


@dataclasses.dataclass(frozen=True)
class LinearCrossEntropyOptions:
    """How `linear_cross_entropy` is cut into chunks of rows; fields and defaults of `torch.nn`'s class.

    `batch_chunk_size` is the number of rows at a time. `chunking_method`: `"auto"` takes what `jaxent.plan` says,
    `"aspect_ratio"` and `"aspect_ratio:N"` are PyTorch's formulas, and None is `batch_chunk_size`, or one chunk.
    `allow_retain_graph`, `acc_policy` and `acc_dtype` have nothing to choose here: every derivative can be taken, and
    sums are float32 or wider.

    **Raises:** `ValueError` for a wrong chunk size, method or policy.

    >>> LinearCrossEntropyOptions(batch_chunk_size=1024).chunk_rows(8192, 4096, 128256)
    1024
    """

    allow_retain_graph: bool = False
    batch_chunk_size: int | None = None
    chunking_method: str | None = "auto"
    acc_policy: str = "auto"
    acc_dtype: Any = None

    def __post_init__(self) -> None:
        size, method = self.batch_chunk_size, self.chunking_method
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{_OPTIONS}: `batch_chunk_size` must be a positive int or None, got {size!r}")
        if method is not None and method != "auto" and _aspect_factor(method) is None:
            expected = "'auto', 'aspect_ratio', 'aspect_ratio:N' or None"
            raise ValueError(f"{_OPTIONS}: `chunking_method` must be {expected}, got {method!r}")
        if self.acc_policy not in ("auto", "accurate", "balanced", "compact"):
            expected = "'auto', 'accurate', 'balanced' or 'compact'"
            raise ValueError(f"{_OPTIONS}: `acc_policy` must be {expected}, got {self.acc_policy!r}")

    def chunk_rows(self, rows: int, in_features: int, num_classes: int) -> int | None:
        """The `chunk_rows` of `jaxent.linear_softmax_cross_entropy`."""
        size = None if self.batch_chunk_size is None else max(1, min(self.batch_chunk_size, rows))
        if self.chunking_method is None:
            return size or max(1, rows)
        factor = _aspect_factor(self.chunking_method)
        if factor is None:
            return size
        share = -(-rows // max(1, -(-num_classes // max(1, in_features))))
        by_method = max(1, min((1 << max(0, share - 1).bit_length()) // factor, rows))
        if size is not None and size != by_method:
            expected = f"agree: {self.chunking_method!r} gives {by_method} rows"
            raise ValueError(f"{_OPTIONS}: `batch_chunk_size` and `chunking_method` must {expected}, not {size}")
        return by_method


_OPTIONS = "jaxent.torch_compat.LinearCrossEntropyOptions"


def _aspect_factor(method: str) -> int | None:
    """`N` of `"aspect_ratio:N"`, 1 of `"aspect_ratio"`, None of anything else."""
    name, colon, factor = method.partition(":")
    factor = factor if colon else "1"
    return int(factor) if name == "aspect_ratio" and factor.isdecimal() and int(factor) > 0 else None


def linear_cross_entropy(
    input: ArrayLike,
    linear_weight: ArrayLike,
    target: ArrayLike,
    *,
    linear_bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: ArrayLike = 0.0,
    options: Any = None,
) -> jax.Array:
    r"""`cross_entropy` of the logits of a linear layer, without the logits, as `torch.nn.functional`'s, in nats.

    $$z_n = W h_n + b$$

    The engine is that of `jaxent.linear_softmax_cross_entropy`: chunks of rows, three matrix products for value and
    gradient, every option, and derivatives of any order, with `options` and without.

    **Arguments:**

    - `input`: `(D,)` or `(N, D)`. `linear_weight`: `(C, D)`, or, for rows, `(C, d_1, ..., d_K, D)`: a linear layer for
      each of the `d_1 x ... x d_K` places, which run one after the other. `linear_bias`: `linear_weight.shape[:-1]`.
    - `target`, `weight`, `reduction`, `label_smoothing`: as in `cross_entropy` for logits `(C,)`, `(N, C)` or
      `(N, C, d_1, ..., d_K)`. `ignore_index`: None is -100.
    - `options`: a `LinearCrossEntropyOptions`; None leaves the chunks to `jaxent.plan`.

    **Returns:** as `cross_entropy`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, linear_weight = jnp.ones((2, 3)), jnp.zeros((5, 3))
    >>> linear_cross_entropy(hidden, linear_weight, jnp.array([0, 4]))
    Array(1.609438, dtype=float32)
    """
    name = "torch_compat.linear_cross_entropy"
    h = _arrays.floating(name, "input", input)
    w = _arrays.floating(name, "linear_weight", linear_weight)
    if h.ndim not in (1, 2):
        raise _arrays.shape_error(name, "input", "have shape (D,) or (N, D)", h)
    if w.ndim < 2 or w.shape[-1] != h.shape[-1] or (w.ndim > 2 and h.ndim == 1):
        expected = f"have shape (C, {h.shape[-1]}), or, for an input of rows, (C, d_1, ..., d_K, {h.shape[-1]})"
        raise _arrays.shape_error(name, "linear_weight", expected, w)
    if linear_bias is not None:
        linear_bias = _arrays.floating(name, "linear_bias", linear_bias)
        _arrays.check_shape(name, "linear_bias", linear_bias, w.shape[:-1], "one for each row of `linear_weight`")
    shape = (*h.shape[:-1], *w.shape[:-1])
    target = _torch_rules.check_target(name, target, shape, 1 - w.ndim)
    if jnp.issubdtype(target.dtype, jnp.floating) and ignore_index is not None:
        raise ValueError(f"jaxent.{name}: `ignore_index` goes with class indices, got {ignore_index} and probabilities")
    rows = math.prod(h.shape[:-1])
    chunking = LinearCrossEntropyOptions() if options is None else options
    if not isinstance(chunking, LinearCrossEntropyOptions):
        chunking = LinearCrossEntropyOptions(
            batch_chunk_size=chunking.batch_chunk_size, chunking_method=chunking.chunking_method
        )
    return _linear_cross_entropy(
        h,
        w,
        target,
        linear_bias,
        _torch_rules.check_class_weight(name, weight, w.shape[0]),
        _arrays.scalar(name, "label_smoothing", label_smoothing, low=0.0, high=1.0, neutral=0.0),
        reduction=_torch_rules.check_reduction(name, reduction),
        ignore_index=-100 if ignore_index is None else ignore_index,
        chunk_rows=chunking.chunk_rows(rows, w.shape[-1], w.shape[0]),
    )


@functools.partial(jax.jit, static_argnames=("reduction", "ignore_index", "chunk_rows"), inline=True)
def _linear_cross_entropy(
    h: jax.Array,
    w: jax.Array,
    target: jax.Array,
    bias: jax.Array | None,
    weight: jax.Array | None,
    smoothing: jax.Array | None,
    *,
    reduction: str,
    ignore_index: int,
    chunk_rows: int | None,
) -> jax.Array:
    places = w.shape[1:-1]
    shape = (*h.shape[:-1], *w.shape[:-1])

    def at_one_place(head: tuple[jax.Array, jax.Array | None, jax.Array], reduction: Any) -> Any:
        kernel, bias, target = head
        return linear.linear_softmax_cross_entropy(
            h,
            kernel,
            target,
            bias=bias,
            class_weights=weight,
            ignore_index=ignore_index,
            label_smoothing=0.0 if smoothing is None else smoothing,
            reduction=reduction,
            chunk_rows=chunk_rows,
        )

    def loss(reduction: str) -> Any:
        if not places:
            return at_one_place((w.T, bias, target), reduction)
        count = math.prod(places)
        kernels = w.reshape(w.shape[0], count, w.shape[-1]).transpose(1, 2, 0)
        biases = None if bias is None else bias.reshape(w.shape[0], count).T
        targets = jnp.moveaxis(target.reshape(*target.shape[: target.ndim - len(places)], count), -1, 0)
        parts = lax.map(lambda head: at_one_place(head, reduction), (kernels, biases, targets))
        if reduction == "none":
            return jnp.moveaxis(parts, 0, -1).reshape(*h.shape[:-1], *places)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)

    # A logit is -inf where the bias is.
    z = jnp.broadcast_to(jnp.zeros((), h.dtype) if bias is None else bias, shape)
    classes = ClassAxis(1 - w.ndim)
    counted, lost = _torch_rules.lost_rows(z, target, weight, smoothing, classes, ignore_index)
    lost = None if bias is None else lost
    return _torch_rules.reduce_rows(loss, counted, lost, reduction, _torch_rules.class_loss_dtype(h, target, weight))
