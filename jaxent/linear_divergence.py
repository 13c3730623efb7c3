"""Divergences between two linear layers, for distillation, without their logits."""

import dataclasses
import functools
from typing import Any, Literal, Unpack, get_args, overload

import jax
import jax.extend
import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._arguments.options import Divergence, DivergenceOptions, Precision, TopDivergenceOptions
from jaxent._arguments.reduction import Reduction, WeightedSum, check_reduction
from jaxent._arguments.targets import (
    SoftmaxArguments,
    SparseTargets,
    check_row_arguments,
    row_targets,
)
from jaxent._engine.chunking import Chunking
from jaxent._engine.linear_head import (
    LinearCall,
    LogitTransform,
    check_head,
    check_linear_call,
    check_logit_transform,
    chunking_for,
    counted_rows,
    flat_rows,
    logits_like,
    matrix_products,
    stream_reduced,
)
from jaxent._engine.streaming import Head, Logits, MatrixProducts
from jaxent._errors import ArgumentValueError, public
from jaxent._math.divergences import jensen_shannon_rows, kl_rows
from jaxent._math.label_loss import has_label
from jaxent._math.row_losses import RowTargets, ignore_zero_weight_rows, weighted
from jaxent._math.top_divergence import Tail, top_divergence_rows
from jaxent._mesh.apply import Batch
from jaxent._mesh.check import check_class_axis, check_same_split, check_vocab_axis
from jaxent._mesh.class_axis import (
    ClassAxis,
    VocabAxis,
)
from jaxent._typing import ArrayLike, DTypeLike


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


@public
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
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> jax.Array | WeightedSum:
    r"""Divergence between the softmax distributions of two linear layers, without their logits, in nats.

    $$\ell_n = w_n D(P_n \| Q_n), \qquad P_n = \mathrm{softmax}((h^p_n W_p + b_p)/T),\quad Q_n \text{ likewise}$$

    Distillation (Hinton et al., 2015) of a teacher P into a student Q; their factor $T^2$ is left to the caller.
    `"reverse"` is $D(Q \| P)$, and `"jensen_shannon"` is $\beta D(P \| M) + (1-\beta) D(Q \| M)$ with
    $M = \beta P + (1-\beta) Q$ (Agarwal et al., 2024, equation 1).

    **Arguments:**

    - `hidden_p`: `(*batch, features_p)`, `kernel_p`: `(features_p, classes)`, `bias_p`: `(classes,)`; `hidden_q`,
      `kernel_q`, `bias_q`: the same for Q. Batch shapes and classes must agree, the features need not. A teacher that
      is not differentiated costs one product.
    - `divergence`: `"forward"`, `"reverse"` or `"jensen_shannon"`. `mixture`: `beta` in (0, 1).
    - `soft_cap_p`, `soft_cap_q`, `temperature`, `chunk_rows`, `dtype`, `precision`, `vocab_axis`: as in
      `linear_softmax_cross_entropy`.
    - `where`, `weights`: `(*batch,)`. `reduction`, `denominator`: as in `softmax_cross_entropy`.

    **Returns:** float64 for float64 inputs, else float32. Never negative; exact where the two are nearly equal; +inf in
    the forward direction where `q` has removed a class that `p` has. Edges as in `kl_divergence_with_logits`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel = jnp.ones((2, 3)), jnp.eye(3)
    >>> linear_kl_divergence(hidden, kernel, hidden, 2 * kernel)
    Array(0., dtype=float32)
    """
    h_p, w_p, b_p = check_head(hidden_p, kernel_p, bias_p, "_p")
    h_q, w_q, b_q = check_head(hidden_q, kernel_q, bias_q, "_q")
    batch = Batch.of(h_p)
    if h_q.shape[:-1] != batch.shape:
        raise arrays.shape_error("hidden_q", f"have the batch shape {batch.shape} of `hidden_p`", h_q)
    if w_q.shape[1] != w_p.shape[1]:
        raise arrays.shape_error("kernel_q", f"have {w_p.shape[1]} classes, as `kernel_p` has", w_q)
    head_p, head_q = Head(batch.flatten(h_p, h_p), w_p, b_p), Head(Batch.of(h_q).flatten(h_q, h_q), w_q, b_q)
    hiddens = {"hidden_p": head_p.hidden, "hidden_q": head_q.hidden}
    check_same_split(hiddens, 0)
    check_same_split({"kernel_p": w_p, "kernel_q": w_q}, 1)
    if divergence not in get_args(Divergence):
        raise ArgumentValueError(f"`divergence` must be 'forward', 'reverse' or 'jensen_shannon', got {divergence!r}")
    check_vocab_axis(vocab_axis, {"where": where, "weights": weights, **hiddens})
    where, weights = check_row_arguments(batch.shape, where, weights)
    divisor = check_reduction(reduction, denominator)
    kernels = {"kernel_p": (head_p.kernel, 1), "kernel_q": (head_q.kernel, 1)}
    check_class_axis(vocab_axis, kernels, {"where": where, "weights": weights})
    products = matrix_products(precision, dtype, vocab_axis)
    losses = _linear_kl_divergence(
        (head_p, head_q),
        flat_rows(SoftmaxArguments(None, where, weights), batch, h_p),
        check_logit_transform(soft_cap_p, temperature),
        check_logit_transform(soft_cap_q, temperature),
        arrays.scalar("mixture", mixture, low=0.0, high=1.0),
        divisor,
        row_fn=DivergenceRowLoss(ClassAxis(-1, vocab_axis), divergence),
        reduction=reduction,
        chunking=chunking_for(chunk_rows, products, head_p, head_q),
        products=products,
    )
    return batch.unflatten(losses) if reduction == "none" else losses


