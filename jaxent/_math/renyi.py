"""Renyi's entropy and divergence of any order, with derivatives in closed form at every order of differentiation.

With `d = order - 1` both are `log(S / mass) / d` of a sum `S = sum_k w_k r_k**d`. Their derivatives are made of the
tilted terms `r_k**d / S`, times powers of the probabilities with small whole exponents, and the derivative of each of
those is a sum of others. So a term is computed from its logarithm, and never as a difference.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxent._math import safe
from jaxent._math.powers import power_slope
from jaxent._mesh.class_axis import row_sum

Axes = tuple[int, ...]

# From here on the distributions are rescaled to sum to one: `order * sum(p) - (order - 1) * sum(q)` has the rounding
# of two sums times the order. Heuristic: in bfloat16, where sums are 1/256 off, that is 1/16.
_RESCALED = 16

# From here on order infinity is meant: powers of the two largest probabilities that float64 tells apart differ by a
# factor of exp(2**11).
_INFINITE = 2.0**64


class _Tilt(NamedTuple):
    """`log(S / mass) / d`, and what the tilted terms are made of."""

    value: jax.Array
    log_r: jax.Array
    """`log(r_k / reference)`; 0 where `r_k` is 0 or undefined."""
    log_reference: jax.Array
    scale: jax.Array
    """`reference**d / S`."""
    exponent: jax.Array
    """`log(r_k**d mass / S)`."""


def _inner(x: jax.Array, y: jax.Array, axes: Axes) -> jax.Array:
    return row_sum(x * y, axes)


def _relative(dx: jax.Array, x: jax.Array) -> jax.Array:
    """`dx / x`, and 0 where `x` is 0."""
    return jnp.where(x == 0, 0, dx * safe.reciprocal(jnp.where(x == 0, 1, x)))


def _unless_infinite(terms: list[jax.Array], tangent: Callable[..., jax.Array], otherwise: jax.Array) -> jax.Array:
    """`tangent(*terms)`, a sum of terms times tangents, unless a term overflows.

    Then it would be nan: infinity times a tangent of 0, or less another infinity. `otherwise` says the same by a larger
    power times relative tangents, of which a further derivative would cancel.
    """
    finite = functools.reduce(jnp.logical_and, (jnp.isfinite(x) for x in terms))
    return jnp.where(finite, tangent(*(jnp.where(finite, x, 0) for x in terms)), otherwise)


def _tilt(
    total: jax.Array,
    growth: jax.Array,
    mass: jax.Array,
    log_r: jax.Array,
    log_from_reference: jax.Array,
    log_reference: jax.Array,
    d: float,
) -> _Tilt:
    """Of `total = S / reference**d`, where `S` is also `mass + growth`.

    Near order 1 `S` is nearly `mass` and its logarithm nearly 0: at d = 1e-6 `log(S) / d` has no digit. A sum below
    mass / 2 would cancel in `mass + growth`, and one beyond 3 mass / 2 might overflow there.
    """
    relative = growth / mass
    near = jnp.abs(relative) <= 0.5
    log_total = jnp.log(total / mass)
    value = jnp.where(near, jnp.log1p(jnp.where(near, relative, 0)) / d, log_reference + log_total / d)
    exponent = jnp.where(near, d * (log_r - value), d * log_from_reference - log_total)
    return _Tilt(value, log_from_reference, log_reference, 1 / total, exponent)


# ----------------------------------------------------------------------------------------------------------------------
# Entropy


def entropy(p: jax.Array, *, axes: Axes, order: float) -> jax.Array:
    if order == 0:
        return jnp.log(row_sum((p > 0).astype(jnp.int32), axes).astype(p.dtype)) + 0 * row_sum(p, axes)
    if order <= 1:
        p = jnp.where(p == 0, 0, p)  # a constant, since the derivative with respect to it has an infinite limit
    if order == 1:
        return row_sum(safe.entropy_term(p), axes) / row_sum(p, axes)
    if order >= _INFINITE:
        return -jnp.log(jnp.max(p, axis=axes, keepdims=True))
    return _entropy(p, axes, order)


def _tilted_entropy(p: jax.Array, axes: Axes, order: float) -> _Tilt:
    d, mass = order - 1, row_sum(p, axes)
    positive = jnp.where(p == 0, 1, p)
    log_p = jnp.log(positive)
    reference = jnp.max(p, axis=axes, keepdims=True) if d > 0 else jnp.ones_like(mass)
    log_r = jnp.where(p == 0, 0, safe.log_ratio(positive, reference)) if d > 0 else log_p
    # p**order as p r**d or exp(order log p): the smaller exponent has the smaller error.
    if order >= 0.5:
        terms, growth = p * jnp.exp(d * log_r), p * jnp.expm1(d * log_p)
    else:
        terms = jnp.where(p == 0, 0, jnp.exp(order * log_p))
        growth = terms - p
    return _tilt(row_sum(terms, axes), row_sum(growth, axes), mass, log_p, log_r, jnp.log(reference), d)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _entropy(p: jax.Array, axes: Axes, order: float) -> jax.Array:
    return -_tilted_entropy(p, axes, order).value


@_entropy.defjvp
def _entropy_jvp(axes, order, primals, tangents):
    (p,), (dp,) = primals, tangents
    return _entropy(p, axes, order), -_inner(_entropy_slope(p, axes, order), dp, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _entropy_slope(p: jax.Array, axes: Axes, order: float) -> jax.Array:
    """`(order p**d mass / S - 1) / (d mass)`, the derivative but for its sign."""
    slope = power_slope(_tilted_entropy(p, axes, order).exponent, order)
    return jnp.where(p == 0, 1 / (1 - order) if order > 1 else 0, slope) / row_sum(p, axes)


@_entropy_slope.defjvp
def _entropy_slope_jvp(axes, order, primals, tangents):
    (p,), (dp,) = primals, tangents
    _, d_entropy = _entropy_jvp(axes, order, primals, tangents)
    slope, (own, shared) = _entropy_slope(p, axes, order), (_entropy_term(p, axes, order, i) for i in (-1, 0))
    otherwise = shared * (_relative(dp, p) + d_entropy)
    tangent = _unless_infinite([own], lambda own: own * dp + shared * d_entropy, otherwise)
    return slope, order * tangent - slope * (row_sum(dp, axes) / row_sum(p, axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _entropy_term(p: jax.Array, axes: Axes, order: float, i: int) -> jax.Array:
    """`p**(d + i) / S`; at `p = 0` its limit, or 0 where that is infinite."""
    tilt, exponent = _tilted_entropy(p, axes, order), order - 1 + i
    term = jnp.exp(exponent * tilt.log_r + i * tilt.log_reference) * tilt.scale
    return term if exponent == 0 else jnp.where(p == 0, 0, term)


@_entropy_term.defjvp
def _entropy_term_jvp(axes, order, i, primals, tangents):
    (p,), (dp,) = primals, tangents
    exponent, term = order - 1 + i, _entropy_term(p, axes, order, i)
    d_total = order * _inner(_entropy_term(p, axes, order, 0), dp, axes)
    if exponent == 0:
        return term, -term * d_total
    lower, otherwise = _entropy_term(p, axes, order, i - 1), term * (exponent * _relative(dp, p) - d_total)
    return term, _unless_infinite([lower], lambda lower: exponent * (lower * dp) - term * d_total, otherwise)


# ----------------------------------------------------------------------------------------------------------------------
# Divergence


def divergence(p: jax.Array, q: jax.Array, *, axes: Axes, order: float) -> jax.Array:
    if 0 < order < 0.5:
        # D_a(P || Q) = a / (1 - a) D_{1-a}(Q || P): near a = 0 the terms below would cancel.
        return order / (1 - order) * divergence(q, p, axes=axes, order=1 - order)
    if order >= 1:
        poles = safe.pole(p, q)
        infinite = jnp.any(jnp.isinf(poles), axis=axes, keepdims=True)
        infinity = row_sum(poles, axes)
    else:
        infinite = ~jnp.any((p > 0) & (q > 0) | jnp.isnan(p), axis=axes, keepdims=True)
        infinity = jnp.where(infinite, jnp.inf, 0).astype(p.dtype)
    p, q = jnp.where(infinite, 1, p), jnp.where(infinite, 1, q)
    return _finite_divergence(p, q, axes, order) + infinity


def _finite_divergence(p: jax.Array, q: jax.Array, axes: Axes, order: float) -> jax.Array:
    if order == 0:
        missed, met = (row_sum(jnp.where(kept, q, 0), axes) for kept in (p == 0, p > 0))
        return _log_of_share(missed, met) + 0 * row_sum(p, axes)
    # A constant where the derivative has an infinite limit.
    if order <= 1:
        p = jnp.where(p == 0, 0, p)
    if order < 1:
        q = jnp.where(q == 0, 0, q)
    if order == 1:
        return row_sum(safe.kl_term(p, q), axes) / row_sum(p, axes)
    if order >= _INFINITE:
        support, log_r = _supported_log_ratio(p, q)
        kept = jnp.where(p == 0, -jnp.inf, jnp.where(support, log_r, p + q))
        return jnp.max(kept, axis=axes, keepdims=True)
    if order > _RESCALED:
        p, q = (safe.ratio(x, row_sum(x, axes)) for x in (p, q))
    return _divergence(p, q, axes, order)


@jax.custom_jvp
def _log_of_share(missed: jax.Array, met: jax.Array) -> jax.Array:
    """`-log(met / (missed + met))`."""
    return jnp.log1p(safe.ratio(missed, met))


@_log_of_share.defjvp
def _log_of_share_jvp(primals, tangents):
    (missed, met), (d_missed, d_met) = primals, tangents
    tangent = (d_missed - safe.ratio(missed, met) * d_met) * safe.reciprocal(missed + met)
    return _log_of_share(missed, met), tangent


def _supported_log_ratio(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where both are positive, and `log(p / q)` there, 0 elsewhere."""
    support = (p > 0) & (q > 0)
    return support, safe.log_ratio(jnp.where(support, p, 1), jnp.where(support, q, 1))


