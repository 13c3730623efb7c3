"""Several distributions and their mixture: the terms of the Jensen-Shannon divergence.

Distributions lie along the first axis of `p`, and so do their shares `w`, which sum to one. An entry of 0 is a
constant: the derivative with respect to it has an infinite limit, and is 0 by convention.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._math import safe
from jaxent._mesh.class_axis import row_sum


def _mean(w: jax.Array, x: jax.Array) -> jax.Array:
    return row_sum(w * x, 0)


@jax.custom_jvp
def _log_over_mixture(p: jax.Array, w: jax.Array) -> jax.Array:
    """`log(p_i / m)` with `m = sum_j w_j p_j`; 0 where either is 0.

    From `p_i - m`, counted from the rounded mixture: what is left of `m` is the mean of the differences, and they know
    it to their own last digit. So distributions that differ in one bit have a divergence with all of its digits.
    """
    m = lax.optimization_barrier(_mean(w, p))  # XLA may recompute it at each use, and round it differently
    differences = p - m
    gaps = differences - _mean(w, differences)
    defined = (p > 0) & (m > 0)
    log_r = safe.log_ratio_with_gap(jnp.where(defined, p, 1), jnp.where(m > 0, m, 1), jnp.where(defined, gaps, 0))
    return jnp.where(defined, log_r, jnp.where(jnp.isnan(m), m, 0))


@_log_over_mixture.defjvp
def _log_over_mixture_jvp(primals, tangents):
    # dp_i / p_i - dm / m without what the two have in common, where p_i is nearly all of m.
    (p, w), (dp, dw) = primals, tangents
    m = _mean(w, p)
    defined = (p > 0) & (m > 0)
    own = safe.ratio(safe.sum_of_others(w * p, 0), jnp.where(defined, p, 1))
    others = _mean(w, dp) - w * dp
    tangent = ((own * dp - others) - _mean(p, dw)) * safe.reciprocal(jnp.where(defined, m, 1))
    return _log_over_mixture(p, w), jnp.where(defined, tangent, 0)


@jax.custom_jvp
def _divergences(p: jax.Array, w: jax.Array) -> jax.Array:
    """`p_i log(p_i / m) + (m - p_i)` of each distribution; 0 where `m` is 0, for what has a share of 0 then."""
    m = _mean(w, p)
    return jnp.where(p == 0, m, jnp.where(m == 0, 0, safe.kl_given_log_ratio(p, m, _log_over_mixture(p, w))))


@_divergences.defjvp
def _divergences_jvp(primals, tangents):
    (p, w), (dp, dw) = primals, tangents
    m, dm = _mean(w, p), _mean(w, dp) + _mean(p, dw)
    excess = jnp.where(m == 0, 0, safe.excess(p, jnp.where(m == 0, 1, m)))
    return _divergences(p, w), _log_over_mixture(p, w) * dp - excess * dm


@jax.custom_jvp
def _term(p: jax.Array, w: jax.Array) -> jax.Array:
    return _mean(w, _divergences(p, w))


@_term.defjvp
def _term_jvp(primals, tangents):
    # Nothing is added through `m`: with shares that sum to one, sum_i w_i (1 - p_i / m) is 0. What a share of 0 would
    # add at an infinite rate is as large as in `safe.pole`, so that a tangent of 0 stays 0.
    (p, w), (dp, dw) = primals, tangents
    big = jnp.where((p > 0) & (_mean(w, p) == 0), float(jnp.finfo(p.dtype).max), 0).astype(p.dtype)
    tangent = _mean(w, _log_over_mixture(p, w) * dp) + _mean(_divergences(p, w), dw)
    return _term(p, w), tangent + row_sum((dw * big) * big, 0)


def jensen_shannon_term(p: jax.Array, w: jax.Array) -> jax.Array:
    """`sum_i w_i p_i log(p_i / m)`, never negative, with the first axis kept."""
    return _term(jnp.where(p == 0, 0, p), w)
