"""The loss of a row with a label, in one pass: what the label lacks, and the sum over the other classes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent import _numerics
from jaxent._sharding import ClassAxis
from jaxent._softmax import Normalizer, log_probabilities_jvp, shift_of

# Label codes beside the classes 0 .. C-1.
IGNORED = -1  # the row counts for nothing: loss 0, gradient 0
INVALID = -2  # out of range: loss nan, gradient nan


def label_codes(labels: jax.Array, count: int, ignore_index: int | None, kept: jax.Array | None) -> jax.Array:
    """Labels of any integer dtype as int32 classes, `IGNORED` or `INVALID`.

    Range and `ignore_index` are decided in the labels' own dtype: as int32, the uint32 label 2**32 - 100 would be -100,
    and as int8, the class count 1000 would be -24.
    """
    bounds = jnp.iinfo(labels.dtype)
    inside = labels <= min(count - 1, bounds.max)
    if bounds.min < 0:
        inside &= labels >= 0
    codes = jnp.where(inside, labels.astype(jnp.int32), INVALID)
    if ignore_index is not None and bounds.min <= ignore_index <= bounds.max:
        codes = jnp.where(labels == np.array(ignore_index, labels.dtype), IGNORED, codes)
    return codes if kept is None else jnp.where(kept, codes, IGNORED)


# Logits in a block of rows that stays in cache. Heuristic: 2 MiB; half and twice as much cost the same on two cores, an
# eighth 1.4 times as much.
BLOCK_LOGITS = 2**19
# From this many classes on blocks pay: 1.2 times optax at 4096 x 4096 against 1.3 in one sum over all rows; at 8192 x
# 1000 it is 1.4 against 1.2, at 16384 x 256 1.7 against 1.4.
BLOCK_CLASSES = 2**12


class LabelSums(NamedTuple):
    """One pass over a row with a label: the maximum, the label's logit and the sum over the other classes."""

    shift: jax.Array
    label_logit: jax.Array
    others: jax.Array