def _mass(p: jax.Array, q: jax.Array, axes: Axes, order: float) -> jax.Array:
    """`order * sum(p) + (1 - order) * sum(q)`, and 1 of rescaled distributions."""
    if order > _RESCALED:
        return jnp.ones_like(row_sum(p, axes))
    return row_sum(p, axes) + (order - 1) * row_sum(p - q, axes)


def _mass_tangent(dp: jax.Array, dq: jax.Array, axes: Axes, order: float) -> jax.Array:
    if order > _RESCALED:
        return jnp.zeros_like(row_sum(dp, axes))
    return order * row_sum(dp, axes) + (1 - order) * row_sum(dq, axes)


def _tilted_divergence(p: jax.Array, q: jax.Array, axes: Axes, order: float) -> _Tilt:
    # For orders of at least 1/2. With d = order - 1 and L = log(p / q), sum p exp(d L) = mass + the sum of
    #   growth_k = (p exp(d L) - p) - d (p - q) = d [p L + (q - p)] + p (exp(d L) - 1 - d L),
    # no term of which is negative for d > 0: it is right for d = 1e-6 as well as for P almost equal to Q.
    d, mass = order - 1, _mass(p, q, axes, order)
    support, log_r = _supported_log_ratio(p, q)
    exponents = d * log_r
    near = jnp.abs(exponents) <= 1
    kl = safe.kl_given_log_ratio(p, q, log_r)
    growth = jnp.where(
        near,
        d * kl + p * safe.exp_tail(jnp.where(near, exponents, 0)),
        p * jnp.expm1(exponents) - d * (p - q),
    )
    growth = jnp.where(support, growth, jnp.where(p == 0, d * q, -order * p))
    log_reference = jnp.zeros_like(mass)
    if d > 0:
        log_reference = jnp.max(jnp.where(support, log_r, -jnp.inf), axis=axes, keepdims=True)
    from_reference = jnp.where(support, log_r - log_reference, 0)
    total = row_sum(jnp.where(support, p, 0) * jnp.exp(d * from_reference), axes)
    return _tilt(total, row_sum(growth, axes), mass, log_r, from_reference, log_reference, d)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _divergence(p: jax.Array, q: jax.Array, axes: Axes, order: float) -> jax.Array:
    return _tilted_divergence(p, q, axes, order).value


