"""PyTorch's losses of single entries: divergences and binary cross-entropies."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._arguments import arrays
from jaxent._errors import public
from jaxent._math import safe
from jaxent._math.row_losses import binary_nll
from jaxent._typing import ArrayLike
from jaxent.torch_compat._conventions import (
    check_entry_weight,
    check_reduction,
    clamped_binary_nll,
    lost_logits,
    promoted_dtype,
    reduce_entries,
    with_nan,
)


@public
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

    **Returns:** the common type of `input` and `target`. A target of 0 adds 0, with derivative 0 with respect to that
    target; with an `input` of -inf it is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> kl_div(jnp.log(jnp.array([[0.25, 0.25, 0.5]])), jnp.array([[0.5, 0.25, 0.25]]), reduction="batchmean")
    Array(0.1732868, dtype=float32)
    """
    given = check_reduction(reduction, size_average, reduce, allowed=("batchmean", "mean", "sum", "none"))
    if size_average is None and reduce is None and given == "mean":
        warnings.warn(
            "kl_div: reduction='mean' divides by the number of entries, which is not the mean divergence; "
            "'batchmean' divides by the batch size",
            UserWarning,
            stacklevel=3,
        )
    x, t = arrays.floating("input", input), arrays.floating("target", target)
    try:
        shape = np.broadcast_shapes(x.shape, t.shape)
    except ValueError:
        expected = f"broadcast with shape {x.shape}, that of `input`"
        raise arrays.shape_error("target", expected, t) from None
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
    wide_x, wide_t = (jnp.broadcast_to(a, shape) for a in arrays.accumulated(x, t))
    if log_target:
        terms = jnp.exp(wide_t) * (wide_t - wide_x)
    else:
        # The derivative with respect to a target of 0 is 0, in either part.
        factor = jnp.where(wide_t == 0, lax.stop_gradient(wide_t), wide_t)
        terms = -safe.entropy_term(wide_t) - factor * wide_x
    result = reduce_entries(terms, reduction, terms.dtype)
    if by_batch and x.ndim:
        result /= jnp.asarray(x.shape[0], result.dtype)
    return result.astype(promoted_dtype(x, t))


@public
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

    **Returns:** the type of `input`. An `input` or `target` outside [0, 1] gives nan. The derivative with respect to
    `input` is PyTorch's `(x - t) / max(x (1 - x), 1e-12)`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> binary_cross_entropy(jnp.array([0.25, 0.0]), jnp.array([1.0, 1.0]), reduction="none")
    Array([  1.3862944, 100.       ], dtype=float32)
    """
    reduction = check_reduction(reduction, size_average, reduce)
    x, t = _entries(input, target)
    weight = check_entry_weight("weight", weight, x.shape)
    return _binary_cross_entropy(x, t, weight, reduction=reduction)


def _entries(input: ArrayLike, target: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x = arrays.floating("input", input)
    t = arrays.real("target", target)
    arrays.check_shape("target", t, x.shape, "that of `input`")
    return x, t


def _weighted_entries(entries: jax.Array, weight: jax.Array | None) -> jax.Array:
    return entries if weight is None else entries * jnp.broadcast_to(weight.astype(entries.dtype), entries.shape)


@functools.partial(jax.jit, static_argnames=("reduction",), inline=True)
def _binary_cross_entropy(x: jax.Array, t: jax.Array, weight: jax.Array | None, *, reduction: str) -> jax.Array:
    (p,) = arrays.accumulated(x)
    terms = clamped_binary_nll(p, t.astype(p.dtype))
    return reduce_entries(_weighted_entries(terms, weight), reduction, x.dtype)


@public
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
    where PyTorch's formula subtracts infinities: at -inf for targets up to 1, at +inf for a target of 1. A target
    outside [0, 1], such as one of a mask of 0 and 255, goes into the formula as it is, as in PyTorch, and the loss may
    be negative; `jaxent.sigmoid_cross_entropy` gives nan, and `jaxent.diagnose` finds it.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> binary_cross_entropy_with_logits(jnp.array([0.0]), jnp.array([1.0]), pos_weight=jnp.array([2.0]))
    Array(1.3862944, dtype=float32)
    """
    reduction = check_reduction(reduction, size_average, reduce)
    z, t = _entries(input, target)
    given = target if isinstance(target, jax.Array) else arrays.as_array("target", target)
    # The type of a list is NumPy's, not the caller's.
    dtype = t.dtype if hasattr(target, "dtype") and jnp.issubdtype(given.dtype, jnp.floating) else z.dtype
    weight = check_entry_weight("weight", weight, z.shape)
    pos_weight = check_entry_weight("pos_weight", pos_weight, z.shape)
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
    (wide,) = arrays.accumulated(z)
    t = t.astype(wide.dtype)
    if pos_weight is not None:
        pos_weight = jnp.broadcast_to(pos_weight.astype(wide.dtype), z.shape)
    # `sigmoid_cross_entropy` is nan for a target outside [0, 1], for which PyTorch evaluates the formula.
    terms = binary_nll(wide, t, pos_weight)
    terms = with_nan(terms, lost_logits(wide, t, pos_weight))
    return reduce_entries(_weighted_entries(terms, weight), reduction, dtype)
