"""Your own functions of the rows of a linear layer's logits, streamed: a reduced loss, or what each row gives."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.reduction import Reduction, WeightedSum
from jaxent._arguments.targets import (
    SoftmaxArguments,
)
from jaxent._engine.linear_head import (
    LinearCall,
    check_linear_call,
    check_row_argument,
    finite_rows,
    stream_reduced,
)
from jaxent._engine.row_blocks import row_blocks
from jaxent._engine.row_results import stream_rows
from jaxent._engine.streaming import Counted, Logits, vary_over_row_axes
from jaxent._errors import public
from jaxent._math.row_losses import weighted
from jaxent._mesh.class_axis import VocabAxis
from jaxent._mesh.types import axes_of_type, local_shape, mesh_of, pcast_like
from jaxent._typing import ArrayLike, DTypeLike


@public
def linear_loss(
    row_loss: Callable[..., Any],
    hidden: ArrayLike,
    kernel: ArrayLike,
    *row_args: Any,
    bias: ArrayLike | None = None,
    params: Any = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    has_aux: bool = False,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    chunk_rows: int | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> Any:
    r"""The reduction of your own row losses of a linear layer's logits, streamed, in their unit.

    $$L = \frac{1}{\sum_n w_n} \sum_n w_n\, \ell(z_n,\, a_n,\, \theta), \qquad z_n = \mathrm{cap}(h_n W + b) / T$$

    Value and gradient cost three matrix products, and every transformation works. Rows that do not count cost nothing.

    **Arguments:**

    - `row_loss`: `row_loss(logits, *row_args, params)` for one block of rows: `logits` is `(rows, classes)` in at least
      float32, each row argument has the block's rows first, and the result is `(rows,)`. Any differentiable JAX
      function that treats each row by itself. Without `params` it is called without them.
    - `hidden`: `(*batch, features)`; `kernel`: `(features, classes)`; `bias`: `(classes,)`.
    - `row_args`: pytrees of arrays `(*batch, ...)`; their batch axes arrive as one. `params`: any pytree of arrays that
      all rows share. The loss is differentiable with respect to both.
    - `where`, `weights`: `(*batch,)`; which rows count, and how much. `reduction`, `denominator`: as in
      `softmax_cross_entropy`.
    - `has_aux`: `row_loss` returns `(losses, aux)`, `aux` a pytree of arrays with the block's rows first. They come
      from the same pass, and are constants.
    - `soft_cap`, `temperature`, `chunk_rows`, `dtype`, `precision`: as in `linear_softmax_cross_entropy`.
    - `vocab_axis`: as there. `row_loss` sees this device's classes, and may use collectives over that axis only.

    **Returns:** as `softmax_cross_entropy`; with `has_aux` a pair of that and `aux`, each leaf `(*batch, ...)`. Where a
    row does not count, `aux` is 0, and -1 in integer leaves.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, also of what `row_loss` returns.

    A focal loss (Lin et al., 2017, equation 4), its focus learnt through `params`:

    >>> def focal(logits, labels, gamma):
    ...     log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    ...     return -((1 - jnp.exp(log_p)) ** gamma) * log_p
    >>> hidden, kernel, labels = jnp.eye(3), 2.0 * jnp.eye(3), jnp.arange(3)
    >>> linear_loss(focal, hidden, kernel, labels, params=jnp.array(2.0), reduction="sum")
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
    hidden = arrays.floating("hidden", hidden)
    call = check_linear_call(
        hidden,
        kernel,
        bias,
        SoftmaxArguments(None, where, weights, None, 0.0, 0.0),
        ignore_index=None,
        soft_cap=soft_cap,
        temperature=temperature,
        reduction=reduction,
        denominator=denominator,
        chunk_rows=chunk_rows,
        dtype=dtype,
        precision=precision,
        vocab_axis=vocab_axis,
        targets_required=False,
    )
    row_args = jax.tree.map(lambda x: check_row_argument(x, call.batch, hidden), row_args)
    program, consts, params = _program("row_loss", row_loss, call, row_args, params)
    loss, aux = _linear_loss(call, row_args, (consts, params), row_fn=_RowLoss(program, has_aux))
    return (loss, aux) if has_aux else loss


