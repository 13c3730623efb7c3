"""The maximum of a row and the sum of its exponentials, in one reduction that reads the logits once."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._mesh.class_axis import ClassAxis
from jaxent._mesh.types import pcast_like

Partial = tuple[jax.Array, jax.Array]


def largest_and_others(z: jax.Array, label: jax.Array, classes: ClassAxis) -> Partial:
    """The row maximum `m` over all devices, and this device's sum of `exp(z_k - m)` without the label.

    Both without the class axis, as `label` is. Milakov and Gimelshein (2018), "Online normalizer calculation for
    softmax": two parts of a row, each counted from its own maximum, are added up from the larger of the two.
    """
    counts = jnp.where(classes.is_class(jnp.expand_dims(label, classes.axis), z), 0, jnp.ones_like(z))
    nothing = (jnp.array(-jnp.inf, z.dtype), jnp.array(0, z.dtype))
    start = tuple(pcast_like(x, [z, counts]) for x in nothing)
    own, others = lax.reduce((z, pcast_like(counts, [z])), start, _combine, (classes.axis % z.ndim,))
    if classes.mesh_axis is None:
        return own, others
    largest = lax.pmax(own, classes.mesh_axis)
    return largest, others * jnp.exp(own - largest)


def _combine(a: Partial, b: Partial) -> Partial:
    (m_a, s_a), (m_b, s_b) = a, b
    # Where both maxima are -inf, or +inf, their difference is nan.
    smaller = jnp.where(m_a == m_b, 1, jnp.exp(-jnp.abs(m_a - m_b)))
    return jnp.maximum(m_a, m_b), jnp.where(m_a >= m_b, s_a + s_b * smaller, s_a * smaller + s_b)
