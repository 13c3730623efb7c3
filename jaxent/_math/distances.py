"""Terms of the distances between two distributions."""

import jax
import jax.numpy as jnp

from jaxent._math import safe


@jax.custom_jvp
def _hellinger(p: jax.Array, q: jax.Array) -> jax.Array:
    # From p - q, which is exact where the square roots would cancel.
    return jnp.square((p - q) / (jnp.sqrt(p) + jnp.sqrt(q))) / 2


@_hellinger.defjvp
def _hellinger_jvp(primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    return _hellinger(p, q), (_missing_root(p, q) * dp + _missing_root(q, p) * dq) / 2


@jax.custom_jvp
def _missing_root(p: jax.Array, q: jax.Array) -> jax.Array:
    """`1 - sqrt(q / p)` of positive numbers."""
    root_p = jnp.sqrt(p)
    return (p - q) / (root_p + jnp.sqrt(q)) / root_p


@_missing_root.defjvp
def _missing_root_jvp(primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    return _missing_root(p, q), safe.root_ratio(q, p) * (dp * safe.reciprocal(p) - dq * safe.reciprocal(q)) / 2


def hellinger_term(p: jax.Array, q: jax.Array) -> jax.Array:
    """`(sqrt(p) - sqrt(q))**2 / 2`; at 0, derivative 0 with respect to that operand."""
    dropped = (p == 0) | (q == 0)
    term = _hellinger(jnp.where(dropped, 1, p), jnp.where(dropped, 1, q))
    alone = jnp.where(p == 0, jnp.where(q == 0, 0, q), p) / 2
    return jnp.where(dropped, alone, term)


def root(x: jax.Array) -> jax.Array:
    """The square root; 0, with derivative 0, at 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