@public
def linear_rows(
    row_fn: Callable[..., Any],
    hidden: ArrayLike,
    kernel: ArrayLike,
    *row_args: Any,
    bias: ArrayLike | None = None,
    params: Any = None,
    where: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    chunk_rows: int | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> Any:
    r"""What your own function gives for each row of a linear layer's logits, streamed, in its unit.

    $$y_n = f(z_n,\, a_n,\, \theta), \qquad z_n = \mathrm{cap}(h_n W + b) / T$$

    The value costs one matrix product. A gradient costs four, since the logits are computed again in the backward pass.

    **Arguments:** `row_fn`: `row_fn(logits, *row_args, params)` for one block of rows, as the row loss of
    `linear_loss`; it returns a pytree of arrays with the block's rows first. The others as in `linear_loss`.

    **Returns:** the pytree, each leaf `(*batch, ...)`. A row with `where=False` is not computed: it is 0, and -1 in
    integer leaves.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, also of what `row_fn` returns.

    Labels drawn from the softmax by the maximum of the logits with Gumbel noise, each row with a key of its own:

    >>> def draw(logits, keys):
    ...     noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    ...     return jnp.argmax(logits + noise, axis=-1)
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> linear_rows(draw, jnp.eye(3), 99.0 * jnp.eye(3), keys)
    Array([0, 1, 2], dtype=int32)
    """
    hidden = arrays.floating("hidden", hidden)
    call = check_linear_call(
        hidden,
        kernel,
        bias,
        SoftmaxArguments(None, where, None, None, 0.0, 0.0),
        ignore_index=None,
        soft_cap=soft_cap,
        temperature=temperature,
        chunk_rows=chunk_rows,
        dtype=dtype,
        precision=precision,
        vocab_axis=vocab_axis,
        targets_required=False,
    )
    row_args = jax.tree.map(lambda x: check_row_argument(x, call.batch, hidden), row_args)
    program, consts, params = _program("row_fn", row_fn, call, row_args, params)
    return _linear_rows(call, row_args, (consts, params), row_fn=_RowResults(program))


@functools.partial(jax.jit, static_argnames=("row_fn",), inline=True)
def _linear_loss(
    call: LinearCall, row_args: Any, params: Any, *, row_fn: "_RowLoss"
) -> tuple[jax.Array | WeightedSum, Any]:
    kept, weights, dtype = call.arguments.where, call.arguments.weights, call.logits.dtype
    total_weights = jnp.ones(call.head.hidden.shape[:1], dtype)
    if weights is not None:
        weights = total_weights = weights.astype(dtype)
        usable = (weights != 0) | finite_rows(call.head.hidden)
        kept = usable if kept is None else kept & usable
    if kept is not None:
        total_weights = jnp.where(kept, total_weights, 0)
    loss: Any
    loss, aux = stream_reduced(
        row_fn,
        (call.head,),
        (row_args, weights),
        (params, call.transform),
        Counted(kept, weights),
        total_weights,
        call.reduction,
        call.divisor,
        call.chunking,
        call.products,
    )
    loss = call.batch.unflatten(loss) if call.reduction == "none" else loss
    return loss, jax.tree.map(call.batch.unflatten, aux)


@functools.partial(jax.jit, static_argnames=("row_fn",), inline=True)
def _linear_rows(call: LinearCall, row_args: Any, params: Any, *, row_fn: "_RowResults") -> Any:
    counted, shared = Counted(call.arguments.where), (params, call.transform)
    out = stream_rows(row_fn, (call.head,), row_args, shared, call.chunking, call.products, counted)
    return jax.tree.map(call.batch.unflatten, out)


# ----------------------------------------------------------------------------------------------------------------------
# The user's function as a program


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """A user's function of a block of rows, traced, with the values that it closed over made arguments.

    A derivative rule cannot see what a function closes over; as arguments, the values can be traced and differentiated.
    Programs are equal if they are spelled alike, so that an eager call finds what the last one compiled. What is not
    spelled out, a derivative rule of the function's own, shows as an address, which only the same function may change.
    """

    function: Callable[..., Any]
    argument: str
    blocks: dict[int, Any]  # jaxpr by the number of rows
    out_tree: Any
    text: str

    def __hash__(self) -> int:
        return hash((self.argument, _without_addresses(self.text)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Program) or (self.argument, self.out_tree) != (other.argument, other.out_tree):
            return False
        if self.function is other.function:
            return _without_addresses(self.text) == _without_addresses(other.text)
        return self.text == other.text

    def __call__(self, logits: jax.Array, row_args: Any, params: Any) -> Any:
        consts, params = params
        rows = logits.shape[0]
        closed = jax.extend.core.ClosedJaxpr(self.blocks[rows], consts[rows])
        out = jax.extend.core.jaxpr_as_fun(closed)(*jax.tree.leaves((logits, row_args, params)))
        return jax.tree.unflatten(self.out_tree, out)


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)


@dataclasses.dataclass(frozen=True)
class _UserFunction:
    """A user's function of a block of rows, with its result checked."""

    function: Callable[..., Any]
    argument: str
    takes_params: bool

    def __call__(self, logits: jax.Array, row_args: tuple[Any, ...], params: Any) -> Any:
        out = self.function(logits, *row_args, *([params] if self.takes_params else []))
        for x in jax.tree.leaves(out):
            if jnp.shape(x)[:1] != logits.shape[:1]:
                expected = f"return arrays with one entry for each row of its block, shape ({logits.shape[0]}, ...)"
                raise arrays.shape_error(self.argument, expected, x)
        return out


@dataclasses.dataclass(frozen=True)
class _Untraced:
    """A user's function as it is: on an explicit mesh a program keeps the mesh that it was traced with, and the engine
    runs it on each device's own rows.
    """

    function: _UserFunction

    def __call__(self, logits: jax.Array, row_args: Any, params: Any) -> Any:
        return self.function(logits, row_args, params[1])


def _program(
    argument: str,
    f: Callable[..., Any],
    linear: LinearCall,
    row_args: tuple[Any, ...],
    params: Any,
) -> tuple["_Program | _Untraced", dict[int, list[Any]], Any]:
    """The program, the values that it closed over, and the parameters."""
    head, chunking = linear.head, linear.chunking
    params = jax.tree.map(functools.partial(arrays.of_any_dtype, "params"), params)
    params = vary_over_row_axes(params, (head,), linear.products)
    call = _UserFunction(f, argument, _takes_params(f, len(row_args), params))
    blocks, consts, out_tree = {}, {}, None
    like = head.kernel
    sizes = {n: row_blocks(n, local_shape(like)[1], like) for n in chunking.block_sizes}
    for rows in dict.fromkeys([*sizes, *(n // blocks for n, blocks in sizes.items())]):
        block = jax.tree.map(lambda x: _block(rows, x, [x]), row_args)  # noqa: B023
        logits = _block(rows, linear.logits, jax.tree.leaves(head))
        closed, out = jax.make_jaxpr(call, return_shape=True)(logits, block, params)
        blocks[rows], consts[rows], out_tree = closed.jaxpr, closed.consts, jax.tree.structure(out)
    mesh = mesh_of(*jax.tree.leaves((head, row_args, params)))
    if axes_of_type(mesh, AxisType.Explicit) and not any(consts.values()):
        return _Untraced(call), {}, params
    text = "\n".join(str(jaxpr) for jaxpr in blocks.values())
    return _Program(f, argument, blocks, out_tree, text), vary_over_row_axes(consts, (head,), linear.products), params


def _block(rows: int, like: Any, others: list[jax.Array]) -> Any:
    """The shape and type of a block's rows of an array."""
    if jnp.issubdtype(like.dtype, jax.dtypes.extended):
        return jax.ShapeDtypeStruct((rows, *like.shape[1:]), like.dtype)
    return jax.eval_shape(lambda: pcast_like(jnp.zeros((rows, *like.shape[1:]), like.dtype), others))


def _takes_params(f: Callable[..., Any], num_row_args: int, params: Any) -> bool:
    """Whether to pass `params`: always if there are any, else if the function has a place for them."""
    if params is not None:
        return True
    try:
        inspect.signature(f).bind(*[None] * (1 + num_row_args))
    except TypeError:
        return True
    except ValueError:  # a callable without a signature
        pass
    return False


@dataclasses.dataclass(frozen=True)
class _RowLoss:
    """A program as the engine takes a row loss: its losses with their weights, and what goes with them."""

    program: _Program | _Untraced
    has_aux: bool

    def __call__(self, logits: Logits, rows: tuple[Any, jax.Array | None], shared: Any) -> tuple[jax.Array, Any]:
        (row_args, weights), (params, transform) = rows, shared
        z = transform(logits[0])
        out = self.program(z, row_args, params)
        losses, aux = self._parts(out) if self.has_aux else (out, None)
        if getattr(losses, "shape", None) != z.shape[:1]:
            expected = f"return one loss for each row of its block, shape ({z.shape[0]},)"
            raise arrays.shape_error("row_loss", expected, losses)
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise arrays.dtype_error("row_loss", "return floating losses", losses)
        losses = losses.astype(z.dtype)
        return losses if weights is None else weighted(weights, losses), lax.stop_gradient(aux)

    def _parts(self, out: Any) -> tuple[Any, Any]:
        if not isinstance(out, tuple) or len(out) != 2:
            raise arrays.dtype_error("row_loss", "return (losses, aux), as `has_aux` says", out)
        return out


@dataclasses.dataclass(frozen=True)
class _RowResults:
    """A program as the engine takes a function of rows."""

    program: _Program | _Untraced

    def __call__(self, logits: Logits, row_args: Any, shared: Any) -> Any:
        params, transform = shared
        return self.program(transform(logits[0]), row_args, params)
