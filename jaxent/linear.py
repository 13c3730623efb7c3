"""Losses straight from hidden states: each is a row loss and the engine, and never holds the logits of all rows."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Unpack, get_args, overload

import jax
import jax.extend
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxent import _arrays, _heads, _labels, _measures, _reduction, _rows, _targets
from jaxent._heads import Shaping
from jaxent._labels import IGNORED
from jaxent._layout import Layout
from jaxent._options import Divergence, DivergenceOptions, LinearOptions, Precision
from jaxent._reduction import Reduction
from jaxent._rows import LossOptions, RowTargets
from jaxent._sharding import ClassAxis, check_class_axis, check_same_split, check_vocab_axis
from jaxent._streaming import Head, Logits, Products, RowFunction, stream_rows, stream_sum
from jaxent._targets import SoftmaxArguments
from jaxent.losses import TokenStatistics, check_top_k, row_statistics
from jaxent.risk import WeightedSum


@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike,
    *,
    reduction: Literal["sum_and_weight"],
    **options: Unpack[LinearOptions],
) -> WeightedSum: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[LinearOptions],
) -> jax.Array: ...
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> jax.Array | WeightedSum:
    r"""`softmax_cross_entropy` of the logits of a linear layer, without the logits, in nats.

    $$z_n = \mathrm{cap}(h_n W + b) / T, \qquad \mathrm{cap}(x) = s \tanh(x / s)$$

    and then the loss of `softmax_cross_entropy`. Rows are taken a chunk at a time, so that the memory does not grow
    with their number, and value and gradient cost three matrix products, as many as dense code spends. Forward mode,
    Hessian products, `vmap`, `scan` and sharding work as through any function. Take a Hessian-vector product as
    `jax.jvp(jax.grad(loss), ...)`: reverse over reverse keeps the logits of all chunks. The soft cap is that of Gemma 2
    (2024), section 2.

    **Arguments:**

    - `hidden`: `(*batch, features)`, floating. `kernel`: `(features, classes)`; a `(classes, features)` embedding is
      passed as `embedding.T`, which the CPU back end turns once a call. `bias`: `(classes,)`.
    - `targets`, `where`, `weights`, `class_weights`, `ignore_index`, `label_smoothing`, `z_loss`, `reduction`,
      `denominator`, `vocab_axis`: as in `softmax_cross_entropy`, for logits `(*batch, classes)`. With `vocab_axis`,
      `kernel` and `bias` hold this device's classes and `hidden` is the same on all devices of the axis.
    - `soft_cap`: `s > 0`; None for no cap. `temperature`: `T > 0`. Both may be learnt.
    - `chunk_rows`: rows at a time; None takes what `plan` says. `"none"` computes the logits again on the way back:
      four products.
    - `precision`: of the matrix products, as in `jax.lax.dot_general`. None means float32 accuracy for float32 inputs
      (`"highest"`) unless `jax.default_matmul_precision` is set; pass `"tensorfloat32"` or `"default"` for the faster
      products of GPUs and TPUs. bf16 inputs are multiplied as bf16 and added in float32.

    **Returns:** as `softmax_cross_entropy`; gradients come back in the dtypes of the inputs. A dropped row adds
    exactly 0 to every gradient, even if its `hidden` is nan. A label out of range gives nan in its row of the gradient
    by `hidden`, and in all of the gradients by `kernel` and `bias`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel = jnp.ones((2, 3)), jnp.zeros((3, 5))
    >>> linear_softmax_cross_entropy(hidden, kernel, jnp.array([0, 4]))
    Array(1.609438, dtype=float32)
    """
    name = "linear_softmax_cross_entropy"
    head, batch = _heads.check_head(name, hidden, kernel, bias)
    logits_shape = (*batch, head.kernel.shape[1])
    # Hidden states that were gathered over the axis are typed as differing along it, as split ones are. Split ones have
    # another shape than targets.
    _targets.check_vocab_axis(name, vocab_axis, targets, where=where, weights=weights)
    arguments = _targets.check_softmax_arguments(
        name,
        logits_shape,
        -1,
        targets,
        where=where,
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    divisor = _reduction.check(name, reduction, denominator)
    _targets.check_class_axis(name, vocab_axis, {"kernel": (head.kernel, 1)}, arguments)
    losses = _linear_softmax_cross_entropy(
        head,
        _heads.flat_rows(arguments, batch),
        _heads.check_shaping(name, soft_cap, temperature),
        divisor,
        classes=ClassAxis(-1, vocab_axis),
        ignore_index=_targets.check_ignore_index(name, ignore_index),
        reduction=reduction,
        layout=_heads.layout(name, chunk_rows, head),
        products=_heads.products(precision, head),
    )
    return batch.unflatten(losses) if reduction == "none" else losses


@dataclasses.dataclass(frozen=True)
class _SoftmaxRows:
    """The row losses of `softmax_cross_entropy` as the engine takes them; equal where the classes are."""

    classes: ClassAxis

    def __call__(self, logits: Logits, rows: RowTargets, shared: tuple[Shaping, LossOptions]) -> jax.Array:
        shaping, options = shared
        return _rows.softmax_loss(shaping(logits[0]), rows, options, self.classes)[:, 0]


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """Row losses times a number that all rows share."""

    row_fn: RowFunction

    def __call__(self, logits: Logits, rows: RowTargets, shared: tuple[Any, jax.Array]) -> jax.Array:
        inner, scale = shared
        return self.row_fn(logits, rows, inner) * scale


@functools.partial(jax.jit, static_argnames=("classes", "ignore_index", "reduction", "layout", "products"), inline=True)
def _linear_softmax_cross_entropy(
    head: Head,
    arguments: SoftmaxArguments,
    shaping: Shaping,
    divisor: jax.Array | None,
    *,
    classes: ClassAxis,
    ignore_index: int | None,
    reduction: Reduction,
    layout: Layout,
    products: Products,
) -> jax.Array | WeightedSum:
    logits = _heads.logits_like(head)
    rows, options = _targets.row_targets(arguments, logits, classes, ignore_index)
    rows, hidden = without_ignored(rows, head.hidden)
    heads = (head._replace(hidden=hidden),)
    return stream_reduced(_SoftmaxRows(classes), heads, rows, (shaping, options), reduction, divisor, layout, products)


def stream_reduced(
    row_fn: RowFunction,
    heads: tuple[Head, ...],
    rows: RowTargets,
    shared: Any,
    reduction: Reduction,
    divisor: jax.Array | None,
    layout: Layout,
    products: Products,
) -> jax.Array | WeightedSum:
    """The reduction of streamed row losses."""
    if reduction == "none":
        return stream_rows(row_fn, heads, rows, shared, layout, products)
    dtype = _heads.logits_like(*heads).dtype
    weight = jnp.sum(rows.total_weights(ClassAxis())).astype(dtype)
    if reduction == "mean":
        # The rows are divided before the products, not the gradients after them: those are as large as the kernel.
        scale = WeightedSum(jnp.ones_like(weight), weight if divisor is None else divisor.astype(dtype)).mean()
        return stream_sum(_Scaled(row_fn), heads, rows, (shared, scale), layout, products)
    total = stream_sum(row_fn, heads, rows, shared, layout, products)
    return WeightedSum(total, weight) if reduction == "sum_and_weight" else total


def without_ignored(rows: RowTargets, hidden: jax.Array) -> tuple[RowTargets, jax.Array]:
    """Ignored rows have hidden states of 0: their gradient is 0, and 0 times a nan would still reach the kernel's."""
    codes = rows.codes
    if rows.weights is not None:
        finite = jnp.all(jnp.isfinite(hidden), axis=-1, keepdims=True)
        codes = jnp.where((rows.weights == 0) & ~finite, IGNORED, codes)
    return rows._replace(codes=codes), jnp.where(codes == IGNORED, 0, hidden)


