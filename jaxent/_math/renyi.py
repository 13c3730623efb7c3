"""Renyi's entropy and divergence of any order, each with its derivative in closed form."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._math import safe
from jaxent._mesh.class_axis import row_sum

Axes = tuple[int, ...]


def _log_mean(
    weights: jax.Array, exponents: jax.Array, excess: jax.Array, mass: jax.Array, d: float, axes: Axes
) -> jax.Array:
    """`log(S / mass) / d` of the sum `S = sum_k w_k exp(e_k)`, which is also `mass + d * excess`.

    Near order 1 `S` is nearly `mass` and its logarithm nearly 0: at d = 1e-6 `log(S) / d` has no digit. A sum below
    mass / 2 would cancel in `mass + d * excess`, and one beyond 3 mass / 2 might overflow there.
    """
    relative = d * excess / mass
    near = jnp.abs(relative) <= 0.5
    exponents = jnp.where(weights > 0, exponents, -jnp.inf)
    shift = jnp.max(lax.stop_gradient(exponents), axis=axes, keepdims=True)  # the result does not depend on it
    shift = jnp.where(jnp.isneginf(shift), 0, shift)
    far = shift + jnp.log(row_sum(weights * jnp.exp(exponents - shift), axes) / mass)
    return jnp.where(near, jnp.log1p(jnp.where(near, relative, 0)), far) / d


def entropy(p: jax.Array, *, axes: Axes, order: float) -> jax.Array:
    if order == 0:
        return jnp.log(row_sum((p > 0).astype(jnp.int32), axes).astype(p.dtype)) + 0 * row_sum(p, axes)
    if order == 1:
        return row_sum(safe.entropy_term(p), axes) / row_sum(p, axes)
    if order == float("inf"):
        return -jnp.log(jnp.max(p, axis=axes, keepdims=True))
    return _entropy(p, axes, order)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _entropy(p: jax.Array, axes: Axes, order: float) -> jax.Array:
    d = order - 1
    positive = jnp.where(p == 0, 1, p)
    excess = row_sum(jnp.where(p == 0, 0, safe.power_excess(positive, order)), axes)
    # p**order as p exp(d log p) or exp(order log p): the smaller exponent has the smaller error.
    weights, exponent = (p, d) if order >= 0.5 else (jnp.where(p == 0, 0, p / positive), order)
    return -_log_mean(weights, exponent * jnp.log(positive), excess, row_sum(p, axes), d, axes)


@_entropy.defjvp
def _entropy_jvp(axes, order, primals, tangents):
    (p,), (dp,) = primals, tangents
    value = _entropy(p, axes, order)
    slope = safe.power_entropy_slope(p, order, value) / row_sum(p, axes)
    return value, row_sum(slope * dp, axes)


def divergence(p: jax.Array, q: jax.Array, *, axes: Axes, order: float) -> jax.Array:
    if 0 < order < 0.5:
        # D_a(P || Q) = a / (1 - a) D_{1-a}(Q || P): near a = 0 the terms below would cancel.
        return order / (1 - order) * divergence(q, p, axes=axes, order=1 - order)
    if order == 0:
        missed, met = (row_sum(jnp.where(kept, q, 0), axes) for kept in (p == 0, p > 0))
        return jnp.log1p(missed / met) + 0 * row_sum(p, axes)
    if order == 1:
        return row_sum(safe.kl_term(p, q), axes) / row_sum(p, axes)
    poles = jnp.zeros_like(p)
    if order > 1:
        poles = safe.pole(p, q)
        infinite = jnp.any(jnp.isinf(poles), axis=axes, keepdims=True)
        p, q = jnp.where(infinite, 1, p), jnp.where(infinite, 1, q)
    if order == float("inf"):
        support, log_r = _supported_log_ratio(p, q)
        kept = jnp.where(p == 0, -jnp.inf, jnp.where(support, log_r, p + q))
        regular = jnp.max(kept, axis=axes, keepdims=True)
    else:
        regular = _divergence(p, q, axes, order)
    return regular + row_sum(poles, axes)


def _supported_log_ratio(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where both are positive, and `log(p / q)` there, 0 elsewhere."""
    support = (p > 0) & (q > 0)
    return support, safe.log_ratio(jnp.where(support, p, 1), jnp.where(support, q, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _divergence(p: jax.Array, q: jax.Array, axes: Axes, order: float) -> jax.Array:
    # For orders of at least 1/2. With d = order - 1 and L = log(p / q), sum p exp(d L) = mass + d * sum of
    #   excess_k = (p exp(d L) - p) / d - (p - q) = [p L + (q - p)] + p (exp(d L) - 1 - d L) / d,
    # no term of which is negative for d > 0: it is right for d = 1e-6 as well as for P almost equal to Q.
    d = order - 1
    support, log_r = _supported_log_ratio(p, q)
    exponents = d * log_r
    near = jnp.abs(exponents) <= 1
    kl = safe.kl_given_log_ratio(p, q, log_r)
    excess = jnp.where(
        near,
        kl + p * safe.exp_tail(jnp.where(near, exponents, 0)) / d,
        p * jnp.expm1(exponents) / d - (p - q),
    )
    alone = jnp.where(p == 0, q, -order / d * p)
    excess = jnp.where(support, excess, alone)
    mass = row_sum(p, axes) + d * row_sum(p - q, axes)
    return _log_mean(jnp.where(q == 0, 0, p), exponents, row_sum(excess, axes), mass, d, axes)


@_divergence.defjvp
def _divergence_jvp(axes, order, primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    d = order - 1
    value = _divergence(p, q, axes, order)
    support, log_r = _supported_log_ratio(p, q)
    by_p = order / d * jnp.expm1(d * (log_r - value))
    by_p = jnp.where(support, by_p, jnp.where((p == 0) & (d < 0), 0, -order / d))
    by_q = -jnp.expm1(order * log_r - d * value)
    by_q = jnp.where(support, by_q, jnp.where((p == 0) & ((q > 0) | (d > 0)), 1, 0))
    mass = row_sum(p, axes) + d * row_sum(p - q, axes)
    return value, row_sum(by_p * dp + by_q * dq, axes) / mass
