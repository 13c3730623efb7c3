"""What the losses should return: their definitions in mpmath, with so many digits that no care is needed.

Nothing here imports jax or the library. Arguments are NumPy arrays as the library sees them, rounded to the tested
dtype; every finite floating number is an exact `mpf`. Results are NumPy arrays of float64, rounded once at the end.

The edges follow the table of conventions: a logit of -inf deletes its class, a dropped row is 0 whatever it holds, a
row without a softmax (nan, +inf, only -inf) and a label out of range are nan.
"""

import dataclasses
from typing import Any

import ml_dtypes
import mpmath
import numpy as np

# 1e30 + 1e-38 needs 68 digits; half of what is left carries the result.
DIGITS = 120
Mpf = mpmath.mpf


def exact(x: Any) -> list:
    """A vector as exact numbers."""
    return [mpmath.mpf(float(v)) for v in np.asarray(x).tolist()]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row's loss `sum_k s_k nll_k + zeta lse^2`, times `w`, and its derivatives."""

    value: Any
    gradient: np.ndarray
    hessian: np.ndarray
    size: np.ndarray
    """The sum of the absolute terms of each gradient entry: what rounding is measured against where terms cancel."""


def has_softmax(z: np.ndarray) -> bool:
    return not np.any(np.isnan(z) | np.isposinf(z)) and bool(np.any(z > -np.inf))


def probabilities(z: np.ndarray) -> tuple[list, Any]:
    """softmax(z) and logsumexp(z)."""
    numbers = exact(z)
    top = max(numbers)
    powers = [mpmath.exp(v - top) for v in numbers]
    total = mpmath.fsum(powers)
    return [v / total for v in powers], top + mpmath.log(total)


def row(z: np.ndarray, shares: list, weight: Any = 1, zeta: Any = 0) -> Row:
    """The row loss for the share `s_k` that each class has in it."""
    count = len(z)
    if not has_softmax(z) or any(mpmath.isnan(s) for s in [*shares, weight]):
        nothing = np.full(count, np.nan)
        return Row(mpmath.nan, nothing, np.full((count, count), np.nan), nothing)
    p, lse = probabilities(z)
    value = mpmath.fsum(s * (lse - v) for s, v in zip(shares, exact(z), strict=True) if s) + zeta * lse**2
    mass = mpmath.fsum(shares)
    slope = mass + 2 * zeta * lse
    gradient = [weight * (slope * p[k] - shares[k]) for k in range(count)]
    size = [abs(weight) * ((mass + 2 * zeta * abs(lse)) * p[k] + shares[k]) for k in range(count)]
    hessian = [
        [weight * (slope * p[j] * (int(j == k) - p[k]) + 2 * zeta * p[j] * p[k]) for k in range(count)]
        for j in range(count)
    ]
    return Row(weight * value if weight else Mpf(0), rounded(gradient), rounded(hessian), rounded(size))


def rounded(x: Any) -> np.ndarray:
    return np.array(x, dtype=object).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Losses:
    """All rows of a call. `sums` are exact sums, so that a mean is rounded once."""

    losses: np.ndarray
    weights: np.ndarray
    total: float
    weight: float
    mean: float
    gradient: np.ndarray
    size: np.ndarray
    hessian: np.ndarray

    def reduced(self, reduction: str) -> Any:
        return {"mean": self.mean, "sum": self.total, "none": self.losses, "sum_and_weight": (self.total, self.weight)}[
            reduction
        ]

    def scale(self, reduction: str) -> float:
        """What the gradient of the sum is multiplied by."""
        return (1 / self.weight if self.weight else 0.0) if reduction == "mean" else 1.0


def softmax_cross_entropy(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    axis: int = -1,
    where: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    class_weights: np.ndarray | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    denominator: float | None = None,
    digits: int = DIGITS,
) -> Losses:
    """The losses of all rows, their weights, gradients and Hessians; classes come last in the derivatives' arrays."""
    z = np.moveaxis(np.asarray(logits), axis, -1)
    batch, count = z.shape[:-1], z.shape[-1]
    by_label = np.issubdtype(targets.dtype, np.integer)
    rows, row_weights = [], []
    with mpmath.workdps(digits):
        c = [Mpf(1)] * count if class_weights is None else exact(class_weights)
        smoothing, zeta = Mpf(float(label_smoothing)), Mpf(float(z_loss))
        for n in np.ndindex(batch):
            w = Mpf(1) if weights is None else Mpf(float(weights[n]))
            kept = where is None or bool(where[n])
            if by_label:
                y = int(targets[n])
                kept &= ignore_index is None or y != ignore_index
                known = 0 <= y < count
                shares = [smoothing * c[k] / count + (1 - smoothing) * c[k] * int(k == y) for k in range(count)]
                if not known:
                    shares = [mpmath.nan] * count
                counted = w * (c[y] if known else mpmath.nan)
            else:
                t = exact(np.moveaxis(targets, axis, -1)[n])
                known = True
                shares = [c[k] * ((1 - smoothing) * t[k] + smoothing / count) for k in range(count)]
                counted = w
            if not kept or (w == 0 and not (known and has_softmax(z[n]))):
                empty = np.zeros(count)
                rows.append(Row(Mpf(0), empty, np.zeros((count, count)), empty))
                row_weights.append(Mpf(0))
            else:
                rows.append(row(z[n], shares, w, zeta))
                row_weights.append(counted)
        total, weight = (mpmath.fsum(x) for x in ([r.value for r in rows], row_weights))
        divisor = weight if denominator is None else Mpf(float(denominator))
        mean = Mpf(0) if divisor == 0 else total / divisor
        return Losses(
            rounded([r.value for r in rows]).reshape(batch),
            rounded(row_weights).reshape(batch),
            rounded([total])[0],
            rounded([divisor])[0],
            rounded([mean])[0],
            np.array([r.gradient for r in rows]).reshape(*batch, count),
            np.array([r.size for r in rows]).reshape(*batch, count),
            np.array([r.hessian for r in rows]).reshape(*batch, count, count),
        )