def linear_token_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int = 0,
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> TokenStatistics:
    r"""`token_statistics` of the logits of a linear layer, without the logits, in nats.

    $$z_n = \mathrm{cap}(h_n W + b) / T, \qquad \mathrm{cap}(x) = s \tanh(x / s)$$

    **Arguments:** `hidden` `(*batch, features)`, `kernel` `(features, classes)`, `bias`, `soft_cap`, `temperature`,
    `chunk_rows`, `precision` as in `linear_softmax_cross_entropy`; `labels` `(*batch,)`, `top_k` and `vocab_axis` as in
    `token_statistics`.

    **Returns:** `TokenStatistics` with leaves `(*batch,)`, and `(*batch, top_k)` for the top classes. Log-probability,
    log-normaliser and entropy are differentiable; their gradient costs four matrix products.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> stats = linear_token_statistics(jnp.ones((2, 3)), jnp.zeros((3, 4)), jnp.array([0, 3]))
    >>> stats.entropy
    Array([1.3862944, 1.3862944], dtype=float32)
    """
    name = "linear_token_statistics"
    head, batch = _heads.check_head(name, hidden, kernel, bias)
    check_vocab_axis(name, vocab_axis, {"hidden": head.hidden} if labels is None else {"labels": labels})
    if labels is not None:
        labels = _targets.check_labels(name, "labels", labels, batch)
    check_class_axis(name, vocab_axis, {"kernel": (head.kernel, 1)}, {"labels": labels})
    classes = ClassAxis(-1, vocab_axis)
    statistics = _linear_token_statistics(
        head,
        None if labels is None else batch.flatten(labels),
        _heads.check_shaping(name, soft_cap, temperature),
        classes=classes,
        top_k=check_top_k(name, top_k, classes.size(head.kernel)),
        layout=_heads.layout(name, chunk_rows, head),
        products=_heads.products(precision, head),
    )
    return jax.tree.map(batch.unflatten, statistics)


