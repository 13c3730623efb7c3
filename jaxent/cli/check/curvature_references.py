"""What curvature products and gradient norms should be, in NumPy, with the gradients by hand.

Sizes are the same sums with every term at its absolute value: what their rounding is measured by.
"""

import numpy as np

from jaxent.cli.check.references import WIDE, Array, Exact, Softmax


def _mean(p: Array, x: Array) -> Array:
    return np.sum(p * x, axis=-1, keepdims=True)


def covariance(z: Array, u: Array, v: Array) -> Exact:
    """`sum_n u_n^T (diag p_n - p_n p_n^T) v_n`, the covariances under softmax rows, by `z`, `u` and `v`."""
    p = Softmax.of(z).p
    a, b = u - _mean(p, u), v - _mean(p, v)
    of_rows = _mean(p, a * b)
    larger_a, larger_b = abs(u) + _mean(p, abs(u)), abs(v) + _mean(p, abs(v))
    sizes = p * (larger_a * larger_b + _mean(p, larger_a * larger_b)), p * larger_b, p * larger_a
    total_size = np.sum(_mean(p, larger_a * larger_b))
    return Exact(np.sum(of_rows), (p * (a * b - of_rows), p * b, p * a), sizes, total_size)


def _through_layer(by_logits: tuple[Array, Array], hidden: Array, kernel: Array) -> tuple[tuple[Array, ...], ...]:
    """Gradients with respect to hidden states and kernel, and their sizes, from those with respect to the logits."""
    dz, size = by_logits
    spread = 1 + np.abs(hidden @ kernel).max()
    sizes = (size * spread) @ np.abs(kernel).T, np.abs(hidden).T @ (size * spread)
    return (dz @ kernel.T, hidden.T @ dz), sizes


def linear_covariance(hidden: Array, kernel: Array, steps: tuple[Array, Array]) -> Exact:
    """`sum_n (h_n U) A_n (h_n V)`, by hidden states and kernel."""
    steps = steps[0].astype(WIDE), steps[1].astype(WIDE)
    exact = covariance(hidden @ kernel, hidden @ steps[0], hidden @ steps[1])
    (by_hidden, by_kernel), (size, kernel_size) = _through_layer((exact.gradients[0], exact.sizes[0]), hidden, kernel)
    for step, gradient, its_size in zip(steps, exact.gradients[1:], exact.sizes[1:], strict=True):
        by_hidden, size = by_hidden + gradient @ step.T, size + its_size @ np.abs(step).T
    return Exact(exact.value, (by_hidden, by_kernel), (size, kernel_size), exact.value_size)


def linear_fisher(hidden: Array, kernel: Array, steps: tuple[Array, Array], labels: Array) -> Exact:
    """`sum_n <g_n, h_n U> <g_n, h_n V>`, `g = p - y`, by hidden states and kernel."""
    softmax = Softmax.of(hidden @ kernel)
    p, one_hot = softmax.p, labels[:, None] == np.arange(kernel.shape[1])
    g = np.where(one_hot, -softmax.rest, p)
    seen = [hidden @ step.astype(WIDE) for step in steps]
    slopes = [np.sum(g * s, axis=-1, keepdims=True) for s in seen]
    absolute = [_mean(p + one_hot, abs(s)) for s in seen]
    dz, size = np.zeros_like(p), np.zeros_like(p)
    for s, slope, its_size in zip(seen, slopes[::-1], absolute[::-1], strict=True):
        dz = dz + p * (s - _mean(p, s)) * slope
        size = size + p * (abs(s) + _mean(p, abs(s))) * its_size
    (by_hidden, by_kernel), (hidden_size, kernel_size) = _through_layer((dz, size), hidden, kernel)
    for step, other, its_size in zip(steps, slopes[::-1], absolute[::-1], strict=True):
        by_hidden = by_hidden + (g * other) @ step.T
        hidden_size = hidden_size + ((p + one_hot) * its_size) @ np.abs(step).T
    value, value_size = np.sum(slopes[0] * slopes[1]), np.sum(absolute[0] * absolute[1])
    return Exact(value, (by_hidden, by_kernel), (hidden_size, kernel_size), value_size)


def linear_diagonal(hidden: Array, kernel: Array, factors: Array) -> Exact:
    """`sum_jk M_jk sum_n h_nj^2 p_nk (1 - p_nk)`, by hidden states and kernel."""
    softmax = Softmax.of(hidden @ kernel)
    p, rest = softmax.p, softmax.rest
    weight = np.square(hidden) @ factors.astype(WIDE)
    slope = weight * (rest - p)
    dz, size = p * (slope - _mean(p, slope)), p * (weight + _mean(p, weight))
    (by_hidden, by_kernel), (hidden_size, kernel_size) = _through_layer((dz, size), hidden, kernel)
    own = 2 * hidden * ((p * rest) @ factors.T)
    return Exact(np.sum(weight * p * rest), (by_hidden + own, by_kernel), (hidden_size + np.abs(own), kernel_size))


def kernel_norms(hidden: Array, kernel: Array, labels: Array, by_sequence: bool) -> Exact:
    """`sum_n |h_n| |g_n|`, or `|sum_n h_n g_n^T|`, `g = p - y`, by hidden states and kernel."""
    softmax = Softmax.of(hidden @ kernel)
    p, one_hot = softmax.p, labels[:, None] == np.arange(kernel.shape[1])
    g = np.where(one_hot, -softmax.rest, p)
    if by_sequence:
        gradient = hidden.T @ g
        value = np.sqrt(np.sum(gradient**2))
        by_g, own = hidden @ gradient / value, g @ gradient.T / value
        own_size = (p + one_hot) @ np.abs(gradient).T / value
    else:
        of_g, of_hidden = (np.sqrt(np.sum(x**2, axis=-1, keepdims=True)) for x in (g, hidden))
        value = np.sum(of_g * of_hidden)
        by_g, own = of_hidden * g / of_g, of_g * hidden / of_hidden
        own_size = np.abs(own)
    dz, size = p * (by_g - _mean(p, by_g)), p * (abs(by_g) + _mean(p, abs(by_g)))
    (by_hidden, by_kernel), (hidden_size, kernel_size) = _through_layer((dz, size), hidden, kernel)
    return Exact(value, (by_hidden + own, by_kernel), (hidden_size + own_size, kernel_size), value)