@dataclasses.dataclass(frozen=True)
class DivergenceRowLoss:
    """The weighted divergence of each row of two blocks of logits."""

    classes: ClassAxis
    divergence: Divergence

    def __call__(
        self, logits: Logits, rows: RowTargets, shared: tuple[LogitTransform, LogitTransform, jax.Array]
    ) -> tuple[jax.Array, None]:
        transform_p, transform_q, mixture = shared
        z_p, z_q = arrays.accumulated(transform_p(logits[0]), transform_q(logits[1]))
        rows = ignore_zero_weight_rows(rows, self.classes, z_p, z_q)
        ignored = rows.ignored
        z_p, z_q = jnp.where(ignored, 0, z_p), jnp.where(ignored, 0, z_q)
        if self.divergence == "forward":
            losses = kl_rows(z_p, z_q, self.classes)
        elif self.divergence == "reverse":
            losses = kl_rows(z_q, z_p, self.classes)
        else:
            losses = jensen_shannon_rows(z_p, z_q, mixture.astype(z_p.dtype), self.classes)
        return weighted_rows(losses, rows), None


def weighted_rows(losses: jax.Array, rows: RowTargets) -> jax.Array:
    """The losses times the weights of their rows, 0 where ignored, without the class axis."""
    losses = jnp.where(rows.ignored, 0, losses)
    if rows.weights is not None:
        losses = weighted(jnp.where(rows.ignored, 0, rows.weights), losses)
    return losses[:, 0]


@functools.partial(jax.jit, static_argnames=("row_fn", "reduction", "chunking", "products"), inline=True)
def _linear_kl_divergence(
    heads: tuple[Head, ...],
    arguments: SoftmaxArguments,
    transform_p: LogitTransform,
    transform_q: LogitTransform,
    mixture: jax.Array,
    divisor: jax.Array | None,
    *,
    row_fn: DivergenceRowLoss,
    reduction: Reduction,
    chunking: Chunking,
    products: MatrixProducts,
) -> jax.Array | WeightedSum:
    rows, _ = row_targets(arguments, logits_like(products, *heads), row_fn.classes, None)
    rows, counted = counted_rows(rows, arguments, None, *(head.hidden for head in heads))
    return stream_reduced(
        row_fn,
        heads,
        rows,
        (transform_p, transform_q, mixture),
        counted,
        rows.total_weights(ClassAxis()),
        reduction,
        divisor,
        chunking,
        products,
    )[0]


