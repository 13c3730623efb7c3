"""An equinox model, its embedding tied to its head, on padded words; value and gradient are those of the dense loss."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from jaxent import linear_softmax_cross_entropy, softmax_cross_entropy

WORDS = ["entropy", "divergence", "bit", "nat", "surprise", "code", "likelihood"]


class NextLetter(eqx.Module):
    embedding: jax.Array
    cell: eqx.nn.GRUCell

    def __init__(self, letters, width, key):
        key_embedding, key_cell = jax.random.split(key)
        self.embedding = jax.random.normal(key_embedding, (letters, width)) / width**0.5
        self.cell = eqx.nn.GRUCell(width, width, key=key_cell)

    def __call__(self, word):
        def read(state, letter):
            state = self.cell(self.embedding[letter], state)
            return state, state

        return jax.lax.scan(read, jnp.zeros(self.cell.hidden_size), word)[1]


def dense_loss(model, words, targets):
    return softmax_cross_entropy(jax.vmap(model)(words) @ model.embedding.T, targets)


def fused_loss(model, words, targets):
    return linear_softmax_cross_entropy(jax.vmap(model)(words), model.embedding.T, targets)


codes = [[ord(letter) - 96 for letter in word] + [0] for word in WORDS]  # 0 begins and ends a word
padded = jnp.array([code + [-100] * (12 - len(code)) for code in codes])  # -100 is what the losses ignore
data = jnp.pad(padded[:, :-1].clip(min=0), ((0, 0), (1, 0))), padded
model = NextLetter(27, 32, jax.random.key(0))

dense, fused = (eqx.filter_jit(eqx.filter_value_and_grad(loss)) for loss in (dense_loss, fused_loss))
close = jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-7), dense(model, *data), fused(model, *data))
assert jax.tree.all(close)

optimizer = optax.adam(1e-2)
state, losses = optimizer.init(eqx.filter(model, eqx.is_array)), []
for _ in range(100):
    loss, gradient = fused(model, *data)
    updates, state = optimizer.update(gradient, state)
    model = eqx.apply_updates(model, updates)
    losses.append(loss)
print(f"nats a letter: {losses[0]:.2f} before and {losses[-1]:.2f} after {len(losses)} steps")
assert losses[-1] < losses[0] / 4