@functools.partial(jax.jit, static_argnames=("classes", "top_k", "layout", "products"), inline=True)
def _linear_token_statistics(
    head: Head,
    labels: jax.Array | None,
    shaping: Shaping,
    *,
    classes: ClassAxis,
    top_k: int,
    layout: Layout,
    products: Products,
) -> TokenStatistics:
    codes = None
    if labels is not None:
        codes = _labels.label_codes(labels[:, None], classes.size(head.kernel), None, None)

    def row_fn(logits: Logits, codes: jax.Array | None, shaping: Shaping) -> TokenStatistics:
        return row_statistics(shaping(logits[0]), codes, classes, top_k)

    return stream_rows(row_fn, (head,), codes, shaping, layout, products)


@overload
def linear_kl_divergence(
    hidden_p: ArrayLike,
    kernel_p: ArrayLike,
    hidden_q: ArrayLike,
    kernel_q: ArrayLike,
    *,
    reduction: Literal["sum_and_weight"],
    **options: Unpack[DivergenceOptions],
) -> WeightedSum: ...
@overload
def linear_kl_divergence(
    hidden_p: ArrayLike,
    kernel_p: ArrayLike,
    hidden_q: ArrayLike,
    kernel_q: ArrayLike,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[DivergenceOptions],
) -> jax.Array: ...
def linear_kl_divergence(
    hidden_p: ArrayLike,
    kernel_p: ArrayLike,
    hidden_q: ArrayLike,
    kernel_q: ArrayLike,
    *,
    bias_p: ArrayLike | None = None,
    bias_q: ArrayLike | None = None,
    divergence: Divergence = "forward",
    mixture: ArrayLike = 0.5,
    soft_cap_p: ArrayLike | None = None,
    soft_cap_q: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> jax.Array | WeightedSum:
    r"""Divergence between the softmax distributions of two linear layers, without their logits, in nats.

    $$\ell_n = w_n D(P_n \| Q_n), \qquad P_n = \mathrm{softmax}((h^p_n W_p + b_p)/T),\quad Q_n \text{ likewise}$$

    Distillation (Hinton et al., 2015) of a teacher P into a student Q; their factor $T^2$ is left to the caller.
    `"reverse"` is $D(Q \| P)$, and `"jensen_shannon"` is $\beta D(P \| M) + (1-\beta) D(Q \| M)$ with
    $M = \beta P + (1-\beta) Q$ (Agarwal et al., 2024, equation 1).

    **Arguments:**

    - `hidden_p`: `(*batch, features_p)`, `kernel_p`: `(features_p, classes)`, `bias_p`: `(classes,)`; `hidden_q`,
      `kernel_q`, `bias_q`: the same for Q. Batch and classes agree, the features need not. A teacher that is not
      differentiated costs one product.
    - `divergence`: which. `mixture`: `beta` in (0, 1).
    - `soft_cap_p`, `soft_cap_q`, `temperature`, `chunk_rows`, `precision`, `vocab_axis`: as in
      `linear_softmax_cross_entropy`.
    - `where`, `weights`: `(*batch,)`. `reduction`, `denominator`: as in `softmax_cross_entropy`.

    **Returns:** float64 for float64 inputs, else float32. Never negative; exact where the two are nearly equal; +inf in
    the forward direction where `q` has removed a class that `p` has. Edges as in `kl_divergence_with_logits`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel = jnp.ones((2, 3)), jnp.eye(3)
    >>> linear_kl_divergence(hidden, kernel, hidden, 2 * kernel)
    Array(0., dtype=float32)
    """
    name = "linear_kl_divergence"
    head_p, batch = _heads.check_head(name, hidden_p, kernel_p, bias_p, "_p")
    head_q, batch_q = _heads.check_head(name, hidden_q, kernel_q, bias_q, "_q")
    if batch_q != batch:
        raise _arrays.shape_error(name, "hidden_q", f"have the batch shape {batch} of `hidden_p`", hidden_q)
    hiddens = {"hidden_p": head_p.hidden, "hidden_q": head_q.hidden}
    check_same_split(name, hiddens, 0)
    check_same_split(name, {"kernel_p": head_p.kernel, "kernel_q": head_q.kernel}, 1)
    if head_q.kernel.shape[1] != head_p.kernel.shape[1]:
        expected = f"have {head_p.kernel.shape[1]} classes, as `kernel_p` has"
        raise _arrays.shape_error(name, "kernel_q", expected, head_q.kernel)
    if divergence not in get_args(Divergence):
        raise ValueError(
            f"jaxent.{name}: `divergence` must be 'forward', 'reverse' or 'jensen_shannon', got {divergence!r}"
        )
    check_vocab_axis(name, vocab_axis, {"where": where, "weights": weights, **hiddens})
    where, weights = _targets.check_row_arguments(name, batch, where, weights)
    divisor = _reduction.check(name, reduction, denominator)
    kernels = {"kernel_p": (head_p.kernel, 1), "kernel_q": (head_q.kernel, 1)}
    check_class_axis(name, vocab_axis, kernels, {"where": where, "weights": weights})
    losses = _linear_kl_divergence(
        (head_p, head_q),
        _heads.flat_rows(SoftmaxArguments(jnp.zeros(batch, jnp.int32), where, weights), batch),
        _heads.check_shaping(name, soft_cap_p, temperature),
        _heads.check_shaping(name, soft_cap_q, temperature),
        _arrays.scalar(name, "mixture", mixture, low=0.0, high=1.0),
        divisor,
        row_fn=_DivergenceRows(ClassAxis(-1, vocab_axis), divergence),
        reduction=reduction,
        layout=_heads.layout(name, chunk_rows, head_p, head_q),
        products=_heads.products(precision, head_p),
    )
    return batch.unflatten(losses) if reduction == "none" else losses


@dataclasses.dataclass(frozen=True)
class _DivergenceRows:
    """The weighted divergence of each row of two blocks of logits."""

    classes: ClassAxis
    divergence: Divergence

    def __call__(self, logits: Logits, rows: RowTargets, shared: tuple[Shaping, Shaping, jax.Array]) -> jax.Array:
        shaping_p, shaping_q, mixture = shared
        z_p, z_q = _arrays.accumulated(shaping_p(logits[0]), shaping_q(logits[1]))
        for z in (z_p, z_q):
            rows = _rows.without_weightless(z, rows, self.classes)
        ignored = rows.codes == IGNORED
        z_p, z_q = jnp.where(ignored, 0, z_p), jnp.where(ignored, 0, z_q)
        if self.divergence == "forward":
            losses = _measures.kl_rows(z_p, z_q, self.classes)
        elif self.divergence == "reverse":
            losses = _measures.kl_rows(z_q, z_p, self.classes)
        else:
            losses = _measures.jensen_shannon_rows(z_p, z_q, mixture.astype(z_p.dtype), self.classes)
        losses = jnp.where(ignored, 0, losses)
        if rows.weights is not None:
            losses = _rows.weighted(jnp.where(ignored, 0, rows.weights), losses)
        return losses[:, 0]


@functools.partial(jax.jit, static_argnames=("row_fn", "reduction", "layout", "products"), inline=True)
def _linear_kl_divergence(
    heads: tuple[Head, ...],
    arguments: SoftmaxArguments,
    shaping_p: Shaping,
    shaping_q: Shaping,
    mixture: jax.Array,
    divisor: jax.Array | None,
    *,
    row_fn: _DivergenceRows,
    reduction: Reduction,
    layout: Layout,
    products: Products,
) -> jax.Array | WeightedSum:
    rows, _ = _targets.row_targets(arguments, _heads.logits_like(*heads), row_fn.classes, None)
    for head in heads:
        rows, _ = without_ignored(rows, head.hidden)
    heads = tuple(head._replace(hidden=without_ignored(rows, head.hidden)[1]) for head in heads)
    return stream_reduced(row_fn, heads, rows, (shaping_p, shaping_q, mixture), reduction, divisor, layout, products)


def linear_loss(
    row_loss: Callable[..., jax.Array],
    hidden: ArrayLike,
    kernel: ArrayLike,
    *row_args: Any,
    bias: ArrayLike | None = None,
    params: Any = None,
    chunk_rows: int | None = None,
    precision: Precision = None,
) -> jax.Array:
    r"""The sum of your own row losses of `hidden @ kernel + bias`, streamed, in their unit.

    $$L = \sum_n \ell(h_n W + b,\, a_n,\, \theta)$$

    Value and gradient cost three matrix products, and every transformation goes through.

    **Arguments:**

    - `row_loss`: `row_loss(logits, *row_args, params)` for one block of rows: `logits` is `(rows, classes)` in at least
      float32, each row argument has the block's rows first, and the result is `(rows,)`. Any differentiable JAX
      function whose rows do not see each other. Without `params` it is called without them.
    - `hidden`: `(*batch, features)`; `kernel`: `(features, classes)`; `bias`: `(classes,)`.
    - `row_args`: pytrees of arrays `(*batch, ...)`; their batch axes arrive as one. `params`: any pytree of arrays that
      all rows share. The loss is differentiable by both.
    - `chunk_rows`, `precision`: as in `linear_softmax_cross_entropy`.

    **Returns:** the sum, a scalar in at least float32.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, also that of what `row_loss` returns.

    A focal loss (Lin et al., 2017, equation 4), its focus learnt through `params`:

    >>> def focal(logits, labels, gamma):
    ...     log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    ...     return -((1 - jnp.exp(log_p)) ** gamma) * log_p
    >>> hidden, kernel, labels = jnp.eye(3), 2.0 * jnp.eye(3), jnp.arange(3)
    >>> linear_loss(focal, hidden, kernel, labels, params=jnp.array(2.0))
    Array(0.03260801, dtype=float32)

    A contrastive loss in both directions (CLIP, Radford et al., 2021, figure 3) needs no row loss of its own:

    >>> def clip(images, texts, temperature):
    ...     pairs = jnp.arange(len(images))
    ...     by_image = linear_softmax_cross_entropy(images, texts.T, pairs, temperature=temperature)
    ...     by_text = linear_softmax_cross_entropy(texts, images.T, pairs, temperature=temperature)
    ...     return (by_image + by_text) / 2
    >>> clip(jnp.eye(3), jnp.eye(3), jnp.array(0.5))
    Array(0.23954478, dtype=float32)
    """
    name = "linear_loss"
    head, batch = _heads.check_head(name, hidden, kernel, bias)
    row_args = jax.tree.map(lambda x: _heads.check_row_argument(name, x, batch), row_args)
    params = jax.tree.map(jnp.asarray, params)
    layout = _heads.layout(name, chunk_rows, head)
    row_fn = _UserRows(row_loss, _takes_params(row_loss, len(row_args), params))
    block = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layout.chunk_rows, *x.shape[1:]), x.dtype), row_args)
    logits = jax.ShapeDtypeStruct((layout.chunk_rows, head.kernel.shape[1]), _heads.logits_like(head).dtype)
    closed = jax.make_jaxpr(row_fn)((logits,), block, params)
    if closed.consts:
        # A custom derivative rule cannot see what `row_loss` closes over; as parameters, its values can be traced too.
        row_fn, params = _ClosedRows(closed), (closed.consts, params)
    return stream_sum(row_fn, (head,), row_args, params, layout, _heads.products(precision, head))


