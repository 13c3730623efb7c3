"""Laplace approximation of a last layer: which digits the model is unsure of (Daxberger et al., 2021).

Near its optimum the posterior of the kernel is a normal distribution whose precision is the curvature of the loss plus
that of the prior. `linear_ggn_diagonal` has the diagonal of the curvature, exactly and in one pass.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from jaxent import entropy, entropy_with_logits, linear_ggn_diagonal, linear_softmax_cross_entropy, nll_loss

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16), jnp.asarray(labels)
known, asked = y < 8, y >= 8  # the last two digits are never seen in training
train, new = known & (jnp.arange(len(y)) % 5 > 0), known & (jnp.arange(len(y)) % 5 == 0)
PRIOR = 1.0


def energy(kernel):
    """The negative logarithm of the posterior: a sum over the data, and the prior."""
    fit = linear_softmax_cross_entropy(x, kernel, y, where=train, ignore_index=None, reduction="sum")
    return fit + PRIOR / 2 * jnp.sum(kernel**2)


optimizer = optax.lbfgs()


def step(carry, _):
    kernel, state = carry
    value, gradient = jax.value_and_grad(energy)(kernel)
    updates, state = optimizer.update(gradient, state, kernel, value=value, grad=gradient, value_fn=energy)
    return (optax.apply_updates(kernel, updates), state), None


start = jnp.zeros((64, 8))
fitted, _ = jax.lax.scan(step, (start, optimizer.init(start)), length=60)
kernel = jnp.asarray(fitted[0])

curvature = linear_ggn_diagonal(x, kernel, where=train, reduction="sum").kernel
deviation = (curvature + PRIOR) ** -0.5
noise = jax.random.normal(jax.random.key(0), (100, *kernel.shape))
predictive = jax.nn.softmax(jnp.einsum("nd,sdk->snk", x, kernel + deviation * noise)).mean(axis=0)

point, spread = entropy_with_logits(x @ kernel), entropy(predictive)
for name, rows in (("known", new), ("unknown", asked)):
    print(f"{name} digits: {point[rows].mean():.2f} nats by the kernel alone, {spread[rows].mean():.2f} predictive")
assert spread[asked].mean() > 2 * spread[new].mean()
assert (spread - point)[asked].mean() > (spread - point)[new].mean() > 0
assert nll_loss(jnp.log(predictive), y, where=new) < 0.3
