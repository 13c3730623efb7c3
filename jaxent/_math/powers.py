"""Powers of probabilities with an exponent that is known: their derivatives of every order, at 0 as well.

A derivative whose limit at 0 is finite is that limit. One whose limit is infinite is 0, as for `-p log p`.
"""

import functools

import jax
import jax.numpy as jnp

from jaxent._math import safe


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(p: jax.Array, exponent: float) -> jax.Array:
    """`p**exponent`; at `p = 0` the limit, or 0 where that is infinite."""
    if exponent == 0:
        return jnp.ones_like(p)
    return jnp.where(p == 0, 0, jnp.power(jnp.where(p == 0, 1, p), exponent))


@power.defjvp
def _power_jvp(exponent, primals, tangents):
    # No product with an exponent of 0: the power of a tiny `p` may be inf.
    (p,), (dp,) = primals, tangents
    slope = jnp.zeros_like(p) if exponent == 0 else safe.bounded(exponent * power(p, exponent - 1))
    return power(p, exponent), slope * dp


def _excess(p: jax.Array, order: float) -> jax.Array:
    """`(p**order - p) / (order - 1)` for positive `p` and orders other than 1.

    Near order 1 the powers would cancel; near order 0 `p**(order - 1)` is large, and the rounding of its exponent too.
    """
    log_p = jnp.log(p)
    return (p * jnp.expm1((order - 1) * log_p) if order >= 0.5 else jnp.exp(order * log_p) - p) / (order - 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def tsallis_term(p: jax.Array, order: float) -> jax.Array:
    """`(p - p**order) / (order - 1)` for orders other than 1; 0 at `p = 0`."""
    return jnp.where(p == 0, 0, -_excess(jnp.where(p == 0, 1, p), order))


@tsallis_term.defjvp
def _tsallis_term_jvp(order, primals, tangents):
    (p,), (dp,) = primals, tangents
    return tsallis_term(p, order), _tsallis_slope(p, order) * dp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _tsallis_slope(p: jax.Array, order: float) -> jax.Array:
    """`(1 - order p**d) / d` with `d = order - 1`; at `p = 0` its limit, or 0 where that is infinite."""
    d = order - 1
    slope = -power_slope(d * jnp.log(jnp.where(p == 0, 1, p)), order)
    return jnp.where(p == 0, 1 / d if d > 0 else 0, slope)


@_tsallis_slope.defjvp
def _tsallis_slope_jvp(order, primals, tangents):
    (p,), (dp,) = primals, tangents
    curvature = jnp.zeros_like(p) if order == 0 else -safe.bounded(order * power(p, order - 2))
    return _tsallis_slope(p, order), curvature * dp


def power_slope(x: jax.Array, order: float) -> jax.Array:
    """`(order exp(x) - 1) / (order - 1)`, which is `order x / (order - 1) + 1` near order 1, where `x` is near 0."""
    d = order - 1
    near = jnp.abs(x) <= 0.5
    return jnp.where(near, order * jnp.expm1(jnp.where(near, x, 0)) / d + 1, (order * jnp.exp(x) - 1) / d)