def _label_sums(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> LabelSums:
    shift = _label_shift(z, codes, classes)
    return LabelSums(shift, classes.take(z, codes), classes.sum(_other_exponentials(z, codes, shift, classes)))


def _label_shift(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> jax.Array:
    """The row maximum; 0 in ignored rows, nan for invalid labels."""
    return jnp.where(codes == IGNORED, 0, jnp.where(codes == INVALID, jnp.nan, shift_of(z, classes)))


def _other_exponentials(z: jax.Array, codes: jax.Array, shift: jax.Array, classes: ClassAxis) -> jax.Array:
    """`exp(z_k - m)`, and 0 at the label and in ignored rows, whatever they hold."""
    # One comparison: with `is_class(codes, z) | (codes == IGNORED)` the CPU back end no longer vectorises (2.8 ms
    # against 0.6 at 65536 x 10).
    reach = jnp.where(codes == IGNORED, 2**30, 0)
    left_out = jnp.abs(classes.index(z) - (codes - classes.first(z))) <= reach
    # A column that depends on the row: a scan would keep a constant block of -inf, as large as the logits.
    nothing = jnp.where(codes == IGNORED, -jnp.inf, jnp.minimum(shift, -jnp.inf))
    return jnp.exp(jnp.where(left_out, nothing, z - shift))


def _label_sums_for_value(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> LabelSums:
    """The same, when no gradient needs the exponentials, which the CPU back end would write out.

    It fuses arithmetic into a row sum, but not a comparison (8192 x 1000: twice the time). The distance between two
    classes, scaled by a power of two so that it stays exact, is 0 or at least 2**100, and no exponential exceeds 1.
    """
    if z.shape[classes.axis] >= BLOCK_CLASSES:
        return _label_sums_in_blocks(z, codes, classes)
    shift = _label_shift(z, codes, classes)
    scale = 2.0**100
    label = (codes - classes.first(z)).astype(z.dtype) * scale
    others = jnp.minimum(jnp.abs(classes.index(z, z.dtype) * scale - label), jnp.exp(z - shift))
    return LabelSums(shift, classes.take(z, codes), classes.sum(others))


def _label_sums_in_blocks(z: jax.Array, codes: jax.Array, classes: ClassAxis) -> LabelSums:
    """The same, on a CPU a few rows at a time.

    Above 2**15 classes the CPU back end does not even fuse `exp` into the row sum: 1400 ms at 4096 x 50257, against 120
    in blocks. They are strided, so that rows which are sharded stay where they are.
    """
    one_device = classes.mesh_axis is None and jax.typeof(z).sharding.mesh.empty
    known = all(isinstance(size, int) for size in z.shape)  # and not a symbol of `jax.export`
    if not one_device or not known or classes.axis != -1 or z.size <= BLOCK_LOGITS:
        return _label_sums(z, codes, classes)
    rows, count = z.size // z.shape[-1], z.shape[-1]
    size = max(n for n in range(1, max(1, BLOCK_LOGITS // count) + 1) if rows % n == 0)

    def in_blocks(z: jax.Array, codes: jax.Array) -> LabelSums:
        blocks = z.reshape(size, rows // size, count), codes.reshape(size, rows // size, 1)

        def one(i: jax.Array) -> LabelSums:
            z_i, codes_i = (lax.dynamic_index_in_dim(x, i, 1, keepdims=False) for x in blocks)
            return _label_sums(z_i, codes_i, classes)

        sums = lax.map(one, jnp.arange(rows // size, dtype=jnp.int32))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(codes.shape), sums)

    return lax.platform_dependent(z, codes, cpu=in_blocks, default=lambda z, codes: _label_sums(z, codes, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def label_nll(
    z: jax.Array, codes: jax.Array, classes: ClassAxis, beside_gradient: bool = False
) -> tuple[jax.Array, Normalizer]:
    """`-log p_y` of each row, with the row's normaliser: `(m - z_y) + log1p(r)`; both 0 in ignored rows.

    Shift first: `logsumexp(z) - z_y` at logits near 1e4 is 2.40723 where 2.40761 is due. With `beside_gradient` the
    exponentials are those that the gradient needs too.
    """
    sums = _label_sums if beside_gradient else _label_sums_for_value
    return _nll_of_sums(sums(z, codes, classes), codes, classes)


def _nll_of_sums(sums: LabelSums, codes: jax.Array, classes: ClassAxis) -> tuple[jax.Array, Normalizer]:
    """The label is a guess at the maximum.

    If it holds the maximum, the sum over the other classes is `r`. If not, `r` is that sum less what the label lacks to
    one, and may lose digits when it is small; but then `m - z_y` is the loss, and `log1p(r)` is lost in it.
    """
    # Without the class axis: the CPU back end takes twice as long over (65536, 1) as over (65536,).
    shift, label_logit, others, code = (jnp.squeeze(x, classes.axis) for x in (*sums, codes))
    others = jnp.where(others < 2.0**90, others, jnp.nan)  # a row with nan, whose sum of distances did not show it
    rest = others + (jnp.exp(label_logit - shift) - 1)
    nll = (shift - label_logit) + jnp.log1p(rest)
    nll, rest = (jnp.expand_dims(jnp.where(code == IGNORED, 0, x), classes.axis) for x in (nll, rest))
    return nll, Normalizer(sums.shift, rest)


def label_gradient(z: jax.Array, codes: jax.Array, nll: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`softmax(z) - onehot(y)`, with `-(1 - p_y) = expm1(-nll)` at the label; 0 in ignored rows, whatever they hold."""
    return jnp.where(classes.is_class(codes, z), _numerics.expm1(-nll), _other_probabilities(z, codes, row, classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _other_probabilities(z: jax.Array, codes: jax.Array, row: Normalizer, classes: ClassAxis) -> jax.Array:
    """`probabilities`, and 0 at the label and in ignored rows."""
    return _other_exponentials(z, codes, row.shift, classes) / row.total


@_other_probabilities.defjvp
def _other_probabilities_jvp(classes, primals, tangents):
    (z, codes, row), (dz, _, _) = primals, tangents
    ignored = codes == IGNORED
    z_kept, dz = jnp.where(ignored, 0, z), jnp.where(ignored, 0, dz)
    _, d_log_p = log_probabilities_jvp(classes, (z_kept, row), (dz, None))
    p = _other_probabilities(z, codes, row, classes)
    return p, p * d_log_p


@label_nll.defjvp
def _label_nll_jvp(classes, beside_gradient, primals, tangents):
    (z, codes), (dz, _) = primals, tangents
    nll, row = label_nll(z, codes, classes, True)
    d_nll = classes.sum(label_gradient(z, codes, nll, row, classes) * dz)
    exponentials = jnp.exp(jnp.where(codes == IGNORED, -jnp.inf, z - row.shift))
    return (nll, row), (d_nll, Normalizer(jnp.zeros_like(row.shift), classes.sum(exponentials * dz)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def picked(log_p: jax.Array, codes: jax.Array, classes: ClassAxis) -> jax.Array:
    """`log_p` at the label; 0 in ignored rows; nan, as is the whole row of the gradient, for an invalid label."""
    return jnp.where(codes == INVALID, jnp.nan, classes.take(log_p, codes))


@picked.defjvp
def _picked_jvp(classes, primals, tangents):
    (log_p, codes), (d_log_p, _) = primals, tangents
    # A comparison that never holds: without an operand of its shape XLA would give every device the whole gradient.
    invalid = codes == INVALID
    chosen = classes.is_class(codes, log_p) | (log_p > jnp.inf) | invalid
    # A choice, not a product with 0 and 1: a cotangent that is not finite stays with the label.
    share = jnp.where(chosen, jnp.where(invalid, jnp.nan, 1).astype(log_p.dtype) * d_log_p, 0)
    return picked(log_p, codes, classes), classes.sum(share)
