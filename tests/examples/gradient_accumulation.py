"""Gradient accumulation in a scan whose memory does not grow: take the gradient inside the step, not of the scan."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxent import WeightedSum, linear_softmax_cross_entropy

ROWS, FEATURES, WORDS = 64, 32, 4096


def total(kernel, hidden, labels):
    part = linear_softmax_cross_entropy(hidden, kernel, labels, reduction="sum_and_weight")
    return part.total, part


def accumulated(kernel, hidden, labels):
    """The mean loss of all microbatches and its gradient: totals are added up, and divided once."""

    def step(carry, microbatch):
        gradient, loss = jax.grad(total, has_aux=True)(kernel, *microbatch)
        return jax.tree.map(jnp.add, carry, (gradient, loss)), None

    nothing = jnp.zeros_like(kernel), WeightedSum()
    (gradient, loss), _ = jax.lax.scan(step, nothing, (hidden, labels))
    return loss.mean(), gradient / loss.weight


def scanned(kernel, hidden, labels):
    """The same, differentiated from outside the scan."""

    def mean(kernel):
        _, parts = jax.lax.scan(lambda _, batch: (None, total(kernel, *batch)[1]), None, (hidden, labels))
        return jax.tree.map(jnp.sum, parts).mean()

    return jax.value_and_grad(mean)(kernel)


def temporaries(step, count):
    like = kernel, jnp.zeros((count, ROWS, FEATURES)), jnp.zeros((count, ROWS), jnp.int32)
    analysis: Any = jax.jit(step).lower(*like).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


keys = jax.random.split(jax.random.key(0), 3)
kernel = jax.random.normal(keys[0], (FEATURES, WORDS))
hidden = jax.random.normal(keys[1], (8, ROWS, FEATURES))
words = jax.random.randint(keys[2], (8, ROWS), 0, WORDS)
labels = jnp.where(jnp.arange(ROWS) < 8 * jnp.arange(1, 9)[:, None], words, -100)
big_batch = jax.value_and_grad(linear_softmax_cross_entropy, argnums=1)(hidden, kernel, labels)
for a, b in zip(jax.jit(accumulated)(kernel, hidden, labels), big_batch, strict=True):
    assert jnp.allclose(a, b, rtol=1e-4, atol=1e-7)

for step in (accumulated, scanned):
    print(f"{step.__name__}: {temporaries(step, 4):.1f} MiB for 4 microbatches, {temporaries(step, 32):.1f} for 32")
assert temporaries(accumulated, 32) < 1.1 * temporaries(accumulated, 4)
assert temporaries(scanned, 32) > 2 * temporaries(scanned, 4)
