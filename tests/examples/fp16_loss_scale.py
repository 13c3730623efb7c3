"""float16 products and flax's loss scale: float32 weights train as in float32, through steps that overflow."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from jaxent import linear_softmax_cross_entropy

WIDTH, CLASSES = 32, 256


def loss(params, tokens, dtype):
    embedding, mix, kernel = params["embedding"], params["mix"], params["kernel"]
    hidden = jax.nn.gelu(embedding[tokens[:, :-1]].astype(dtype) @ mix.astype(dtype))
    # A float32 kernel and float16 products: its gradient is float32, and never rounded on the way.
    return linear_softmax_cross_entropy(hidden, kernel, tokens[:, 1:], dtype=dtype)


def train(tokens, dtype, scale, steps=60):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embedding": (CLASSES, WIDTH), "mix": (WIDTH, WIDTH), "kernel": (WIDTH, CLASSES)}
    params = {name: jax.random.normal(key, shape) / 6 for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, scale):
        scale, finite, value, gradient = scale.value_and_grad(loss)(params, tokens, dtype)
        updates, stepped = optimizer.update(gradient, state)
        new = optax.apply_updates(params, updates), stepped
        # A step whose gradient is not finite is left out, and the scale halved.
        params, state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, state))
        return params, state, scale, value, finite

    state, losses, skipped = optimizer.init(params), [], 0
    for _ in range(steps):
        params, state, scale, value, finite = step(params, state, scale)
        losses, skipped = [*losses, float(value)], skipped + int(not finite)
    return losses, skipped


text = Path(__file__).read_bytes()[:1536]
tokens = jnp.asarray(list(text)).reshape(-1, 64)  # rows of 64 bytes

wide, _ = train(tokens, jnp.float32, DynamicScale(scale=jnp.float32(1)))
narrow, skipped = train(tokens, jnp.float16, DynamicScale(scale=jnp.float32(2.0**24)))
print(f"nats per byte: {wide[-1]:.3f} in float32, {narrow[-1]:.3f} in float16; {skipped} steps left out")
assert skipped > 0
assert narrow[-1] < narrow[0] / 2
assert abs(narrow[skipped + 40] - wide[40]) < 0.05
