"""A flax NNX trainer in mixed precision, fully sharded over eight devices: each holds an eighth of every parameter.

The model runs on an automatic mesh, as flax's layers want it. The loss is told how its arguments are split: it gathers
the head once per step, in bfloat16, and the head's float32 gradient comes back as a reduce-scatter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jaxent import linear_softmax_cross_entropy

SPLIT = PartitionSpec("fsdp")
jax.config.update("jax_num_cpu_devices", 8)  # eight devices of one CPU


class NextByte(nnx.Module):
    def __init__(self, width, rngs: nnx.Rngs):  # float32 parameters, bfloat16 activations
        self.embed = nnx.Embed(256, width, rngs=rngs, dtype=jnp.bfloat16)
        self.mix = nnx.Linear(width, width, rngs=rngs, dtype=jnp.bfloat16)
        self.head = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (width, 256)))

    def hidden(self, tokens):
        return nnx.gelu(self.mix(self.embed(tokens)))


def loss(model, tokens):
    head_loss: Any = functools.partial(linear_softmax_cross_entropy, dtype=jnp.bfloat16)
    head_loss = jax.sharding.explicit_axes(head_loss, in_sharding=(SPLIT,) * 3)
    return head_loss(model.hidden(tokens[:, :-1]), model.head[...], tokens[:, 1:])


@nnx.jit
def step(model, optimizer, tokens):
    value, gradient = nnx.value_and_grad(loss)(model, tokens)
    optimizer.update(model, gradient)
    return value


with jax.set_mesh(jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))):
    model = NextByte(64, nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), SPLIT))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    tokens = jax.device_put(jnp.asarray(list((__doc__ or "").encode()[:320])).reshape(16, 20), SPLIT)

    program = nnx.jit(nnx.value_and_grad(loss)).lower(model, tokens).compile().as_text() or ""
    losses = [float(step(model, optimizer, tokens)) for _ in range(30)]

print(f"nats a byte: {losses[0]:.2f} before and {losses[-1]:.2f} after 30 steps")
assert losses[-1] < losses[0] / 2
assert "reduce-scatter(" in program
for x in jax.tree.leaves((nnx.state(model), nnx.state(optimizer))):
    assert x.ndim == 0 or x.addressable_shards[0].data.size == x.size / 8, x.sharding
