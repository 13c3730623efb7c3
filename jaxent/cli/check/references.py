"""What the losses should return: their definitions in NumPy, in the widest float it has, with the gradients by hand.

Nothing here imports JAX or the library's mathematics. Each function gives the sum over rows; reductions scale it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
WIDE = np.longdouble


@dataclasses.dataclass(frozen=True)
class Exact:
    """A value and its gradients with respect to the arguments."""

    value: Any
    gradients: tuple[Array, ...]
    sizes: tuple[Array, ...]
    """What rounding is measured by: the absolute terms of an entry where they cancel, 0 where they do not."""
    value_size: Any = 0.0

    def __mul__(self, factor: Any) -> "Exact":
        gradients, sizes = (tuple(x * factor for x in xs) for xs in (self.gradients, self.sizes))
        return Exact(self.value * factor, gradients, sizes, self.value_size * factor)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The softmax of rows, each part without cancellation."""

    p: Array
    rest: Array
    """`1 - p`."""
    nll: Array
    lse: Array

    @classmethod
    def of(cls, z: Array) -> "Softmax":
        top = z.max(-1, keepdims=True)
        e = np.exp(z - top)
        others = np.sum(e[..., None, :] * (1 - np.eye(z.shape[-1])), axis=-1)
        total = e + others
        with np.errstate(divide="ignore"):
            return cls(
                e / total, others / total, np.log1p(others / e), (top + np.log(e.sum(-1, keepdims=True)))[..., 0]
            )


def cross_entropy_rows(z: Array, shares: Array, weights: Array, z_loss: float, cancels: bool) -> Exact:
    """`sum_n w_n (sum_k s_nk nll_nk + zeta lse_n^2)`; `cancels` if a row has more than one share."""
    s = Softmax.of(z)
    w, lse = weights[:, None], s.lse[:, None]
    mass = shares.sum(-1, keepdims=True)
    value = np.sum(w * np.where(shares == 0, 0, shares * np.where(shares == 0, 0, s.nll)))
    value += np.sum(weights * z_loss * s.lse**2)
    gradient = w * ((mass - shares) * s.p - shares * s.rest + 2 * z_loss * lse * s.p)
    size = w * ((mass + 2 * z_loss * abs(lse)) * s.p + shares)
    return Exact(value, (gradient,), (size if cancels else 0 * size,))


def picked_rows(log_p: Array, shares: Array, weights: Array) -> Exact:
    """`-sum_n w_n sum_k s_nk log p_nk` of log-probabilities as they are."""
    gradient = -weights[:, None] * shares
    return Exact(np.sum(gradient * log_p), (gradient,), (0 * gradient,))


def sigmoid_rows(z: Array, t: Array, weights: Array, positive: Array) -> Exact:
    """`sum w (c t softplus(-z) + (1 - t) softplus(z))`."""
    up, down = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    value = np.sum(weights * (positive * t * np.log1p(np.exp(-z)) + (1 - t) * np.log1p(np.exp(z))))
    parts = weights * (1 - t) * up, weights * positive * t * down
    return Exact(value, (parts[0] - parts[1],), (parts[0] + parts[1],))


def log_normalizer_rows(z: Array) -> Exact:
    s = Softmax.of(z)
    return Exact(s.lse.sum(), (s.p,), (0 * s.p,), np.abs(z).max() + s.lse.sum())


def entropy_rows(z: Array) -> Exact:
    """`-sum_k p_k log p_k` of softmax rows, with derivative `p_k (nll_k - H)`."""
    s = Softmax.of(z)
    h = np.sum(s.p * s.nll, axis=-1, keepdims=True)
    return Exact(h.sum(), (s.p * (s.nll - h),), (s.p * (s.nll + h),))


def divergence_rows(z_p: Array, z_q: Array) -> Exact:
    """`sum D(P || Q)` of softmax rows, with respect to both logits."""
    p, q = Softmax.of(z_p), Softmax.of(z_q)
    ratio = q.nll - p.nll
    d = np.sum(p.p * ratio, axis=-1, keepdims=True)
    sizes = p.p * (np.abs(ratio) + d + p.nll + q.nll), p.p + q.p
    return Exact(d.sum(), (p.p * (ratio - d), q.p - p.p), sizes, np.sum(p.p * (p.nll + q.nll)))