@overload
def linear_kl_divergence_from_top(
    hidden: ArrayLike,
    kernel: ArrayLike,
    classes: ArrayLike,
    log_probs: ArrayLike,
    *,
    reduction: Literal["sum_and_weight"],
    **options: Unpack[TopDivergenceOptions],
) -> WeightedSum: ...
@overload
def linear_kl_divergence_from_top(
    hidden: ArrayLike,
    kernel: ArrayLike,
    classes: ArrayLike,
    log_probs: ArrayLike,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **options: Unpack[TopDivergenceOptions],
) -> jax.Array: ...
@public
def linear_kl_divergence_from_top(
    hidden: ArrayLike,
    kernel: ArrayLike,
    classes: ArrayLike,
    log_probs: ArrayLike,
    *,
    tail: Tail = "bucket",
    divergence: Literal["forward", "reverse"] = "forward",
    bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> jax.Array | WeightedSum:
    r"""Divergence of a linear layer's softmax from a teacher whose top k classes were stored, in nats.

    $$\ell_n = w_n \Big[\sum_{j \le k} p_{nj} \log \frac{p_{nj}}{q_{nj}}
    + \bar p_n \log \frac{\bar p_n}{\bar q_n}\Big], \qquad \bar p_n = 1 - \sum_{j \le k} p_{nj}, \quad
    Q_n = \mathrm{softmax}(\mathrm{cap}(h_n W + b)/T)$$

    Distillation as in Hinton et al. (2015), from a stored teacher, which is P.

    **Arguments:**

    - `hidden`: `(*batch, features)`, `kernel`: `(features, classes)`, `bias`: `(classes,)`: of the student.
    - `classes`: `(*batch, k)`, integer; `log_probs`: `(*batch, k)`, the teacher's `log p`, normalised over the whole
      vocabulary. Entries whose class is `ignore_index` are left out, and rows that have no others are dropped. Each
      class should be listed only once per row.
    - `divergence`: `"forward"` is the formula, `"reverse"` exchanges P and Q.
    - `tail`: `"bucket"` treats all other classes as one more outcome, on both sides; with k = V it is empty and adds 0.
      `"drop"` leaves it out, and sums only the k terms. `"renormalize"` rescales the teacher's k to one, against the
      student's whole softmax (forward) or its k rescaled likewise (reverse). Only `"bucket"` is a divergence that is 0
      where the student equals the teacher, and never negative; the other two have their minimum elsewhere.
    - `soft_cap`, `temperature`, `chunk_rows`, `dtype`, `precision`, `vocab_axis`: as in `linear_softmax_cross_entropy`.
    - `where`, `weights`: `(*batch,)`. `reduction`, `denominator`: as in `softmax_cross_entropy`.

    **Returns:** float64 for float64 inputs, else float32. The rest of the student is a sum over its classes, so that it
    keeps its digits where the top k hold nearly everything. +inf where the first of the two has a class that the
    second has removed. A class outside the vocabulary makes its row nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel = jnp.eye(3), jnp.eye(3)
    >>> teacher = linear_token_statistics(hidden, kernel, top_k=2)
    >>> linear_kl_divergence_from_top(hidden, kernel, teacher.top_classes, teacher.top_log_probs).round(6)
    Array(0., dtype=float32)
    """
    if tail not in get_args(Tail):
        raise ArgumentValueError(f"`tail` must be 'bucket', 'renormalize' or 'drop', got {tail!r}")
    if divergence not in ("forward", "reverse"):
        raise ArgumentValueError(f"`divergence` must be 'forward' or 'reverse', got {divergence!r}")
    rows = arrays.floating("hidden", hidden).shape[:-1]
    chosen, stored = arrays.integer("classes", classes), arrays.floating("log_probs", log_probs)
    if chosen.ndim != len(rows) + 1 or chosen.shape[:-1] != rows:
        raise arrays.shape_error("classes", f"have shape {(*rows, 'k')}, k classes for each row", chosen)
    arrays.check_shape("log_probs", stored, chosen.shape, "one for each class of `classes`")
    call = check_linear_call(
        hidden,
        kernel,
        bias,
        SoftmaxArguments(SparseTargets(chosen, stored), where, weights, smoothing=0.0, z_loss=0.0),
        ignore_index=ignore_index,
        soft_cap=soft_cap,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        chunk_rows=chunk_rows,
        dtype=dtype,
        precision=precision,
        vocab_axis=vocab_axis,
    )
    row_fn = TopDivergenceRowLoss(call.classes, tail, reverse=divergence == "reverse")
    return _linear_kl_divergence_from_top(call, row_fn=row_fn)


@dataclasses.dataclass(frozen=True)
class TopDivergenceRowLoss:
    """The weighted divergence of each row of logits from what was stored of a teacher."""

    classes: ClassAxis
    tail: Tail
    reverse: bool

    def __call__(self, logits: Logits, rows: RowTargets, transform: LogitTransform) -> tuple[jax.Array, None]:
        z = transform(logits[0])
        rows = ignore_zero_weight_rows(rows, self.classes, z)
        ignored, top = rows.ignored, rows.sparse
        assert top is not None
        top = top._replace(shares=jnp.where(ignored, -jnp.inf, top.shares))
        losses = top_divergence_rows(jnp.where(ignored, 0, z), top, self.classes, self.tail, reverse=self.reverse)
        return weighted_rows(losses, rows), None


@functools.partial(jax.jit, static_argnames=("row_fn",), inline=True)
def _linear_kl_divergence_from_top(call: LinearCall, *, row_fn: TopDivergenceRowLoss) -> jax.Array | WeightedSum:
    rows, _, counted = call.rows()
    targets = call.arguments.targets
    assert rows.sparse is not None
    assert isinstance(targets, SparseTargets)
    # An entry that is left out has probability 0, not log-probability 0.
    absent = has_label(jnp.asarray(targets.classes), call.ignore_index)
    top = rows.sparse._replace(shares=jnp.where(absent, -jnp.inf, rows.sparse.shares))
    losses: Any
    losses, _ = stream_reduced(
        row_fn,
        (call.head,),
        rows._replace(sparse=top),
        call.transform,
        counted,
        rows.total_weights(ClassAxis()),
        call.reduction,
        call.divisor,
        call.chunking,
        call.products,
    )
    return call.batch.unflatten(losses) if call.reduction == "none" else losses
