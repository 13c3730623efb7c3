"""Microbatches and devices that count different numbers of labels: `WeightedSum` has the gradient of the big batch.

A mean of means weighs a part with one counted label like a full one, and is far off.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxent import WeightedSum, linear_softmax_cross_entropy

jax.config.update("jax_num_cpu_devices", 8)  # eight devices of one CPU

keys = jax.random.split(jax.random.key(0), 3)
kernel = jax.random.normal(keys[0], (16, 100))
hidden = jax.random.normal(keys[1], (8, 32, 16))  # 8 parts of 32 rows
labels = jax.random.randint(keys[2], (8, 32), 0, 100)
counted = jnp.array([32, 1, 16, 0, 3, 32, 8, 2])[:, None]
labels = jnp.where(jnp.arange(32) < counted, labels, -100)  # the rest is ignored


def part_loss(kernel, hidden, labels):
    part = linear_softmax_cross_entropy(hidden, kernel, labels, reduction="sum_and_weight")
    assert isinstance(part, WeightedSum)
    return part.total, part


# Gradient accumulation: add up the gradients of totals, and divide once, by the weight of all parts.
def accumulate(carry, microbatch):
    gradients, losses = carry
    gradient, loss = jax.grad(part_loss, has_aux=True)(kernel, *microbatch)
    return (gradients + gradient, losses + loss), None


zero = jnp.zeros_like(kernel), WeightedSum(jnp.zeros(()), jnp.zeros(()))
(gradients, losses), _ = jax.lax.scan(accumulate, zero, (hidden, labels))
accumulated = gradients / losses.weight


# Data parallel: add up the totals and weights of all devices, and take the mean of that.
def device_loss(kernel, hidden, labels):
    return jax.lax.psum(part_loss(kernel, hidden, labels)[1], "data").mean()


with jax.set_mesh(jax.make_mesh((8,), ("data",))):
    split = jax.device_put((hidden, labels), P("data"))
    sharded = jax.shard_map(device_loss, in_specs=(P(), P("data"), P("data")), out_specs=P())
    parallel = jax.jit(jax.grad(sharded))(kernel, *split)

each_mean = jax.vmap(linear_softmax_cross_entropy, in_axes=(0, None, 0))
mean_of_means = jax.grad(lambda kernel: each_mean(hidden, kernel, labels).mean())(kernel)

big_batch = jax.grad(linear_softmax_cross_entropy, argnums=1)(hidden, kernel, labels)
for name, gradient in {"accumulated": accumulated, "data parallel": parallel, "mean of means": mean_of_means}.items():
    error = jnp.linalg.norm(jax.device_get(gradient) - big_batch) / jnp.linalg.norm(big_batch)
    print(f"{name}: off by {error:.0e}")
    assert error > 0.5 if name == "mean of means" else error < 1e-6
