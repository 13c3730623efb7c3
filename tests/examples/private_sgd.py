"""DP-SGD (Abadi et al., 2016) of a language model's head: sequences clipped one by one, noise added to their sum.

`linear_gradient_norms(per="sequence")` has the norms without a gradient for each sequence ("ghost clipping", Li et al.,
2022); the clipped sum is then one more ordinary gradient, whose weights are what clipping leaves of each sequence.
"""

import jax
import jax.numpy as jnp

from jaxent import linear_gradient_norms, linear_softmax_cross_entropy

SEQUENCES, TOKENS, FEATURES, WORDS = 16, 12, 8, 50
CLIP, NOISE, RATE = 2.0, 0.5, 0.5

keys = jax.random.split(jax.random.key(0), 3)
hidden = jax.random.normal(keys[0], (SEQUENCES, TOKENS, FEATURES))
labels = jnp.argmax(hidden @ jax.random.normal(keys[1], (FEATURES, WORDS)), axis=-1)
labels = jnp.where(jnp.arange(TOKENS) < jnp.arange(3, 3 + SEQUENCES)[:, None], labels, -100)  # of unequal lengths


def clipped_sum(kernel):
    norms = linear_gradient_norms(hidden, kernel, labels, per="sequence")
    kept = jnp.minimum(1, CLIP / norms.kernel)
    weights = jnp.broadcast_to(kept[:, None], labels.shape)

    def loss(kernel):
        return linear_softmax_cross_entropy(hidden, kernel, labels, weights=weights, reduction="sum")

    return jax.grad(loss)(kernel), kept


@jax.jit
def step(kernel, key):
    total, kept = clipped_sum(kernel)
    noise = NOISE * CLIP * jax.random.normal(key, kernel.shape)
    return kernel - RATE * (total + noise) / SEQUENCES, jnp.mean(kept < 1)


kernel, clipped = jnp.zeros((FEATURES, WORDS)), 0.0
before = linear_softmax_cross_entropy(hidden, kernel, labels)
for key in jax.random.split(keys[2], 30):
    kernel, clipped = step(kernel, key)
after = linear_softmax_cross_entropy(hidden, kernel, labels)
print(f"{before:.2f} nats a word before, {after:.2f} after 30 private steps; {clipped:.0%} of the sequences clipped")
assert after < before - 0.5

one_by_one = jnp.zeros_like(kernel)
for h, y in zip(hidden, labels, strict=True):
    gradient = jax.grad(lambda w: linear_softmax_cross_entropy(h, w, y, reduction="sum"))(kernel)  # noqa: B023
    one_by_one += gradient * jnp.minimum(1, CLIP / jnp.linalg.norm(gradient))
assert jnp.allclose(clipped_sum(kernel)[0], one_by_one, atol=1e-5)
