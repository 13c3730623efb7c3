"""Sophia's estimate of the curvature (Liu et al., 2023, algorithm 2): the squared gradient at labels that are drawn.

With labels from the model the squared gradient of a mean over B rows, times B, has the diagonal of the Gauss-Newton
matrix as its expectation: Gauss-Newton-Bartlett. `linear_rows` draws a label for each row, the maximum of its logits
with Gumbel noise, without holding the logits. The second moment of such gradients is the true Fisher matrix.
"""

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits

from jaxent import linear_ggn_diagonal, linear_rows, linear_softmax_cross_entropy

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images[:256] / 16), jnp.asarray(labels[:256])


def draw(logits, keys):
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + noise, axis=-1)


def drawn_labels(kernel, key):
    return linear_rows(draw, x, kernel, jax.random.split(key, len(x)))


def curvature(kernel, key):
    gradient = jax.grad(linear_softmax_cross_entropy, argnums=1)(x, kernel, drawn_labels(kernel, key))
    return len(x) * gradient**2


@jax.jit
def step(kernel, moments, count):
    momentum, scale = moments
    gradient = jax.grad(linear_softmax_cross_entropy, argnums=1)(x, kernel, y)
    momentum = 0.9 * momentum + 0.1 * gradient
    scale = 0.9 * scale + 0.1 * curvature(kernel, jax.random.fold_in(jax.random.key(1), count))
    return kernel - 0.3 * jnp.clip(momentum / jnp.maximum(0.1 * scale, 1e-6), -1, 1), (momentum, scale)


kernel = jnp.zeros((64, 10))
moments = kernel, kernel
for count in range(40):
    kernel, moments = step(kernel, moments, count)
loss = linear_softmax_cross_entropy(x, kernel, y)
print(f"{loss:.1e} nats after 40 steps")
assert loss < 1e-2

keys = jax.random.split(jax.random.key(2), 2000)
kernel = kernel / 4  # where no class has nearly everything
estimate = jax.lax.map(lambda key: curvature(kernel, key), keys, batch_size=50).mean(axis=0)
exact = linear_ggn_diagonal(x, kernel).kernel
print(f"the mean of {len(keys)} estimates is off by {jnp.linalg.norm(estimate - exact) / jnp.linalg.norm(exact):.1%}")
assert jnp.linalg.norm(estimate - exact) < 0.1 * jnp.linalg.norm(exact)