@_divergence.defjvp
def _divergence_jvp(axes, order, primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    in_p, in_q = (slope(p, q, axes, order) for slope in (_slope_in_p, _slope_in_q))
    return _divergence(p, q, axes, order), order * _inner(in_p, dp, axes) + _inner(in_q, dq, axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _slope_in_p(p: jax.Array, q: jax.Array, axes: Axes, order: float) -> jax.Array:
    """`(r**d mass / S - 1) / (d mass)`: the derivative with respect to `p`, divided by the order."""
    d = order - 1
    slope = jnp.expm1(_tilted_divergence(p, q, axes, order).exponent) / d
    slope = jnp.where((p > 0) & (q > 0), slope, jnp.where((p == 0) & (d < 0), 0, -1 / d))
    return slope / _mass(p, q, axes, order)


@_slope_in_p.defjvp
def _slope_in_p_jvp(axes, order, primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    _, d_value = _divergence_jvp(axes, order, primals, tangents)
    d_mass = _mass_tangent(dp, dq, axes, order) / _mass(p, q, axes, order)
    slope = _slope_in_p(p, q, axes, order)
    in_p, in_q, shared = (_divergence_term(p, q, axes, order, *at) for at in ((-1, 0), (0, -1), (0, 0)))
    otherwise = shared * (_relative(dp, p) - _relative(dq, q) - d_value)
    tangent = _unless_infinite([in_p, in_q], lambda x, y: x * dp - y * dq - shared * d_value, otherwise)
    return slope, tangent - slope * d_mass


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _slope_in_q(p: jax.Array, q: jax.Array, axes: Axes, order: float) -> jax.Array:
    """`1 / mass - r**order / S`: the derivative with respect to `q`."""
    support, log_r = _supported_log_ratio(p, q)
    slope = -jnp.expm1(_tilted_divergence(p, q, axes, order).exponent + log_r)
    slope = jnp.where(support, slope, jnp.where((p == 0) & ((q > 0) | (order > 1)), 1, 0))
    return slope / _mass(p, q, axes, order)


@_slope_in_q.defjvp
def _slope_in_q_jvp(axes, order, primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    _, d_value = _divergence_jvp(axes, order, primals, tangents)
    d_mass = _mass_tangent(dp, dq, axes, order) / _mass(p, q, axes, order)
    slope = _slope_in_q(p, q, axes, order)
    in_p, in_q, shared = (_divergence_term(p, q, axes, order, *at) for at in ((0, -1), (1, -2), (1, -1)))
    otherwise = shared * (order * (_relative(dq, q) - _relative(dp, p)) + (order - 1) * d_value)
    d_shared = (order - 1) * shared * d_value
    tangent = _unless_infinite([in_p, in_q], lambda x, y: order * (y * dq - x * dp) + d_shared, otherwise)
    return slope, tangent - slope * d_mass


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def _divergence_term(p: jax.Array, q: jax.Array, axes: Axes, order: float, i: int, j: int) -> jax.Array:
    """`p**(d + i) q**(j - d) / S`; at `p = 0` its limit, or 0 where that is infinite or `q = 0` too."""
    d, tilt = order - 1, _tilted_divergence(p, q, axes, order)
    log_p, log_q = (jnp.log(jnp.where(x > 0, x, 1)) for x in (p, q))
    own = jnp.where(p == 0, (j - d) * log_q - d * tilt.log_reference, d * tilt.log_r + i * log_p + j * log_q)
    defined = (q > 0) & ((p > 0) | (d + i == 0))
    return jnp.where(defined, jnp.exp(own) * tilt.scale, jnp.where(jnp.isnan(p), p, 0))


@_divergence_term.defjvp
def _divergence_term_jvp(axes, order, i, j, primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    d = order - 1
    term, in_p, in_q = (_divergence_term(p, q, axes, order, *at) for at in ((i, j), (0, 0), (1, -1)))
    d_total = order * _inner(in_p, dp, axes) - d * _inner(in_q, dq, axes)
    varied = [(k, at, dx) for k, at, dx in ((d + i, (i - 1, j), dp), (j - d, (i, j - 1), dq)) if k != 0]
    lower = [_divergence_term(p, q, axes, order, *at) for _, at, _ in varied]
    otherwise = term * ((d + i) * _relative(dp, p) + (j - d) * _relative(dq, q) - d_total)

    def tangent(*lower: jax.Array) -> jax.Array:
        return sum([k * (x * dx) for (k, _, dx), x in zip(varied, lower, strict=True)], -term * d_total)

    return term, _unless_infinite(lower, tangent, otherwise) if lower else -term * d_total
