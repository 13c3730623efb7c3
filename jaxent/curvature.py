"""Curvature of the softmax loss: Hessian by the logits, Gauss-Newton and Fisher products through any model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxent import _arrays, _heads, _reduction, _softmax, _targets
from jaxent._forms import Fisher, Form, GaussNewton
from jaxent._heads import Shaping
from jaxent._layout import Layout
from jaxent._options import Precision
from jaxent._rows import LossOptions, RowTargets
from jaxent._sharding import ClassAxis, check_vocab_axis, elementwise
from jaxent._streaming import Head, Logits, Products
from jaxent._targets import SoftmaxArguments
from jaxent.linear import stream_reduced, without_ignored
from jaxent.losses import check_logits, check_softmax_call

Pytree = Any
MatrixReduction = Literal["mean", "sum"]


# ----------------------------------------------------------------------------------------------------------------------
# By the logits


def logit_hessian(logits: ArrayLike, *, axis: int = -1) -> jax.Array:
    r"""Second derivative of `-log p_y` by the logits, in nats per squared unit of logit, whatever the label `y`.

    $$\frac{\partial^2 \ell}{\partial z_i \partial z_j} = p_i\, [i = j] - p_i p_j, \qquad p = \mathrm{softmax}(z)$$

    Bishop (2006), equation 4.110. The covariance of a one-hot draw from `p`, so that it is symmetric and positive
    semi-definite, with the constant vector in its kernel. It is also the Fisher matrix of the logits.

    **Arguments:** `logits`: `(*batch, classes)`, floating; the classes lie at `axis`.

    **Returns:** `(*batch, classes, classes)`, the matrices on the last two axes wherever the classes were; float64 for
    float64 logits, else float32. `1 - p_i` on the diagonal is not a difference: at logits (0, -41), where `1 - p_0`
    rounds to 0, the diagonal is 1.6e-18. A logit of -inf has a row and a column of 0; a row of logits with nan, +inf or
    only -inf is nan throughout.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> logit_hessian(jnp.log(jnp.array([0.25, 0.75]))).round(4)
    Array([[ 0.1875, -0.1875],
           [-0.1875,  0.1875]], dtype=float32)
    """
    z, axis = check_logits("logit_hessian", "logits", logits, axis)
    return _logit_hessian(jnp.moveaxis(z, axis, -1))


@functools.partial(jax.jit, inline=True)
def _logit_hessian(logits: jax.Array) -> jax.Array:
    (z,) = _arrays.accumulated(logits)
    row = _softmax.normalizer(z, ClassAxis())
    p = _softmax.probabilities(z, row, ClassAxis())
    diagonal = p * -jnp.expm1(_softmax.log_probabilities(z, row, ClassAxis()))
    same = jnp.eye(z.shape[-1], dtype=bool).reshape((1,) * (z.ndim - 1) + (z.shape[-1],) * 2)
    return jnp.where(same, diagonal[..., None], -p[..., :, None] * p[..., None, :])


def logit_hessian_product(logits: ArrayLike, v: ArrayLike, *, axis: int = -1) -> jax.Array:
    r"""`logit_hessian(logits) @ v` for each row, without the matrix, in nats per unit of logit.

    $$(H v)_i = p_i (v_i - \textstyle\sum_j p_j v_j), \qquad p = \mathrm{softmax}(z)$$

    **Arguments:** `logits`: `(*batch, classes)`, floating, the classes at `axis`; `v`: the same shape, floating.

    **Returns:** the shape of `logits`; float64 if one of the two is, else float32. Adding a constant to a row of `v`
    changes nothing, and `v` is counted from its entry at the largest logit, so that nothing large cancels: at logits
    (0, -41) the product with (1, 0) is (1.6e-18, -1.6e-18). Edges as in `logit_hessian`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> logit_hessian_product(jnp.log(jnp.array([0.25, 0.75])), jnp.array([1.0, 0.0])).round(4)
    Array([ 0.1875, -0.1875], dtype=float32)
    """
    name = "logit_hessian_product"
    z, axis = check_logits(name, "logits", logits, axis)
    step = _arrays.floating(name, "v", v)
    _arrays.check_shape(name, "v", step, z.shape, "that of the logits")
    return _logit_hessian_product(z, step, classes=ClassAxis(axis))


@functools.partial(jax.jit, static_argnames=("classes",), inline=True)
def _logit_hessian_product(logits: jax.Array, v: jax.Array, *, classes: ClassAxis) -> jax.Array:
    z, step = _arrays.accumulated(logits, v)
    return jax.jvp(lambda z: _softmax.softmax(z, classes), (z,), (step,))[1]


# ----------------------------------------------------------------------------------------------------------------------
# Through any model


def ggn_vector_product(
    logits_fn: Callable[[Any], jax.Array],
    params: Pytree,
    v: Pytree,
    *,
    targets: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    vocab_axis: str | None = None,
) -> Pytree:
    r"""Gauss-Newton matrix of `softmax_cross_entropy(logits_fn(params), ...)` times a step, in nats per unit of it.

    $$G v = \frac{1}{W} \sum_n J_n^\top A_n J_n v, \qquad
    A_n = w_n S_n\, (\mathrm{diag}\, p_n - p_n p_n^\top), \qquad J_n = \frac{\partial z_n}{\partial \theta}$$

    The generalised Gauss-Newton matrix: Schraudolph (2002), section 3; Martens (2020), section 8. `A_n` is the Hessian
    of the row's loss by its logits, and `W` the divisor of the loss: where the logits are linear in the parameters, `G`
    is `jax.hessian` of the loss. `G` is symmetric and positive semi-definite: `jax.scipy.sparse.linalg.cg` takes it as
    it is, plus some damping.

    **What is the Fisher matrix and what is not.** With targets that sum to one, given as labels, probabilities or
    smoothed, `S_n = 1` and `G` is the true Fisher matrix, the expectation of `g g^T` over labels drawn from the model;
    the targets do not enter. Row weights weigh both alike. Class weights and targets that do not sum to one scale a row
    by what its targets add up to, `S_n`: `G` is then the Fisher matrix of rows so weighted. The z-loss is no
    likelihood: it adds `2 zeta w_n (p_n p_n^T + lse_n (diag p_n - p_n p_n^T))` to `A_n`, which is semi-definite as long
    as `S_n + 2 zeta lse_n >= 0`. The empirical Fisher matrix, with the labels of the data, is another matrix:
    `fisher_vector_product`.

    **Arguments:**

    - `logits_fn`: `logits_fn(params)` gives `(*batch, classes)`, floating, the classes at `axis`.
    - `params`: any pytree of floating arrays. `v`: the same structure and shapes; converted to the dtypes of `params`.
    - `targets`: labels or probabilities, for the options that look at them: ignored labels, class weights,
      probabilities that do not sum to one. None counts every row once.
    - The others as in `softmax_cross_entropy`; the reduction is `"mean"` or `"sum"`.

    **Returns:** the structure, shapes and dtypes of `v`. The logits and their Jacobian products are taken once, the
    curvature in at least float32. A row that is not counted adds 0; a label out of range, or a row with nan, +inf or
    only -inf, gives nan. Inside `jax.shard_map`, parameters that all devices share get the sum over the devices, as
    they do from `jax.grad`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong structure, shape or option.

    >>> inputs, kernel = jnp.eye(2), jnp.zeros((2, 2))
    >>> ggn_vector_product(lambda w: inputs @ w, kernel, jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _product(
        "ggn_vector_product",
        GaussNewton,
        logits_fn,
        params,
        v,
        targets,
        axis=axis,
        where=where,
        weights=weights,
        class_weights=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        reduction=reduction,
        denominator=denominator,
        vocab_axis=vocab_axis,
    )


def fisher_vector_product(
    logits_fn: Callable[[Any], jax.Array],
    params: Pytree,
    labels: ArrayLike,
    v: Pytree,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    vocab_axis: str | None = None,
) -> Pytree:
    r"""Empirical Fisher matrix, the second moment of the rows' gradients, times a step, in nats^2 per unit of it.

    $$F v = \frac{1}{W} \sum_n w_n\, g_n (g_n^\top v), \qquad
    g_n = J_n^\top \frac{\partial \ell_n}{\partial z_n} = J_n^\top (p_n - y_n), \qquad W = \textstyle\sum_n w_n$$

    Martens (2020), section 11. It is not the Fisher matrix, whose labels come from the model and not from the data, and
    it need not be near it (Kunstner et al., 2019): it vanishes where every row is fitted. With `labels` drawn from the
    model (`jax.random.categorical(key, logits_fn(params))`) its expectation is the true Fisher matrix, which
    `ggn_vector_product` gives without drawing.

    **Arguments:**

    - `logits_fn`, `params`, `v`: as in `ggn_vector_product`.
    - `labels`: `(*batch,)` class indices, or probabilities `t` shaped like the logits. `g_n` is the gradient of the
      row's loss as it is, so that smoothing and probabilities go into `y_n` before the product, not a product into the
      mean over labels.
    - `weights`: how often a row counts: 2 is the row twice, and `w_n` appears once, not squared. For class weights
      pass `weights=class_weights[labels]`.
    - The others as in `softmax_cross_entropy`; the reduction is `"mean"` or `"sum"`.

    **Returns:** the structure, shapes and dtypes of `v`; symmetric and positive semi-definite as a matrix. Rows that do
    not count add 0; a label out of range, or a row with nan, +inf or only -inf, gives nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong structure, shape or option.

    >>> inputs, kernel = jnp.eye(2), jnp.zeros((2, 2))
    >>> fisher_vector_product(lambda w: inputs @ w, kernel, jnp.array([0, 1]), jnp.array([[1.0, 0.0], [0.0, 0.0]]))
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _product(
        "fisher_vector_product",
        Fisher,
        logits_fn,
        params,
        v,
        labels,
        axis=axis,
        where=where,
        weights=weights,
        class_weights=None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=0.0,
        reduction=reduction,
        denominator=denominator,
        vocab_axis=vocab_axis,
    )


def _product(
    function: str,
    form: Callable[[ClassAxis], Form],
    logits_fn: Callable[[Any], jax.Array],
    params: Pytree,
    v: Pytree,
    targets: ArrayLike | None,
    *,
    axis: int,
    ignore_index: int | None,
    **options: Any,
) -> Pytree:
    _check_reduction(function, options["reduction"])
    params = _floating_leaves(function, "params", params)
    v = _check_tangents(function, v, params)
    logits, push = jax.linearize(logits_fn, params)
    if not (isinstance(logits, jax.Array) and jnp.issubdtype(logits.dtype, jnp.floating)):
        raise _arrays.dtype_error(function, "logits_fn", "return floating logits", logits)
    logits, axis = check_logits(function, "logits_fn(params)", logits, axis)
    check_vocab_axis(function, options["vocab_axis"])
    if targets is None:
        targets, ignore_index = _no_labels(logits, ClassAxis(axis, options["vocab_axis"])), None
    arrays, static = check_softmax_call(function, logits, targets, axis=axis, ignore_index=ignore_index, **options)

    def half_form(v: Pytree) -> jax.Array:
        step = push(jax.tree.map(lambda x, p: x.astype(p.dtype), v, params))
        return _half_form(step, *arrays, form=form(static["classes"]), **static)

    return jax.grad(half_form)(v)


@functools.partial(jax.jit, static_argnames=("form", "classes", "ignore_index", "reduction"), inline=True)
def _half_form(
    step: jax.Array,
    logits: jax.Array,
    arguments: SoftmaxArguments,
    divisor: jax.Array | None,
    *,
    form: Form,
    classes: ClassAxis,
    ignore_index: int | None,
    reduction: MatrixReduction,
) -> jax.Array:
    def row_forms(logits: jax.Array, step: jax.Array, arguments: SoftmaxArguments) -> tuple[jax.Array, jax.Array]:
        z, step = _arrays.accumulated(logits, step)
        rows, options = _targets.row_targets(arguments, z, classes, ignore_index)
        return jnp.squeeze(form(z, step, rows, options), classes.axis), rows.total_weights(classes)

    forms, weights = elementwise(row_forms, logits, step, arguments, without=classes.axis)
    total: Any = _reduction.reduce(forms, weights, reduction, divisor)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Of a linear layer, without the logits


def linear_ggn_vector_product(
    hidden: ArrayLike,
    kernel: ArrayLike,
    v: tuple[ArrayLike | None, ...],
    *,
    targets: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> tuple[jax.Array | None, ...]:
    r"""`ggn_vector_product` of a linear layer by hidden states, kernel and bias, streamed, in its unit.

    $$u_n = J_n v = v^h_n W + h_n V^W + v^b, \qquad
    G v = \frac{1}{W} \sum_n \big(A_n u_n W^\top,\; h_n^\top A_n u_n,\; A_n u_n\big)$$

    with the `A_n` of `ggn_vector_product`, for the logits of `linear_softmax_cross_entropy`; soft cap and temperature
    belong to the model and enter through their derivatives. Rows are taken a chunk at a time: the memory does not grow
    with their number. A product by the kernel costs three matrix products of the size of the logits, and each of
    `hidden` and `kernel` adds two to the one for the logits.

    **Arguments:**

    - `hidden`: `(*batch, features)`. `kernel`: `(features, classes)`. `bias`: `(classes,)`.
    - `v`: `(v_hidden, v_kernel)` or `(v_hidden, v_kernel, v_bias)`, shaped like what they are steps of and converted to
      its dtype. None stands for what is held fixed: `(None, v_kernel)` is the matrix of the kernel alone.
    - `targets` and the options as in `ggn_vector_product`; `soft_cap`, `temperature`, `chunk_rows`, `precision`,
      `vocab_axis` as in `linear_softmax_cross_entropy`.

    **Returns:** a tuple with the shapes and dtypes of `v`, None where it is None. A row that is not counted adds
    exactly 0, whatever it holds.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel = jnp.eye(2), jnp.zeros((2, 2))
    >>> linear_ggn_vector_product(hidden, kernel, (None, jnp.array([[1.0, 0.0], [0.0, 0.0]])))[1]
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _linear_product(
        "linear_ggn_vector_product",
        GaussNewton,
        hidden,
        kernel,
        v,
        targets,
        bias=bias,
        where=where,
        weights=weights,
        class_weights=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        soft_cap=soft_cap,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        chunk_rows=chunk_rows,
        precision=precision,
        vocab_axis=vocab_axis,
    )


def linear_fisher_vector_product(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    v: tuple[ArrayLike | None, ...],
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: MatrixReduction = "mean",
    denominator: ArrayLike | None = None,
    chunk_rows: int | None = None,
    precision: Precision = None,
    vocab_axis: str | None = None,
) -> tuple[jax.Array | None, ...]:
    r"""`fisher_vector_product` of a linear layer by hidden states, kernel and bias, streamed, in its unit.

    $$F v = \frac{1}{W} \sum_n w_n\, g_n \langle g_n, v \rangle, \qquad
    \langle g_n, v \rangle = (p_n - y_n)^\top (v^h_n W + h_n V^W + v^b)$$

    **Arguments:** `hidden`, `kernel`, `bias`, `v`, `soft_cap`, `temperature`, `chunk_rows`, `precision` and
    `vocab_axis` as in `linear_ggn_vector_product`; `labels` and the other options as in `fisher_vector_product`.

    **Returns:** a tuple with the shapes and dtypes of `v`, None where it is None. A row that is not counted adds
    exactly 0, whatever it holds. Costs what `linear_ggn_vector_product` costs.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> hidden, kernel, v = jnp.eye(2), jnp.zeros((2, 2)), jnp.array([[1.0, 0.0], [0.0, 0.0]])
    >>> linear_fisher_vector_product(hidden, kernel, jnp.array([0, 1]), (None, v))[1]
    Array([[ 0.125, -0.125],
           [ 0.   ,  0.   ]], dtype=float32)
    """
    return _linear_product(
        "linear_fisher_vector_product",
        Fisher,
        hidden,
        kernel,
        v,
        labels,
        bias=bias,
        where=where,
        weights=weights,
        class_weights=None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=0.0,
        soft_cap=soft_cap,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        chunk_rows=chunk_rows,
        precision=precision,
        vocab_axis=vocab_axis,
    )


def _linear_product(
    function: str,
    form: Callable[[ClassAxis], Form],
    hidden: ArrayLike,
    kernel: ArrayLike,
    v: tuple[ArrayLike | None, ...],
    targets: ArrayLike | None,
    *,
    bias: ArrayLike | None,
    ignore_index: int | None,
    soft_cap: ArrayLike | None,
    temperature: ArrayLike,
    reduction: MatrixReduction,
    denominator: ArrayLike | None,
    chunk_rows: int | None,
    precision: Precision,
    vocab_axis: str | None,
    **options: Any,
) -> tuple[jax.Array | None, ...]:
    _check_reduction(function, reduction)
    head, batch = _heads.check_head(function, hidden, kernel, bias)
    rows = {"where": options["where"], "weights": options["weights"]}
    _targets.check_vocab_axis(function, vocab_axis, targets, hidden=head.hidden, **rows)
    steps = _check_steps(function, v, (hidden, kernel, bias))
    if targets is None:
        targets, ignore_index = batch.unflatten(_no_labels(head.hidden, ClassAxis())), None
    shape = (*batch, head.kernel.shape[1])
    arguments = _targets.check_softmax_arguments(function, shape, -1, targets, **options)
    divisor = _reduction.check(function, reduction, denominator)
    _targets.check_class_axis(function, vocab_axis, {"kernel": (head.kernel, 1)}, arguments)
    by_hidden, *by_layer = steps
    by_hidden, *by_layer = _linear_curvature(
        head,
        (None if by_hidden is None else batch.flatten(by_hidden), *by_layer),
        _heads.flat_rows(arguments, batch),
        _heads.check_shaping(function, soft_cap, temperature),
        divisor,
        row_fn=_StreamedForm(form(ClassAxis(-1, vocab_axis))),
        ignore_index=_targets.check_ignore_index(function, ignore_index),
        reduction=reduction,
        # Two blocks at a time: the logits, and their step or its derivative.
        layout=_heads.layout(function, chunk_rows, head, head),
        products=_heads.products(precision, head),
    )
    return (None if by_hidden is None else batch.unflatten(by_hidden), *by_layer)[: len(v)]


@dataclasses.dataclass(frozen=True)
class _StreamedForm:
    """A form as the engine takes it: the first block holds the logits, the others add up to their step."""

    form: Form

    def __call__(
        self, logits: Logits, rows: RowTargets, shared: tuple[Shaping, LossOptions, jax.Array | None]
    ) -> jax.Array:
        shaping, options, by_bias = shared
        raw, *steps = logits
        if by_bias is not None:
            steps.append(jnp.broadcast_to(by_bias[None, :], raw.shape))
        step = functools.reduce(jnp.add, steps)
        z, step = jax.jvp(shaping, (raw,), (step,))
        return self.form(z, step, rows, options)[:, 0]


@functools.partial(jax.jit, static_argnames=("row_fn", "ignore_index", "reduction", "layout", "products"), inline=True)
def _linear_curvature(
    head: Head,
    steps: tuple[jax.Array | None, ...],
    arguments: SoftmaxArguments,
    shaping: Shaping,
    divisor: jax.Array | None,
    *,
    row_fn: _StreamedForm,
    ignore_index: int | None,
    reduction: MatrixReduction,
    layout: Layout,
    products: Products,
) -> tuple[jax.Array | None, ...]:
    like = _heads.logits_like(head)
    rows, options = _targets.row_targets(arguments, like, row_fn.form.classes, ignore_index)
    rows, hidden = without_ignored(rows, head.hidden)

    def half_form(steps: tuple[jax.Array | None, ...]) -> jax.Array:
        by_hidden, by_kernel, by_bias = steps
        heads = [head._replace(hidden=hidden)]
        if by_kernel is not None:
            heads.append(Head(hidden, by_kernel.astype(hidden.dtype), None))
        if by_hidden is not None:
            _, by_hidden = without_ignored(rows, by_hidden.astype(hidden.dtype))
            heads.append(Head(by_hidden, head.kernel, None))
        if by_bias is not None and head.bias is not None:
            by_bias = by_bias.astype(head.bias.dtype).astype(like.dtype)
        shared = (shaping, options, by_bias)
        total: Any = stream_reduced(row_fn, tuple(heads), rows, shared, reduction, divisor, layout, products)
        return total

    return steps if all(x is None for x in steps) else jax.grad(half_form)(steps)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def _no_labels(x: jax.Array, axis: ClassAxis) -> jax.Array:
    """The label 0 for each row, taken from the rows so that it is sharded and typed as they are."""
    return jnp.squeeze(axis.sum(jnp.zeros_like(x, jnp.int32)), axis.axis)


def _check_reduction(function: str, reduction: Any) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"jaxent.{function}: `reduction` must be 'mean' or 'sum', got {reduction!r}")


