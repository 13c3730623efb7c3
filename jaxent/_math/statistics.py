"""Statistics of a row of logits, from one pass over its classes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._math import softmax
from jaxent._math.label_loss import INVALID, label_loss
from jaxent._math.row_losses import RowTargets
from jaxent._mesh.class_axis import ClassAxis
from jaxent._serialization import exportable


@exportable
class TokenStatistics(NamedTuple):
    """Statistics of each row from one pass over the logits, in nats; None for those that were not asked for."""

    log_prob: jax.Array | None
    """`log p_y`, differentiable; nan for a label out of range."""
    log_normalizer: jax.Array
    """`logsumexp(z)`, differentiable."""
    entropy: jax.Array
    """`-sum_k p_k log p_k`, differentiable."""
    argmax: jax.Array
    """The first class with the highest logit, int32; -1 for a row without a softmax."""
    rank: jax.Array | None
    """How many classes score strictly higher than the label, int32; -1 for a label out of range."""
    top_log_probs: jax.Array | None
    """The `top_k` highest log-probabilities, in falling order, on a new last axis."""
    top_classes: jax.Array | None
    """Their classes, int32."""


def row_statistics(z: jax.Array, rows: RowTargets, classes: ClassAxis, top_k: int) -> TokenStatistics:
    """`TokenStatistics` of the rows; of an ignored one 0 in floating and -1 in integer fields, whatever it holds."""
    # Written once, so that comparisons see the same logits; the `where` below is exact, however often XLA computes it.
    written = lax.optimization_barrier(lax.stop_gradient(z))
    z = jnp.where(rows.ignored, 0, z)
    row = softmax.normalizer(z, classes)
    usable = jnp.isfinite(row.rest)
    log_prob = rank = top_log_probs = top_classes = None

    def per_row(x: jax.Array) -> jax.Array:
        return jnp.squeeze(x, classes.axis)

    if rows.labels is not None:
        log_prob = per_row(-label_loss(z, rows.labels, rows.ignored, classes)[0])
        label_logit = lax.stop_gradient(classes.take(z, rows.labels))
        higher = classes.sum((lax.stop_gradient(z) > label_logit).astype(jnp.int32))
        rank = per_row(jnp.where(usable & (rows.labels != INVALID), higher, -1))
    # Each logit is compared with the very maximum, not with one that XLA recomputes and rounds differently.
    own = jnp.where(rows.ignored, 0, written)
    argmax = per_row(jnp.where(usable, classes.min_index(own == classes.max(own)), -1))
    if top_k:
        top_z, top_classes = classes.top(z, top_k)
        first = jnp.moveaxis(row.shift, classes.axis, -1), jnp.moveaxis(row.log_total, classes.axis, -1)
        top_log_probs = (top_z - first[0]) - first[1]
        top_classes = jnp.where(jnp.moveaxis(usable, classes.axis, -1), top_classes, -1)
    statistics = TokenStatistics(
        log_prob,
        per_row(row.shift + softmax.log_total(z, row, classes)),
        per_row(softmax.entropy(z, classes)),
        argmax,
        rank,
        top_log_probs,
        top_classes,
    )
    ignored = per_row(rows.ignored)

    def unless_ignored(x: jax.Array) -> jax.Array:
        nothing = 0 if jnp.issubdtype(x.dtype, jnp.floating) else -1
        return jnp.where(ignored.reshape(ignored.shape + (1,) * (x.ndim - ignored.ndim)), nothing, x)

    return jax.tree.map(unless_ignored, statistics)