def sigmoid_cross_entropy(z: Any, t: Any, pos_weight: Any = 1.0) -> tuple[float, float]:
    """Value and derivative of one entry."""
    with mpmath.workdps(DIGITS):
        z, t, c = Mpf(float(z)), Mpf(float(t)), Mpf(float(pos_weight))
        value = c * t * mpmath.log1p(mpmath.exp(-z)) + (1 - t) * mpmath.log1p(mpmath.exp(z))
        positive, negative = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
        return float(value), float((1 - t) * positive - c * t * negative)


def row_statistics(z: np.ndarray) -> dict[str, np.ndarray]:
    """Log-probabilities, log-normaliser and entropy of one row, and the gradients of the last two w.r.t. the logits."""
    with mpmath.workdps(DIGITS):
        p, lse = probabilities(z)
        log_p = [v - lse for v in exact(z)]
        entropy = -mpmath.fsum(a * b for a, b in zip(p, log_p, strict=True) if a)
        slope = [-a * (b + entropy) if a else Mpf(0) for a, b in zip(p, log_p, strict=True)]
        return {
            "log_p": rounded(log_p),
            "p": rounded(p),
            "log_normalizer": rounded(lse),
            "entropy": rounded(entropy),
            "entropy_gradient": rounded(slope),
        }


def long_row_nll(z: np.ndarray, label: int) -> tuple[float, np.ndarray]:
    """Value and gradient for one label in a long row of float32 logits; float64 sums have 29 more bits than they need.

    The sum leaves the label out, so that a tiny loss is as accurate as a large one.
    """
    gaps = z.astype(np.float64) - np.float64(z[label])
    powers = np.exp(gaps - max(gaps.max(), 0.0))
    others = float(np.sum(np.delete(powers, label)))
    value = np.log1p(others / powers[label])
    gradient = powers / (others + powers[label])
    gradient[label] = -others / (others + powers[label])
    return float(value), gradient


def assert_close(got: Any, want: Any, *, ulp: float, dtype: Any, size: Any = 0.0, where: Any = "") -> None:
    """Equal within `ulp` units of `dtype`'s epsilon, relative to the result (or to `size`, if that is larger).

    nan and infinities must agree exactly, and 0 is met only by 0 unless `size` says what cancelled. Below the smallest
    normal number, where some back ends flush to zero, the error is measured against that number (float16: against the
    smallest number). `where` is the row of a table that one test goes through.
    """
    got, want, size = (np.asarray(x, dtype=np.float64) for x in (got, want, size))
    at_row = f"{where}: " if where != "" else ""
    assert got.shape == want.shape, f"{at_row}shape {got.shape}, expected {want.shape}"
    plain = np.isfinite(want)
    np.testing.assert_array_equal(np.where(plain, 0, got), np.where(plain, 0, want), at_row)
    info = ml_dtypes.finfo(dtype)
    eps, least = float(info.eps), float(info.tiny)
    allowed = ulp * eps * np.maximum(np.abs(want), size)
    # float16 always has subnormals; of the others some back ends flush them to zero.
    floor = ulp * float(info.smallest_subnormal) if dtype == np.float16 else least
    allowed = np.where((want != 0) & (np.abs(want) < least), np.maximum(allowed, floor), allowed)
    error = np.abs(np.where(plain, got, 0) - np.where(plain, want, 0))
    if not np.all(error <= np.where(plain, allowed, 0)):
        excess = np.where(error > allowed, error / np.maximum(allowed, 1e-300), 0)
        at = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), error.shape)
        in_ulp = error[at] / (eps * max(abs(want[at]), 1e-300))
        raise AssertionError(
            f"{at_row}entry {at}: got {got[at]!r}, expected {want[at]!r}: {in_ulp:.3g} ulp, allowed {ulp:g}"
        )
