"""Statistics of each row from one pass over the classes, of logits or straight from hidden states."""

import functools

import jax

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._arguments.targets import (
    SoftmaxArguments,
    SoftmaxCall,
    check_softmax_call,
    check_top_k,
    row_targets,
)
from jaxent._engine.linear_head import (
    LinearCall,
    LogitTransform,
    check_linear_call,
)
from jaxent._engine.row_results import stream_rows
from jaxent._engine.streaming import Logits
from jaxent._errors import public
from jaxent._math.row_losses import RowTargets
from jaxent._math.statistics import TokenStatistics, row_statistics
from jaxent._mesh.apply import map_rows
from jaxent._mesh.class_axis import (
    VocabAxis,
)
from jaxent._typing import ArrayLike, DTypeLike


@public
def token_statistics(
    logits: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = -100,
    top_k: int = 0,
    vocab_axis: VocabAxis = None,
) -> TokenStatistics:
    r"""Per-row log-probability, log-normaliser, entropy, argmax, rank and top classes, in nats.

    $$\log p_y = z_y - \mathrm{lse}(z), \quad H = -\sum_k p_k \log p_k, \quad
    \mathrm{rank} = |\{k : z_k > z_y\}|$$

    **Arguments:**

    - `logits`: `(*batch, classes)`, floating, the classes at `axis`.
    - `labels`: `(*batch,)`, integer; without them `log_prob` and `rank` are None.
    - `where`: `(*batch,)`, bool; False drops a row. `ignore_index`: rows with this label are dropped. The statistics of
      a dropped row are 0 in floating and -1 in integer fields, and its gradient is exactly 0.
    - `top_k`: how many of the best classes to return; 0 for none.
    - `vocab_axis`: the mesh axis that splits the classes, or a tuple of them, inside `jax.shard_map`.

    **Returns:** `TokenStatistics` with leaves of shape `(*batch,)`, and `(*batch, top_k)` for the top classes.
    A label out of range has log-probability nan and rank -1; a row with nan, +inf or only -inf has nan everywhere, and
    -1 for its classes.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or `top_k`.

    >>> stats = token_statistics(jnp.log(jnp.array([0.3, 0.3, 0.4])), jnp.array(0))
    >>> int(stats.argmax), int(stats.rank)
    (2, 1)
    """
    call = check_softmax_call(
        logits,
        SoftmaxArguments(labels, where, None, None, 0.0, 0.0),
        axis=axis,
        ignore_index=ignore_index,
        vocab_axis=vocab_axis,
        targets_name="labels",
        targets_required=False,
    )
    return _token_statistics(call, top_k=check_top_k(top_k, call.classes.size(call.logits)))


@functools.partial(jax.jit, static_argnames=("top_k",), inline=True)
def _token_statistics(call: SoftmaxCall, *, top_k: int) -> TokenStatistics:
    def statistics(logits: jax.Array, arguments: SoftmaxArguments) -> TokenStatistics:
        (z,) = arrays.accumulated(logits)
        rows, _ = row_targets(arguments, z, call.classes, call.ignore_index)
        return row_statistics(z, rows, call.classes, top_k)

    return map_rows(statistics, call.logits, call.arguments, without=call.classes.axis)


@public
def linear_token_statistics(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    ignore_index: int | None = -100,
    top_k: int = 0,
    chunk_rows: int | None = None,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    vocab_axis: VocabAxis = None,
) -> TokenStatistics:
    r"""`token_statistics` of the logits of a linear layer, without the logits, in nats.

    $$z_n = \mathrm{cap}(h_n W + b) / T, \qquad \mathrm{cap}(x) = s \tanh(x / s)$$

    **Arguments:** `hidden` `(*batch, features)`, `kernel` `(features, classes)`, `bias`, `soft_cap`, `temperature`,
    `chunk_rows`, `dtype`, `precision` as in `linear_softmax_cross_entropy`; `labels` `(*batch,)`, `where`,
    `ignore_index`, `top_k` and `vocab_axis` as in `token_statistics`. Dropped rows cost nothing.

    **Returns:** `TokenStatistics` with leaves `(*batch,)`, and `(*batch, top_k)` for the top classes. Log-probability,
    log-normaliser and entropy are differentiable; their gradient costs four matrix products.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or option.

    >>> stats = linear_token_statistics(jnp.ones((2, 3)), jnp.zeros((3, 4)), jnp.array([0, 3]))
    >>> stats.entropy
    Array([1.3862944, 1.3862944], dtype=float32)
    """
    call = check_linear_call(
        hidden,
        kernel,
        bias,
        SoftmaxArguments(labels, where, None, None, 0.0, 0.0),
        ignore_index=ignore_index,
        soft_cap=soft_cap,
        temperature=temperature,
        chunk_rows=chunk_rows,
        dtype=dtype,
        precision=precision,
        vocab_axis=vocab_axis,
        targets_name="labels",
        targets_required=False,
        hidden_whole=labels is None,
    )
    return _linear_token_statistics(call, top_k=check_top_k(top_k, call.classes.size(call.head.kernel)))


@functools.partial(jax.jit, static_argnames=("top_k",), inline=True)
def _linear_token_statistics(call: LinearCall, *, top_k: int) -> TokenStatistics:
    rows, _, counted = call.rows()

    def row_fn(logits: Logits, rows: RowTargets, transform: LogitTransform) -> TokenStatistics:
        return row_statistics(transform(logits[0]), rows, call.classes, top_k)

    statistics = stream_rows(row_fn, (call.head,), rows, call.transform, call.chunking, call.products, counted)
    return jax.tree.map(call.batch.unflatten, statistics)
