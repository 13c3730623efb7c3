"""The head of Llama 3, 128,256 words, over eight devices: neither its kernel nor its logits leave their device.

Two groups of devices share the rows, four share the words. Rows and features are few enough for a CPU; time grows with
the product of the three, memory with the kernel, and `plan` tells what the real size takes.
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxent import linear_softmax_cross_entropy, plan, softmax_cross_entropy

jax.config.update("jax_num_cpu_devices", 8)  # eight devices of one CPU
ROWS, FEATURES, WORDS = 128, 32, 128256

keys = jax.random.split(jax.random.key(0), 3)
hidden = jax.random.normal(keys[0], (ROWS, FEATURES))
kernel = jax.random.normal(keys[1], (FEATURES, WORDS)) / FEATURES**0.5
labels = jax.random.randint(keys[2], (ROWS,), 0, WORDS)


def dense_loss(hidden, kernel, labels):
    return softmax_cross_entropy(jnp.matmul(hidden, kernel, precision="highest"), labels)


def value_and_gradients(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


want = value_and_gradients(dense_loss)(hidden, kernel, labels)  # on one device, with all logits

mesh = jax.make_mesh((2, 4), ("rows", "words"))
with jax.set_mesh(mesh):
    split = jax.device_put((hidden, kernel, labels), (P("rows"), P(None, "words"), P("rows")))
    step = value_and_gradients(linear_softmax_cross_entropy).lower(*split).compile()
    got = step(*split)

assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(jax.device_get(a), b, rtol=1e-3, atol=1e-7), got, want))
assert got[1][1].sharding.spec == P(None, "words")

sent = set(re.findall(r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)", step.as_text() or ""))
print("collectives:", *sent)
assert sent == {"all-reduce"}
print("64k tokens of 4096 features, on each of 8 devices:", plan(65536 // 2, 4096, WORDS // 4))