@dataclasses.dataclass(frozen=True)
class _UserRows:
    """A user's row loss as the engine calls it, with its result checked."""

    row_loss: Callable[..., jax.Array]
    takes_params: bool

    def __call__(self, logits: Logits, row_args: tuple[Any, ...], params: Any) -> jax.Array:
        losses = self.row_loss(logits[0], *row_args, *([params] if self.takes_params else []))
        rows = logits[0].shape[0]
        if getattr(losses, "shape", None) != (rows,):
            expected = f"return one loss for each row of its block, shape ({rows},)"
            raise _arrays.shape_error("linear_loss", "row_loss", expected, losses)
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise _arrays.dtype_error("linear_loss", "row_loss", "return floating losses", losses)
        return losses.astype(logits[0].dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _ClosedRows:
    """A row loss with the values that it closed over made arguments."""

    closed: jax.extend.core.ClosedJaxpr

    def __call__(self, logits: Logits, row_args: Any, params: Any) -> jax.Array:
        consts, params = params
        function = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(self.closed.jaxpr, consts))
        return function(*jax.tree.leaves((logits, row_args, params)))[0]


def _takes_params(row_loss: Callable[..., jax.Array], num_row_args: int, params: Any) -> bool:
    """Whether to pass `params`: always if there are any, else if `row_loss` has a place for them."""
    if params is not None:
        return True
    try:
        inspect.signature(row_loss).bind(*[None] * (1 + num_row_args))
    except TypeError:
        return True
    except ValueError:  # a callable without a signature
        pass
    return False
