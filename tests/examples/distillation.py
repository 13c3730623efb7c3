"""Distillation (Hinton et al., 2015): a student that sees no label reads digits nearly as well as its teacher."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jaxent import kl_divergence, linear_kl_divergence, linear_softmax_cross_entropy

TEMPERATURE = jnp.array(4.0)
images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = map(jnp.asarray, train_test_split(images / 16, labels, test_size=1 / 3, random_state=0))


def init(key, width):
    return {"in": jax.random.normal(key, (64, width)) / 8, "out": jnp.zeros((width, 10))}


def hidden(params, x):
    return jnp.tanh(x @ params["in"])


def fit(loss, params):
    def step(carry, _) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    optimizer = optax.adam(1e-2)
    return jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0]


def teacher_loss(params):
    return linear_softmax_cross_entropy(hidden(params, x), params["out"], y)


def student_loss(params):
    heads = hidden(teacher, x), teacher["out"], hidden(params, x), params["out"]
    return TEMPERATURE**2 * linear_kl_divergence(*heads, temperature=TEMPERATURE)


def dense_loss(params):
    p, q = (jax.nn.softmax(hidden(net, x) @ net["out"] / TEMPERATURE) for net in (teacher, params))
    return TEMPERATURE**2 * jnp.mean(kl_divergence(p, q))


teacher = fit(teacher_loss, init(jax.random.key(0), 64))
student = fit(student_loss, init(jax.random.key(1), 16))
got, want = (jax.value_and_grad(loss)(student) for loss in (student_loss, dense_loss))
assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-3, atol=1e-5), got, want))

right = [jnp.mean(jnp.argmax(hidden(net, x_test) @ net["out"], axis=-1) == y_test) for net in (teacher, student)]
print(f"held out: teacher {right[0]:.1%}, student {right[1]:.1%} right")
assert right[1] > right[0] - 0.03
