"""Which data to prune: of digits, the wrongly labelled ones have the largest gradients (Paul et al., 2021).

`linear_gradient_norms` has EL2N, `|p - y|`, and the gradient norms by the head for each example, in one pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from jaxent import linear_gradient_norms, linear_softmax_cross_entropy

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16), jnp.asarray(labels)
wrong = jax.random.bernoulli(jax.random.key(0), 0.05, y.shape)
y = jnp.where(wrong, (y + 1 + jax.random.randint(jax.random.key(1), y.shape, 0, 9)) % 10, y)  # never the right one


def hidden_of(params, x):
    return jnp.tanh(x @ params["in"])


def loss(params):
    return linear_softmax_cross_entropy(hidden_of(params, x), params["out"], y)


params = {"in": jax.random.normal(jax.random.key(2), (64, 64)) / 8, "out": jnp.zeros((64, 10))}
optimizer = optax.adam(1e-2)


def step(carry, _) -> Any:
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None


(params, _), _ = jax.lax.scan(
    step, (params, optimizer.init(params)), length=60
)  # early: before it learns them by heart

hidden = hidden_of(params, x)
norms = linear_gradient_norms(hidden, params["out"], y)
suspects = jnp.argsort(-norms.residual)[: wrong.sum()]
found = jnp.mean(wrong[suspects])
print(f"{wrong.sum()} of {len(y)} labels are wrong; so are {found:.0%} of the {wrong.sum()} with the largest norms")
assert found > 0.9

one_by_one = jax.vmap(jax.grad(linear_softmax_cross_entropy, argnums=1), in_axes=(0, None, 0))(hidden, params["out"], y)
assert jnp.allclose(norms.kernel, jnp.linalg.norm(one_by_one, axis=(1, 2)), rtol=1e-3, atol=1e-6)
