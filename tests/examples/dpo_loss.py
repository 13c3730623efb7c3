"""DPO (Rafailov et al., 2023, equation 7) from hidden states: four matrix products, and never the logits.

The loss couples the tokens of two answers, so that each token's log-probability is needed before any gradient is known:
the logits are computed once more on the way back. Checked against the formula in float64 NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxent import linear_softmax_cross_entropy

PAIRS, TOKENS, FEATURES, WORDS, BETA = 4, 12, 16, 1000, 0.1


def sequence_log_prob(hidden, kernel, labels):
    """`log pi(y | x)` per answer; tokens labelled -100, the prompt and the padding, count nothing."""
    return -linear_softmax_cross_entropy(hidden, kernel, labels, reduction="none").sum(axis=-1)


def dpo_loss(hidden, kernel, labels, reference):
    """`hidden (2, pairs, tokens, features)`: the chosen answers, then the rejected; `reference (2, pairs)`."""
    chosen, rejected = sequence_log_prob(hidden, kernel, labels) - reference
    return -jnp.mean(jax.nn.log_sigmoid(BETA * (chosen - rejected)))


def dpo_in_numpy(hidden, kernel, labels, reference):
    """Value and gradient with respect to the kernel."""
    logits = hidden @ kernel
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    kept = labels >= 0
    onehot = np.eye(WORDS)[np.maximum(labels, 0)] * kept[..., None]
    log_prob = np.sum(np.log(p) * onehot, axis=(-2, -1)) - reference
    margin = BETA * (log_prob[0] - log_prob[1])
    slope = -BETA / (1 + np.exp(margin)) / PAIRS * np.array([1.0, -1.0])[:, None]
    by_logits = slope[..., None, None] * (onehot - p * kept[..., None])
    return np.log1p(np.exp(-margin)).mean(), np.einsum("apth,aptv->hv", hidden, by_logits)


rng = np.random.default_rng(0)
hidden = rng.normal(size=(2, PAIRS, TOKENS, FEATURES))
kernel, old_kernel = (rng.normal(size=(FEATURES, WORDS)) / 4 for _ in range(2))
labels = np.where(np.arange(TOKENS) < 4, -100, rng.integers(0, WORDS, (2, PAIRS, TOKENS))).astype(np.int32)

hidden, kernel, old_kernel = (jnp.float32(x) for x in (hidden, kernel, old_kernel))
reference = sequence_log_prob(hidden, old_kernel, labels)  # of a frozen policy: a constant
step = jax.value_and_grad(dpo_loss, argnums=(0, 1))
value, (_, by_kernel) = jax.jit(step)(hidden, kernel, labels, reference)
products = str(jax.make_jaxpr(step)(hidden, kernel, labels, reference)).count("dot_general[")
print(f"loss {value:.4f}, {products} matrix products")
assert products == 4
want = dpo_in_numpy(np.float64(hidden), np.float64(kernel), labels, np.float64(reference))
assert np.allclose(value, want[0], rtol=1e-5)
assert np.allclose(by_kernel, want[1], rtol=1e-3, atol=1e-6)
