"""Digits: an optax loop inside `lax.scan`, more than 96% right on images held out, and what a label costs in bits."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from jaxent import EmpiricalRisk, self_information_with_logits, softmax_cross_entropy

images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = map(jnp.asarray, train_test_split(images / 16, labels, test_size=1 / 3, random_state=0))


def logits_of(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def loss(params, x, y):
    return softmax_cross_entropy(logits_of(params, x), y)


params = {"in": jax.random.normal(jax.random.key(0), (64, 128)) / 8, "out": jnp.zeros((128, 10))}
optimizer = optax.adamw(3e-3, weight_decay=1e-2)


def step(carry, rows) -> Any:
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params, x[rows], y[rows])
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), value


batches = jax.random.randint(jax.random.key(1), (600, 64), 0, len(x))
(params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), batches)

logits = logits_of(params, x_test)
accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == y_test)
risk = EmpiricalRisk().update(self_information_with_logits(logits)[jnp.arange(len(y_test)), y_test])
print(f"held out: {accuracy:.1%} right, {risk.mean(base=2):.3f} bits a label; {jnp.log2(10):.3f} before training")

assert jnp.allclose(losses[0], jnp.log(10))  # at first all ten classes are equally likely
assert accuracy > 0.96
assert jnp.allclose(risk.mean(), log_loss(y_test, jax.nn.softmax(logits)), rtol=1e-4)