def cross_entropy_of_logits(z_p: Array, z_q: Array) -> Exact:
    """`-sum_k p_k log q_k` of softmax rows, with respect to both logits."""
    p, q = Softmax.of(z_p), Softmax.of(z_q)
    h = np.sum(p.p * q.nll, axis=-1, keepdims=True)
    sizes = p.p * (q.nll + h + p.nll), p.p + q.p
    return Exact(h.sum(), (p.p * (q.nll - h), q.p - p.p), sizes)


def jensen_shannon_rows(z_p: Array, z_q: Array, mixture: float) -> Exact:
    """`sum b D(P || M) + (1 - b) D(Q || M)`, `M = b P + (1 - b) Q`."""
    p, q = Softmax.of(z_p), Softmax.of(z_q)
    nll_m = -np.log(mixture * p.p + (1 - mixture) * q.p)
    value, gradients, sizes, total = WIDE(0), [], [], WIDE(0)
    for share, s in ((WIDE(mixture), p), (WIDE(1 - mixture), q)):
        ratio = nll_m - s.nll
        d = np.sum(s.p * ratio, axis=-1, keepdims=True)
        value += share * d.sum()
        gradients.append(share * s.p * (ratio - d))
        sizes.append(share * s.p * (np.abs(ratio) + d + nll_m + s.nll))
        total += share * np.sum(s.p * (nll_m + s.nll))
    return Exact(value, tuple(gradients), tuple(sizes), total)


# ----------------------------------------------------------------------------------------------------------------------
# From hidden states


@dataclasses.dataclass(frozen=True)
class Cap:
    """`s tanh(x / s) / T` of logits; None and 1 leave them alone."""

    soft_cap: float | None = None
    temperature: float = 1.0

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """The logits and their derivative."""
        if self.soft_cap is None:
            return x / self.temperature, np.full_like(x, 1 / WIDE(self.temperature))
        t = np.tanh(x / self.soft_cap)
        return self.soft_cap * t / self.temperature, (1 - t * t) / self.temperature


def through_heads(rows: Callable[..., Exact], heads: tuple[tuple[Array, ...], ...], cap: Cap) -> Exact:
    """A function of logits, by (hidden, kernel) or (hidden, kernel, bias) of each of its heads."""
    logits = [head[0] @ head[1] + (head[2] if len(head) > 2 else 0) for head in heads]
    shaped = [cap(x) for x in logits]
    exact = rows(*(z for z, _ in shaped))
    # The logits are exact binary fractions unless they are shaped: then an ulp of a logit is one of the loss.
    spread = 1 + (max(np.abs(z).max() for z, _ in shaped) if cap != Cap() else 0)
    gradients, sizes, value_size = [], [], exact.value_size
    for head, (_, slope), by_logits, size in zip(heads, shaped, exact.gradients, exact.sizes, strict=True):
        dx, size = by_logits * slope, np.maximum(np.abs(by_logits), size) * slope * spread
        gradients += [dx @ head[1].T, head[0].T @ dx, dx.sum(0)][: len(head)]
        sizes += [size @ np.abs(head[1]).T, np.abs(head[0]).T @ size, size.sum(0)][: len(head)]
        value_size = value_size + (np.sum(size) if cap != Cap() else 0)
    return Exact(exact.value, tuple(gradients), tuple(sizes), value_size)


# ----------------------------------------------------------------------------------------------------------------------
# Measures of distributions


def entropy(p: Array) -> Exact:
    terms = -np.log(p)
    return Exact(np.sum(p * terms), (terms - 1,), (terms + 1,))


def cross_entropy(p: Array, q: Array) -> Exact:
    return Exact(-np.sum(p * np.log(q)), (-np.log(q), -p / q), (0 * p, 0 * q))


def kl_divergence(p: Array, q: Array) -> Exact:
    """With `q - p` in each term, as documented: off the simplex it is in the gradient with respect to `q`."""
    return Exact(np.sum(p * np.log(p / q) + (q - p)), (np.log(p / q), 1 - p / q), (0 * p, 0 * q))


def jensen_shannon(p: Array, q: Array) -> Exact:
    m = (p + q) / 2
    value = np.sum(p * np.log(p / m) + q * np.log(q / m)) / 2
    return Exact(value, (np.log(p / m) / 2, np.log(q / m) / 2), (0 * p, 0 * q))


def kl_div(log_q: Array, p: Array) -> Exact:
    """`sum p (log p - log q)` over the batch, by `log q`."""
    p, count = p.astype(WIDE), WIDE(len(p))
    gradient = -p / count
    value, size = (np.sum(p * (np.log(p) * sign - log_q)) / count for sign in (1, -1))
    return Exact(value, (gradient,), (0 * gradient,), size)