def _floating_leaves(function: str, argument: str, tree: Pytree) -> Pytree:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _arrays.floating(function, argument + jax.tree_util.keystr(path), x), tree
    )


def _check_tangents(function: str, v: Pytree, params: Pytree) -> Pytree:
    structure = jax.tree.structure(params)
    if jax.tree.structure(v) != structure:
        raise ValueError(
            f"jaxent.{function}: `v` must have the structure of `params`, {structure}, got {jax.tree.structure(v)}"
        )
    v = _floating_leaves(function, "v", v)
    for (path, x), p in zip(jax.tree_util.tree_leaves_with_path(v), jax.tree.leaves(params), strict=True):
        _arrays.check_shape(function, "v" + jax.tree_util.keystr(path), x, p.shape, "that of the parameter")
    return v


def _check_steps(
    function: str, v: Any, operands: tuple[ArrayLike | None, ...]
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """The steps of hidden states, kernel and bias; None is held fixed."""
    if not isinstance(v, tuple) or len(v) not in (2, 3):
        raise _arrays.dtype_error(function, "v", "be a tuple (v_hidden, v_kernel) or (v_hidden, v_kernel, v_bias)", v)
    steps = []
    for name, step, operand in zip(("hidden", "kernel", "bias"), (*v, None)[:3], operands, strict=True):
        if step is not None:
            step = _arrays.floating(function, f"v_{name}", step)
            if operand is None:
                raise ValueError(f"jaxent.{function}: `v_{name}` must be None, since there is no `{name}`")
            _arrays.check_shape(function, f"v_{name}", step, jnp.shape(operand), f"that of `{name}`")
        steps.append(step)
    return steps[0], steps[1], steps[2]
