"""GRPO (Shao et al., 2024, equation 3) from hidden states: three matrix products, and never the logits.

The clipped ratio of a token needs its own log-probability alone, so that it is a row loss: its gradient is formed while
a chunk's logits are there. Checked against the formula in float64 NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxent import linear_loss, linear_token_statistics, token_statistics

ANSWERS, TOKENS, FEATURES, WORDS, CLIP = 6, 10, 16, 1000, 0.2


def clipped_ratio(logits, labels, old_log_prob, advantage):
    ratio = jnp.exp(token_statistics(logits, labels).log_prob - old_log_prob)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)


def grpo_loss(hidden, kernel, labels, old_log_prob, advantages):
    """The mean over all tokens of the answers; those labelled -100, the prompt and the padding, count nothing."""
    each = jnp.broadcast_to(advantages[:, None], labels.shape)
    return linear_loss(clipped_ratio, hidden, kernel, labels, old_log_prob, each, where=labels >= 0)


def grpo_in_numpy(hidden, kernel, labels, old_log_prob, advantages):
    """Value and gradient with respect to the kernel."""
    p = np.exp(hidden @ kernel)
    p /= p.sum(-1, keepdims=True)
    kept = labels >= 0
    onehot = np.eye(WORDS)[np.maximum(labels, 0)]
    ratio = np.exp(np.log((p * onehot).sum(-1)) - old_log_prob)
    free, clipped = ratio * advantages[:, None], np.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages[:, None]
    slope = -np.where(free <= clipped, free, 0) * kept / kept.sum()  # by the log-probability of the token
    value = -(np.minimum(free, clipped) * kept).sum() / kept.sum()
    return value, np.einsum("ath,atv->hv", hidden, slope[..., None] * (onehot - p))


rng = np.random.default_rng(0)
hidden = jnp.float32(rng.normal(size=(ANSWERS, TOKENS, FEATURES)))
kernel, old_kernel = (jnp.float32(rng.normal(size=(FEATURES, WORDS)) / 8) for _ in range(2))
labels = np.where(np.arange(TOKENS) < 3, -100, rng.integers(0, WORDS, (ANSWERS, TOKENS))).astype(np.int32)
rewards = rng.normal(size=ANSWERS)
advantages = jnp.float32((rewards - rewards.mean()) / rewards.std())  # relative to the group of answers

old_log_prob = linear_token_statistics(hidden, old_kernel, labels).log_prob
step = jax.value_and_grad(grpo_loss, argnums=(0, 1))
args = hidden, kernel, labels, old_log_prob, advantages
value, (_, by_kernel) = jax.jit(step)(*args)
products = str(jax.make_jaxpr(step)(*args)).count("dot_general[")
print(f"loss {value:.4f}, {products} matrix products")
assert products == 3
want = grpo_in_numpy(*(np.asarray(x) if x is labels else np.asarray(x, np.float64) for x in args))
assert np.allclose(value, want[0], rtol=1e-4)
assert np.allclose(by_kernel, want[1], rtol=1e-3, atol=1e-6)
