"""Logits that XLA computes anew in each use, with another rounding, are still one row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxent


@pytest.mark.grid
@pytest.mark.compiled
def test_a_constant_temperature_under_jit(rng: np.random.Generator):
    """As a constant, 1 / 0.75 became a product in one use: the maximum was left out of a sum but not counted."""
    heads = [jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32) for shape in ((8, 3), (3, 5), (8, 4), (4, 5))]

    def divergence(*heads: jax.Array):
        options = {"divergence": "jensen_shannon", "mixture": 0.25, "temperature": 0.75, "chunk_rows": 4}
        return jaxent.linear_kl_divergence(*heads, **options)

    both = jax.value_and_grad(divergence, argnums=(0, 2))
    (value, gradients), (eager, eager_gradients) = jax.jit(both)(*heads), both(*heads)
    np.testing.assert_allclose(value, eager, atol=1e-6)
    for got, want in zip(gradients, eager_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
