"""Definitions in float64 NumPy that share no code with the library."""

from typing import Any

import numpy as np

Array = np.ndarray


def wide(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def log_softmax(z: Any) -> Array:
    z = wide(z)
    z = z - z.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax(z: Any) -> Array:
    return np.exp(log_softmax(z))


def nll(z: Any, labels: Any) -> Array:
    """The loss of each row."""
    return -np.take_along_axis(log_softmax(z), np.asarray(labels)[..., None], axis=-1)[..., 0]


def onehot(labels: Any, count: int) -> Array:
    return np.eye(count)[np.asarray(labels)]


def softplus(x: Any) -> Array:
    return np.logaddexp(0.0, wide(x))


def sigmoid_nll(z: Any, t: Any, pos_weight: Any = 1.0) -> Array:
    """The binary loss of each entry."""
    t = wide(t)
    return wide(pos_weight) * t * softplus(-wide(z)) + (1 - t) * softplus(z)


def kl(z_p: Any, z_q: Any) -> Array:
    """D(P||Q) of two softmaxes, for each row."""
    p, log_p, log_q = softmax(z_p), log_softmax(z_p), log_softmax(z_q)
    with np.errstate(invalid="ignore"):
        return np.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def entropy(p: Any, base: float = np.e) -> Array:
    p = wide(p)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1) / np.log(base)


def hessian_product(z: Any, v: Any) -> Array:
    """(diag p - p p^T) v for each row."""
    p, v = softmax(z), wide(v)
    return p * (v - (p * v).sum(-1, keepdims=True))
