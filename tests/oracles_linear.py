"""What the losses from hidden states should return: their formulas in float64 NumPy, derivatives written out by hand.

Nothing here imports jax or the library. Arguments are the arrays as the library sees them, rounded to the tested dtype.
Beside every gradient comes its size, the sum of the absolute values of its terms, which is what rounding is measured
against.
"""

import dataclasses
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def f64(x: Any) -> Any:
    return None if x is None else np.asarray(x, np.float64)


def log_normalizer(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=-1, keepdims=True)
    return top + np.log(np.sum(np.exp(z - top), axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Head:
    """`z = cap(h W + b) / T`, and the way back from a gradient with respect to `z`."""

    hidden: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None = None
    soft_cap: float | None = None
    temperature: float = 1.0

    @property
    def raw(self) -> np.ndarray:
        z = f64(self.hidden) @ f64(self.kernel)
        return z if self.bias is None else z + f64(self.bias)

    @property
    def logits(self) -> np.ndarray:
        z = self.raw
        if self.soft_cap is not None:
            z = self.soft_cap * np.tanh(z / self.soft_cap)
        return z / self.temperature

    def gradients(self, dz: np.ndarray, size: np.ndarray) -> tuple[Arrays, Arrays]:
        """The gradients with respect to all that the logits come from, and their sizes; `size` is that of `dz`."""
        raw, z, steps = self.raw, self.logits, []
        for d in (dz, size):
            d_raw = d / self.temperature
            out = {"temperature": np.sum((d if d is size else -d) * (np.abs(z) if d is size else z)) / self.temperature}
            if self.soft_cap is not None:
                t = np.tanh(raw / self.soft_cap)
                by_cap = t - raw / self.soft_cap * (1 - t**2)
                if d is size:
                    by_cap = np.abs(t) + np.abs(raw / self.soft_cap)
                out["soft_cap"] = np.sum(d_raw * by_cap)
                d_raw = d_raw * (1 - t**2)
            if self.bias is not None:
                out["bias"] = d_raw.sum(axis=0)
            h, w = (np.abs(f64(x)) if d is size else f64(x) for x in (self.hidden, self.kernel))
            steps.append({"hidden": d_raw @ w.T, "kernel": h.T @ d_raw, **out})
        return steps[0], steps[1]


@dataclasses.dataclass(frozen=True)
class Result:
    """A value with the gradients of `sum(cotangent * value)` by every floating argument, and the sizes of both."""

    value: Any
    gradients: Arrays
    sizes: Arrays
    weight: float = 0.0
    value_size: Any = 0.0


def softmax_cross_entropy(
    hidden: np.ndarray,
    kernel: np.ndarray,
    targets: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    where: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    class_weights: np.ndarray | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    denominator: float | None = None,
    cotangent: Any = 1.0,
) -> Result:
    """`linear_softmax_cross_entropy` of `hidden (N, D)`; the cotangent is `(N,)` for the reduction `"none"`."""
    rows, count = hidden.shape[0], kernel.shape[1]
    by_label = np.issubdtype(targets.dtype, np.integer)
    w = np.ones(rows) if weights is None else f64(weights)
    c = np.ones(count) if class_weights is None else f64(class_weights)
    kept = np.ones(rows, bool) if where is None else where.copy()
    known = np.ones(rows, bool)
    if by_label:
        known = (targets >= 0) & (targets < count)
        if ignore_index is not None:
            kept &= targets != ignore_index
    kept &= (w != 0) | (known & np.isfinite(f64(hidden)).all(axis=-1))
    if by_label:
        onehot = np.arange(count) == targets[:, None]
        base = (1 - label_smoothing) * onehot + label_smoothing / count
        shares = label_smoothing / count * c + (1 - label_smoothing) * onehot * c
        base, shares = (np.where(known[:, None], x, np.nan) for x in (base, shares))
        counted = np.where(known, (onehot * c).sum(axis=-1), np.nan)
    else:
        base = (1 - label_smoothing) * f64(targets) + label_smoothing / count
        shares, counted, onehot = base * c, np.ones(rows), np.zeros((rows, count))
    head = Head(np.where(kept[:, None], f64(hidden), 0), kernel, bias, soft_cap, temperature)
    z = head.logits
    lse = log_normalizer(z)
    nll, p = lse - z, np.exp(z - lse)
    unweighted = np.where(kept, (shares * nll).sum(axis=-1) + z_loss * lse[:, 0] ** 2, 0)
    w_kept, counted = np.where(kept, w, 0), np.where(kept, counted, 0)
    total, weight = np.sum(w_kept * unweighted), np.sum(w_kept * counted)
    divisor = weight if denominator is None else denominator
    scale = np.ones(rows) * cotangent
    value: Any = w_kept * unweighted
    if reduction == "mean":
        scale = np.full(rows, cotangent / divisor if divisor else 0.0)
        value = total / divisor if divisor else 0.0
    elif reduction != "none":
        value = total
    # d mean / d weight: only where the sum of the weights is the divisor.
    by_weight = -value / divisor * cotangent if reduction == "mean" and denominator is None and divisor else 0.0

    factor, mass = (scale * w_kept)[:, None], shares.sum(axis=-1, keepdims=True)
    dz = np.where(kept[:, None], factor * ((mass + 2 * z_loss * lse) * p - shares), 0)
    dz_size = np.where(kept[:, None], np.abs(factor) * ((mass + 2 * z_loss * np.abs(lse)) * p + shares), 0)
    gradients, sizes = head.gradients(dz, dz_size)
    kept_nll = np.where(kept[:, None], nll, 0)
    gradients["weights"] = scale * unweighted + by_weight * counted
    sizes["weights"] = np.abs(scale * unweighted) + np.abs(by_weight * counted)
    by_class = (w_kept[:, None] * onehot * kept[:, None]).sum(axis=0) if by_label else np.zeros(count)
    kept_base = np.where(kept[:, None], base, 0)
    gradients["class_weights"] = (factor * kept_base * kept_nll).sum(axis=0) + by_weight * by_class
    sizes["class_weights"] = (np.abs(factor) * kept_base * kept_nll).sum(axis=0) + np.abs(by_weight) * by_class
    gradients["targets"] = sizes["targets"] = factor * (1 - label_smoothing) * c * kept_nll
    return Result(value, gradients, sizes, float(weight))


def token_statistics(z: np.ndarray, labels: np.ndarray) -> tuple[Arrays, dict[str, np.ndarray]]:
    """Log-probability, log-normaliser and entropy of rows of logits; and the gradients of each by its own row."""
    lse = log_normalizer(z)
    log_p, p = z - lse, np.exp(z - lse)
    entropy = -(p * log_p).sum(axis=-1, keepdims=True)
    onehot = np.arange(z.shape[-1]) == labels[:, None]
    picked = (log_p * onehot).sum(axis=-1)
    values = {"log_prob": picked, "log_normalizer": lse[:, 0], "entropy": entropy[:, 0]}
    values["rank"] = (z > (z * onehot).sum(axis=-1, keepdims=True)).sum(axis=-1)
    values["argmax"] = z.argmax(axis=-1)
    return values, {"log_prob": onehot - p, "log_normalizer": p, "entropy": -p * (log_p + entropy)}


def divergence(
    z_p: np.ndarray, z_q: np.ndarray, kind: str, mixture: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row divergences of two blocks of logits and their gradients with respect to the logits of `p` and of `q`."""
    log_p, log_q = z_p - log_normalizer(z_p), z_q - log_normalizer(z_q)
    p, q = np.exp(log_p), np.exp(log_q)
    if kind == "forward":
        losses = (p * (log_p - log_q)).sum(axis=-1)
        return losses, p * (log_p - log_q - losses[:, None]), q - p
    if kind == "reverse":
        losses = (q * (log_q - log_p)).sum(axis=-1)
        return losses, p - q, q * (log_q - log_p - losses[:, None])
    m = mixture * p + (1 - mixture) * q
    kl_p, kl_q = ((a * (log_a - np.log(m))).sum(axis=-1) for a, log_a in ((p, log_p), (q, log_q)))
    # The terms through M vanish: sum_k (dM_k / dz) M_k / M_k is the derivative of a total mass of one.
    by_p = mixture * p * (log_p - np.log(m) - kl_p[:, None])
    by_q = (1 - mixture) * q * (log_q - np.log(m) - kl_q[:, None])
    return mixture * kl_p + (1 - mixture) * kl_q, by_p, by_q
