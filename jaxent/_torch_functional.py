"""The functions of `torch_compat` on logits, log-probabilities and probabilities."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxent import _arrays, _numerics, _softmax, _targets, _torch_rules, losses
from jaxent._sharding import ClassAxis

# ----------------------------------------------------------------------------------------------------------------------
# Softmax


def softmax(
    input: ArrayLike, dim: int | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> jax.Array:
    r"""Softmax along `dim`, as `torch.nn.functional.softmax`: probabilities.

    $$p_k = \exp(z_k) / \sum_j \exp(z_j)$$

    **Arguments:** `input`: any shape, floating, or any type if `dtype` is given, to which it is cast first. `dim`: the
    axis; None, which is deprecated, takes 0 of 0, 1 or 3 dimensions and 1 otherwise.

    **Returns:** the shape of `input`, in its type or `dtype`. A row with nan, +inf or only -inf is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong `dim`.

    >>> softmax(jnp.array([[0.0, 0.0]]), dim=1)
    Array([[0.5, 0.5]], dtype=float32)
    """
    return _along_dim("softmax", _softmax.softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: ArrayLike, dim: int | None = None, _stacklevel: int = 3, dtype: DTypeLike | None = None
) -> jax.Array:
    r"""Logarithm of the softmax along `dim`, as `torch.nn.functional.log_softmax`: log-probabilities, in nats.

    $$\log p_k = z_k - \log \sum_j \exp(z_j)$$

    **Arguments:** as `softmax`.

    **Returns:** the shape of `input`, in its type or `dtype`. A row with nan, +inf or only -inf is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong `dim`.

    >>> log_softmax(jnp.array([[0.0, 0.0]]), dim=1)
    Array([[-0.6931472, -0.6931472]], dtype=float32)
    """
    return _along_dim("log_softmax", _softmax.log_softmax, input, dim, _stacklevel, dtype)


def _along_dim(
    name: str,
    rows_function: Callable[[jax.Array, ClassAxis], jax.Array],
    input: ArrayLike,
    dim: int | None,
    stacklevel: int,
    dtype: DTypeLike | None,
) -> jax.Array:
    function = f"torch_compat.{name}"
    x = _torch_rules.cast(function, input, dtype)
    if dim is None:
        message = f"Implicit dimension choice for {name} has been deprecated: pass dim=X"
        warnings.warn(message, UserWarning, stacklevel=stacklevel)
        dim = 0 if x.ndim in (0, 1, 3) else 1
    axis = _arrays.canonical_axis(function, dim, max(x.ndim, 1), "dim")
    return _softmax_rows(x, rows_function=rows_function, classes=ClassAxis(axis)) if x.size else x


@functools.partial(jax.jit, static_argnames=("rows_function", "classes"), inline=True)
def _softmax_rows(
    x: jax.Array, *, rows_function: Callable[[jax.Array, ClassAxis], jax.Array], classes: ClassAxis
) -> jax.Array:
    (z,) = _arrays.accumulated(x if x.ndim else x[None])
    return rows_function(z, classes).reshape(x.shape).astype(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Losses of classes


def cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: ArrayLike = 0.0,
) -> jax.Array:
    r"""Cross-entropy between targets and the softmax of logits, as `torch.nn.functional.cross_entropy`, in nats.

    $$\ell_n = (1-\epsilon)\, c_{y_n} \mathrm{nll}_{n y_n} + \frac{\epsilon}{C} \sum_k c_k\, \mathrm{nll}_{nk}, \qquad
    \mathrm{nll}_{nk} = \mathrm{lse}(z_n) - z_{nk}$$

    for labels; for probabilities $t$ it is $\sum_k c_k ((1-\epsilon) t_{nk} + \epsilon / C)\, \mathrm{nll}_{nk}$.

    **Arguments:**

    - `input`: logits `(C,)`, `(N, C)` or `(N, C, d_1, ..., d_K)`, floating.
    - `target`: class indices `()`, `(N,)` or `(N, d_1, ..., d_K)`, or class probabilities shaped like `input`.
    - `weight`: `(C,)`, class weights. `ignore_index`: rows with this label are dropped; not for probabilities.
    - `reduction`: `"mean"` divides by the weights of the labels that are not ignored, or, for probabilities, by the
      number of rows; `"sum"`; `"none"`. `size_average`, `reduce`: deprecated, and override it.
    - `label_smoothing`: in [0, 1].

    **Returns:** the type of `input`, or for probabilities the common type of `input`, `target` and `weight`. A label
    out of range gives nan; a mean over nothing is nan, its derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> cross_entropy(jnp.array([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]), jnp.array([2, -100]))
    Array(0.5514447, dtype=float32)
    """
    name = "torch_compat.cross_entropy"
    reduction = _torch_rules.check_reduction(name, reduction, size_average, reduce)
    z = _class_scores(name, input)
    axis = _torch_rules.class_axis(z)
    target = _torch_rules.check_target(name, target, z.shape, axis)
    if jnp.issubdtype(target.dtype, jnp.floating) and ignore_index >= 0:
        raise ValueError(f"jaxent.{name}: `ignore_index` goes with class indices, got {ignore_index} and probabilities")
    return _cross_entropy(
        z,
        target,
        _torch_rules.check_class_weight(name, weight, z.shape[axis]),
        _arrays.scalar(name, "label_smoothing", label_smoothing, low=0.0, high=1.0, neutral=0.0),
        ignore_index=ignore_index,
        reduction=reduction,
    )


def _class_scores(function: str, input: ArrayLike) -> jax.Array:
    z = _arrays.floating(function, "input", input)
    if z.ndim == 0:
        raise _arrays.shape_error(function, "input", "have shape (C,), (N, C) or (N, C, d_1, ..., d_K)", z)
    return z


@functools.partial(jax.jit, static_argnames=("ignore_index", "reduction"), inline=True)
def _cross_entropy(
    z: jax.Array,
    target: jax.Array,
    weight: jax.Array | None,
    smoothing: jax.Array | None,
    *,
    ignore_index: int,
    reduction: str,
) -> jax.Array:
    classes = ClassAxis(_torch_rules.class_axis(z))
    dtype = _torch_rules.class_loss_dtype(z, target, weight)
    if classes.size(z) == 0:
        return _torch_rules.loss_of_no_classes(target, smoothing, classes, ignore_index, reduction, dtype)
    loss = functools.partial(
        losses.softmax_cross_entropy,
        z,
        target,
        axis=classes.axis,
        class_weights=weight,
        ignore_index=ignore_index,
        label_smoothing=0.0 if smoothing is None else smoothing,
    )
    (wide,) = _arrays.accumulated(z)
    rows = _torch_rules.row_targets(wide, target, weight, classes, ignore_index)
    lost = _torch_rules.lost_rows(wide, rows, weight, smoothing, classes)
    return _torch_rules.reduce_rows(loss, rows, lost, classes, reduction, dtype)


def nll_loss(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    r"""Negative log-likelihood of labels, as `torch.nn.functional.nll_loss`, in the unit of the log-probabilities.

    $$\ell_n = -c_{y_n} \log p_{n y_n}$$

    **Arguments:** `input`: log-probabilities `(C,)`, `(N, C)` or `(N, C, d_1, ..., d_K)`, floating. `target`: class
    indices. The others as in `cross_entropy`.

    **Returns:** the type of `input`. A label out of range gives nan; a mean over nothing is nan, its derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> nll_loss(jnp.log(jnp.array([[0.3, 0.3, 0.4]])), jnp.array([2]))
    Array(0.9162907, dtype=float32)
    """
    name = "torch_compat.nll_loss"
    reduction = _torch_rules.check_reduction(name, reduction, size_average, reduce)
    log_p = _class_scores(name, input)
    axis = _torch_rules.class_axis(log_p)
    labels = _targets.check_labels(name, "target", target, _targets.rows_shape(log_p.shape, axis))
    weight = _torch_rules.check_class_weight(name, weight, log_p.shape[axis])
    return _nll_loss(log_p, labels, weight, ignore_index=ignore_index, reduction=reduction)


@functools.partial(jax.jit, static_argnames=("ignore_index", "reduction"), inline=True)
def _nll_loss(
    log_p: jax.Array, labels: jax.Array, weight: jax.Array | None, *, ignore_index: int, reduction: str
) -> jax.Array:
    classes = ClassAxis(_torch_rules.class_axis(log_p))
    if classes.size(log_p) == 0:
        return _torch_rules.loss_of_no_classes(labels, None, classes, ignore_index, reduction, log_p.dtype)
    loss = functools.partial(
        losses.nll_loss, log_p, labels, axis=classes.axis, class_weights=weight, ignore_index=ignore_index
    )
    (wide,) = _arrays.accumulated(log_p)
    rows = _torch_rules.row_targets(wide, labels, weight, classes, ignore_index)
    lost = _torch_rules.lost_rows(wide, rows, weight, None, classes)
    return _torch_rules.reduce_rows(loss, rows, lost, classes, reduction, log_p.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Losses of entries


def kl_div(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> jax.Array:
    r"""Terms of the divergence of `exp(input)` from a target, as `torch.nn.functional.kl_div`, in nats.

    $$\ell = t\,(\log t - x), \qquad \text{or } e^t (t - x) \text{ with } \texttt{log\_target}$$

    Note the order: `kl_div(log_q, p)` is $D(P \| Q)$, which is `jaxent.kl_divergence(p, q)` when summed over the
    classes of distributions that sum to one.

    **Arguments:** `input`: log-probabilities of any shape. `target`: probabilities, or with `log_target` their
    logarithms, of a shape that broadcasts with that of `input`. `reduction`: `"batchmean"` divides the sum by the
    length of the first axis of `input`, which gives the mean divergence; `"mean"` divides by the number of entries and
    warns, because it does not; `"sum"`; `"none"`. `size_average`, `reduce`: deprecated, and override it.

    **Returns:** the common type of `input` and `target`. A target of 0 adds 0, with derivative 0 by that target; with
    an `input` of -inf it is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> kl_div(jnp.log(jnp.array([[0.25, 0.25, 0.5]])), jnp.array([[0.5, 0.25, 0.25]]), reduction="batchmean")
    Array(0.1732868, dtype=float32)
    """
    name = "torch_compat.kl_div"
    given = _torch_rules.check_reduction(
        name, reduction, size_average, reduce, allowed=("batchmean", "mean", "sum", "none")
    )
    if size_average is None and reduce is None and given == "mean":
        warnings.warn(
            "kl_div: reduction='mean' divides by the number of entries, which is not the mean divergence; "
            "'batchmean' divides by the batch size",
            UserWarning,
            stacklevel=2,
        )
    x, t = _arrays.floating(name, "input", input), _arrays.floating(name, "target", target)
    try:
        shape = np.broadcast_shapes(x.shape, t.shape)
    except ValueError:
        expected = f"broadcast with shape {x.shape}, that of `input`"
        raise _arrays.shape_error(name, "target", expected, t) from None
    # As in PyTorch, the deprecated flags override the sum of "batchmean", but not its division.
    return _kl_div(
        x,
        t,
        shape=shape,
        reduction="sum" if given == "batchmean" else given,
        by_batch=reduction == "batchmean",
        log_target=bool(log_target),
    )


@functools.partial(jax.jit, static_argnames=("shape", "reduction", "by_batch", "log_target"), inline=True)
def _kl_div(
    x: jax.Array, t: jax.Array, *, shape: tuple[int, ...], reduction: str, by_batch: bool, log_target: bool
) -> jax.Array:
    wide_x, wide_t = (jnp.broadcast_to(a, shape) for a in _arrays.accumulated(x, t))
    if log_target:
        terms = jnp.exp(wide_t) * (wide_t - wide_x)
    else:
        # By a target of 0 the derivative is 0, that of either part.
        factor = jnp.where(wide_t == 0, lax.stop_gradient(wide_t), wide_t)
        terms = -_numerics.entropy_term(wide_t) - factor * wide_x
    result = _torch_rules.reduce_entries(terms, reduction, terms.dtype)
    if by_batch and x.ndim:
        result /= jnp.asarray(x.shape[0], result.dtype)
    return result.astype(_torch_rules.promoted_dtype(x, t))


def binary_cross_entropy(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> jax.Array:
    r"""Binary cross-entropy between targets and probabilities, as `torch.nn.functional.binary_cross_entropy`, in nats.

    $$\ell = -w\,[\,t \log x + (1 - t) \log(1 - x)\,], \qquad \text{each logarithm at least } -100$$

    From logits use `binary_cross_entropy_with_logits`, which needs no such bound.

    **Arguments:** `input`: probabilities, any shape, floating. `target`: the same shape, in [0, 1]. `weight`:
    broadcasts to that shape. `reduction`: `"mean"` divides by the number of entries; `"sum"`; `"none"`. `size_average`,
    `reduce`: deprecated, and override it.

    **Returns:** the type of `input`. An `input` or `target` outside [0, 1] gives nan. The derivative by `input` is
    PyTorch's `(x - t) / max(x (1 - x), 1e-12)`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> binary_cross_entropy(jnp.array([0.25, 0.0]), jnp.array([1.0, 1.0]), reduction="none")
    Array([  1.3862944, 100.       ], dtype=float32)
    """
    name = "torch_compat.binary_cross_entropy"
    reduction = _torch_rules.check_reduction(name, reduction, size_average, reduce)
    x, t = _entries(name, input, target)
    weight = _torch_rules.check_entry_weight(name, "weight", weight, x.shape)
    return _binary_cross_entropy(x, t, weight, reduction=reduction)


def _entries(function: str, input: ArrayLike, target: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x = _arrays.floating(function, "input", input)
    t = _arrays.probability_or_flag(function, "target", target)
    _arrays.check_shape(function, "target", t, x.shape, "that of `input`")
    return x, t


def _weighted_entries(entries: jax.Array, weight: jax.Array | None) -> jax.Array:
    return entries if weight is None else entries * jnp.broadcast_to(weight.astype(entries.dtype), entries.shape)


@functools.partial(jax.jit, static_argnames=("reduction",), inline=True)
def _binary_cross_entropy(x: jax.Array, t: jax.Array, weight: jax.Array | None, *, reduction: str) -> jax.Array:
    (p,) = _arrays.accumulated(x)
    terms = _torch_rules.clamped_binary_nll(p, t.astype(p.dtype))
    return _torch_rules.reduce_entries(_weighted_entries(terms, weight), reduction, x.dtype)


def binary_cross_entropy_with_logits(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: ArrayLike | None = None,
) -> jax.Array:
    r"""Binary cross-entropy of logits, as `torch.nn.functional.binary_cross_entropy_with_logits`, in nats.

    $$\ell = -w\,[\,c\, t \log \sigma(z) + (1 - t) \log \sigma(-z)\,]$$

    **Arguments:** `input`: logits, any shape, floating. `target`: the same shape; floating, or bool or integer 0 and 1.
    `weight`, `pos_weight` (`c`): broadcast to that shape. The others as in `binary_cross_entropy`.

    **Returns:** the type of a floating `target`, as in PyTorch, else that of `input`. At an infinite logit +inf, or nan
    where PyTorch's formula subtracts infinities: at -inf for targets up to 1, at +inf for a target of 1.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> binary_cross_entropy_with_logits(jnp.array([0.0]), jnp.array([1.0]), pos_weight=jnp.array([2.0]))
    Array(1.3862944, dtype=float32)
    """
    name = "torch_compat.binary_cross_entropy_with_logits"
    reduction = _torch_rules.check_reduction(name, reduction, size_average, reduce)
    z, t = _entries(name, input, target)
    dtype = t.dtype if jnp.issubdtype(getattr(target, "dtype", z.dtype), jnp.floating) else z.dtype
    weight = _torch_rules.check_entry_weight(name, "weight", weight, z.shape)
    pos_weight = _torch_rules.check_entry_weight(name, "pos_weight", pos_weight, z.shape)
    return _binary_cross_entropy_with_logits(z, t, weight, pos_weight, reduction=reduction, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("reduction", "dtype"), inline=True)
def _binary_cross_entropy_with_logits(
    z: jax.Array,
    t: jax.Array,
    weight: jax.Array | None,
    pos_weight: jax.Array | None,
    *,
    reduction: str,
    dtype: np.dtype,
) -> jax.Array:
    (wide,) = _arrays.accumulated(z)
    t = t.astype(wide.dtype)
    if pos_weight is not None:
        pos_weight = jnp.broadcast_to(pos_weight.astype(wide.dtype), z.shape)
    terms: Any = losses.sigmoid_cross_entropy(wide, t, pos_weight=pos_weight, reduction="none")
    terms = _torch_rules.with_nan(terms, _torch_rules.lost_logits(wide, t, pos_weight))
    return _torch_rules.reduce_entries(_weighted_entries(terms, weight), reduction, dtype)
