"""The maximum of a row and the sum of its exponentials, in one reduction that reads the logits once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._mesh.class_axis import ClassAxis
from jaxent._mesh.types import pcast_like

Partial = tuple[jax.Array, jax.Array]


def largest_and_others(z: jax.Array, label: jax.Array, classes: ClassAxis) -> Partial:
    """The row maximum `m` over all devices, and this device's sum of `exp(z_k - m)` without the label.

    Both without the class axis, as `label` is. Milakov and Gimelshein (2018), "Online normalizer calculation for
    softmax": two parts of a row, each counted from its own maximum, are added up from the larger of the two.
    """
    # In the derivative of a scan JAX drops the rule of the loss and differentiates this reduction, which it cannot if
    # an operand does not depend on the logits.
    one = jnp.where(np.False_, z, 1)
    counts = jnp.where(classes.is_class(jnp.expand_dims(label, classes.axis), z), 0, one)
    nothing = (jnp.array(-jnp.inf, z.dtype), jnp.array(0, z.dtype))
    start = tuple(pcast_like(x, [z, counts]) for x in nothing)
    own, others = lax.reduce((z, pcast_like(counts, [z])), start, _combine, (classes.axis % z.ndim,))
    if classes.mesh_axis is None:
        return own, others
    largest = lax.pmax(lax.stop_gradient(own), classes.mesh_axis)
    return largest, others * jnp.exp(own - largest)


def _combine(a: Partial, b: Partial) -> Partial:
    """Of two equal maxima the derivative follows the first: in the sums, too, which are counted from it."""
    (m_a, s_a), (m_b, s_b) = a, b
    first = m_a >= m_b
    # Where both maxima are -inf, or +inf, their difference is nan.
    gap = jnp.where((m_a == m_b) & jnp.isinf(m_a), 0, jnp.where(first, m_b - m_a, m_a - m_b))
    smaller = jnp.exp(gap)
    return jnp.where(first, m_a, jnp.maximum(m_a, m_b)), jnp.where(first, s_a + s_b * smaller, s_a * smaller + s_b)
