"""The symmetric loss of CLIP (Radford et al., 2021, figure 3) without a table of all pairs; equal to the dense one."""

import jax
import jax.numpy as jnp

from jaxent import linear_softmax_cross_entropy

PAIRS, FEATURES = 2048, 32


def clip_loss(images, texts, log_scale):
    own, temperature = jnp.arange(len(images)), jnp.exp(-log_scale)
    by_image = linear_softmax_cross_entropy(images, texts.T, own, temperature=temperature, chunk_rows=128)
    by_text = linear_softmax_cross_entropy(texts, images.T, own, temperature=temperature, chunk_rows=128)
    return jnp.mean(jnp.array([by_image, by_text]))


def dense_loss(images, texts, log_scale):
    logits = jnp.exp(log_scale) * jnp.matmul(images, texts.T, precision="highest")
    by_image = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits, axis=1)))
    by_text = -jnp.mean(jnp.diag(jax.nn.log_softmax(logits, axis=0)))
    return (by_image + by_text) / 2


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


keys = jax.random.split(jax.random.key(0))
images = unit(jax.random.normal(keys[0], (PAIRS, FEATURES)))
texts = unit(images + unit(jax.random.normal(keys[1], (PAIRS, FEATURES))))
arguments = images, texts, jnp.log(1 / 0.07)


def compiled(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()


fused, dense = compiled(clip_loss), compiled(dense_loss)
for ours, plain in zip(jax.tree.leaves(fused(*arguments)), jax.tree.leaves(dense(*arguments)), strict=True):
    assert jnp.allclose(ours, plain, rtol=1e-4, atol=1e-7)


def temporaries(program):
    return program.memory_analysis().temp_size_in_bytes


print(f"temporaries: {temporaries(fused) / 2**20:.1f} MiB, dense {temporaries(dense) / 2**20:.1f} MiB")
assert temporaries(fused) < PAIRS * PAIRS * 4 < temporaries(dense)  # less than one table of logits
