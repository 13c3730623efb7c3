"""A flax NNX model with the loss straight from its hidden states; value and gradient are those of the dense loss."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxent import linear_softmax_cross_entropy, softmax_cross_entropy


class NextByte(nnx.Module):
    def __init__(self, width, rngs):
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.mix = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def hidden(self, tokens):
        return nnx.gelu(self.mix(self.embed(tokens)))

    def __call__(self, tokens):
        return self.head(self.hidden(tokens))


def dense_loss(model, tokens):
    return softmax_cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])


def fused_loss(model, tokens):
    hidden, head = model.hidden(tokens[:, :-1]), model.head
    return linear_softmax_cross_entropy(hidden, head.kernel[...], tokens[:, 1:], bias=head.bias[...])


@nnx.jit
def step(model, optimizer, tokens):
    loss, gradient = nnx.value_and_grad(fused_loss)(model, tokens)
    optimizer.update(model, gradient)
    return loss


text = Path(__file__).read_bytes()[:1536]
tokens = jnp.asarray(list(text)).reshape(-1, 64)  # rows of 64 bytes
model = NextByte(32, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

dense = nnx.jit(nnx.value_and_grad(dense_loss))(model, tokens)
fused = nnx.jit(nnx.value_and_grad(fused_loss))(model, tokens)
assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-7), dense, fused))

losses = [float(step(model, optimizer, tokens)) for _ in range(50)]
print(f"nats a byte: {losses[0]:.2f} before and {losses[-1]:.2f} after 50 steps")
assert losses[-1] < losses[0] / 2
