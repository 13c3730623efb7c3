"""What the information measures should return: their definitions in mpmath, and derivatives by differences of those.

Nothing here imports jax or the library. Probabilities come as NumPy vectors, already rounded to the tested dtype; every
entry is an exact `mpf`. Where the library documents what it does off the simplex, the formula has that term; it is
exactly 0 for probabilities that sum to exactly one, which the tests draw as multiples of a power of two.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
from oracles import exact, rounded

# A divergence of 1e-15 loses 15 digits in its sum, a logit gap of 200 nats 87; differences take their own on top.
DIGITS = 120
DIFFERENCE_DIGITS = 100  # so that a step of 1e-100 stays above 0 at 1e-60
Measure = Callable[..., Any]


def _log_ratio(a: Any, b: Any) -> Any:
    return mpmath.inf if b == 0 else mpmath.log(a / b)


def self_information(p: list) -> list:
    return [mpmath.inf if x == 0 else -mpmath.log(x) for x in p]


def entropy(p: list) -> Any:
    return -mpmath.fsum(x * mpmath.log(x) for x in p if x)


def perplexity(p: list) -> Any:
    return mpmath.exp(entropy(p))


def cross_entropy(p: list, q: list) -> Any:
    return -mpmath.fsum(x * (mpmath.log(y) if y else -mpmath.inf) for x, y in zip(p, q, strict=True) if x)


def kl_divergence(p: list, q: list) -> Any:
    textbook = mpmath.fsum(x * _log_ratio(x, y) for x, y in zip(p, q, strict=True) if x)
    return textbook + (mpmath.fsum(q) - mpmath.fsum(p))


def jensen_shannon_divergence(p: list, q: list, weight: float = 0.5) -> Any:
    return generalized_jensen_shannon_divergence(p, q, weights=[weight, 1 - mpmath.mpf(weight)])


def generalized_jensen_shannon_divergence(*distributions: list, weights: list) -> Any:
    shares = [mpmath.mpf(w) / mpmath.fsum(weights) for w in weights]
    mixture = [mpmath.fsum(map(mpmath.fmul, shares, column)) for column in zip(*distributions, strict=True)]
    return mpmath.fsum(w * kl_divergence(p, mixture) for w, p in zip(shares, distributions, strict=True))


def total_variation_distance(p: list, q: list) -> Any:
    return mpmath.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


def hellinger_distance(p: list, q: list) -> Any:
    return mpmath.sqrt(mpmath.fsum((mpmath.sqrt(x) - mpmath.sqrt(y)) ** 2 for x, y in zip(p, q, strict=True)) / 2)


def renyi_entropy(p: list, order: float) -> Any:
    mass = mpmath.fsum(p)
    if order == 0:
        return mpmath.log(sum(x > 0 for x in p))
    if order == 1:
        return entropy(p) / mass
    if order == np.inf:
        return -mpmath.log(max(p))
    exponent = mpmath.mpf(order)
    return mpmath.log(mpmath.fsum(x**exponent for x in p if x) / mass) / (1 - exponent)


def renyi_divergence(p: list, q: list, order: float) -> Any:
    pairs = [(x, y) for x, y in zip(p, q, strict=True) if x]
    if order >= 1 and any(y == 0 for _, y in pairs):
        return mpmath.inf
    if order == 1:
        return kl_divergence(p, q) / mpmath.fsum(p)
    if order == np.inf:
        return max(mpmath.log(x / y) for x, y in pairs)
    a = mpmath.mpf(order)
    if order > 16:
        p, q = ([x / mpmath.fsum(v) for x in v] for v in (p, q))
        pairs = [(x, y) for x, y in zip(p, q, strict=True) if x]
    mass = 1 if order > 16 else a * mpmath.fsum(p) + (1 - a) * mpmath.fsum(q)
    total = mpmath.fsum(x**a * y ** (1 - a) for x, y in pairs if y)
    return mpmath.inf if total == 0 else mpmath.log(total / mass) / (a - 1)


def tsallis_entropy(p: list, order: float) -> Any:
    if order == 1:
        return entropy(p)
    exponent = mpmath.mpf(order)
    return mpmath.fsum(x - x**exponent for x in p if x) / (exponent - 1)


def conditional_entropy(p: list, columns: int, known: int) -> Any:
    """`p` is the joint distribution row by row; `known` is 0 if the row is known, 1 if the column is."""
    groups = (
        [p[i : i + columns] for i in range(0, len(p), columns)]
        if known == 0
        else [p[j::columns] for j in range(columns)]
    )
    return entropy(p) - entropy([mpmath.fsum(g) for g in groups])


def mutual_information(p: list, columns: int) -> Any:
    rows = [mpmath.fsum(p[i : i + columns]) for i in range(0, len(p), columns)]
    cols = [mpmath.fsum(p[j::columns]) for j in range(columns)]
    return kl_divergence(p, [x * y for x in rows for y in cols])


def conditional_mutual_information(p: list, rows: int, columns: int) -> Any:
    """`p` is the table with the classes of Z last, laid end to end."""
    depth = len(p) // (rows * columns)
    cell = {at: p[n] for n, at in enumerate(np.ndindex(rows, columns, depth))}

    def marginal(*kept: int) -> dict:
        sums: dict = {}
        for at, x in cell.items():
            key = tuple(at[i] for i in kept)
            sums[key] = sums.get(key, 0) + x
        return sums

    of_xz, of_yz, of_z = marginal(0, 2), marginal(1, 2), marginal(2)
    return mpmath.fsum(v * mpmath.log(v * of_z[z,] / (of_xz[x, z] * of_yz[y, z])) for (x, y, z), v in cell.items() if v)


def variation_of_information(p: list, columns: int) -> Any:
    return conditional_entropy(p, columns, 0) + conditional_entropy(p, columns, 1)


def normalized_mutual_information(p: list, columns: int, normalizer: str = "mean") -> Any:
    h = entropy(p)
    h_y, h_x = (h - conditional_entropy(p, columns, known) for known in (1, 0))
    sizes = {
        "mean": (h_x + h_y) / 2,
        "min": min(h_x, h_y),
        "max": max(h_x, h_y),
        "geometric": mpmath.sqrt(h_x * h_y),
        "joint": h,
    }
    return mutual_information(p, columns) / sizes[normalizer]


# ----------------------------------------------------------------------------------------------------------------------


def value(measure: Measure, *vectors: np.ndarray, **options: Any) -> Any:
    """The measure of NumPy vectors, rounded to float64 once."""
    with mpmath.workdps(DIGITS):
        return rounded(measure(*(exact(v) for v in vectors), **options))


def by_row(measure: Measure, *arrays: np.ndarray, **options: Any) -> np.ndarray:
    """The measure of each vector on the last axis."""
    batch = arrays[0].shape[:-1]
    flat = [value(measure, *(a[n] for a in arrays), **options) for n in np.ndindex(batch)]
    return np.array(flat, dtype=np.float64).reshape(batch + np.shape(flat[0] if flat else 0))


def of_logits(measure: Measure) -> Measure:
    """The same measure, of the softmax of its arguments."""

    def measure_of_logits(*logits: list) -> Any:
        return measure(*(_softmax(z) for z in logits))

    return measure_of_logits


def _softmax(z: list) -> list:
    top = max(z)
    powers = [mpmath.exp(v - top) for v in z]
    total = mpmath.fsum(powers)
    return [v / total for v in powers]


def _partial(measure: Measure, vectors: Sequence[list], entries: Sequence[tuple[int, int]]) -> Any:
    """The derivative with respect to each of the entries, by differences; mpmath takes twice the digits for them."""
    entries = sorted(entries)
    points = list(dict.fromkeys(entries))

    def moved(*numbers: Any) -> Any:
        changed = [list(v) for v in vectors]
        for (i, k), x in zip(points, numbers, strict=True):
            changed[i][k] = x
        return measure(*changed)

    return mpmath.diff(moved, tuple(vectors[i][k] for i, k in points), tuple(entries.count(at) for at in points))


def _entries(vectors: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    return [(i, k) for i, v in enumerate(vectors) for k in range(len(v))]


def gradient(measure: Measure, *vectors: np.ndarray) -> np.ndarray:
    """All first derivatives, the vectors laid end to end."""
    with mpmath.workdps(DIFFERENCE_DIGITS):
        numbers = [exact(v) for v in vectors]
        return rounded([_partial(measure, numbers, [at]) for at in _entries(vectors)])


def hessian(measure: Measure, *vectors: np.ndarray) -> np.ndarray:
    """All second derivatives, the vectors laid end to end."""
    return _second_derivatives(measure, vectors)


def third(measure: Measure, at: int, *vectors: np.ndarray) -> np.ndarray:
    """The derivative of the whole Hessian with respect to one entry, counted through the vectors laid end to end."""
    return _second_derivatives(measure, vectors, _entries(vectors)[at])


def _second_derivatives(measure: Measure, vectors: Any, *further: Any) -> np.ndarray:
    entries = _entries(vectors)
    result = np.zeros((len(entries), len(entries)))
    with mpmath.workdps(DIFFERENCE_DIGITS):
        numbers = [exact(v) for v in vectors]
        for a, first in enumerate(entries):
            for b, second in enumerate(entries[: a + 1]):
                result[a, b] = result[b, a] = float(_partial(measure, numbers, [first, second, *further]))
    return result


def above_zero(*vectors: np.ndarray) -> list[np.ndarray]:
    """Every 0 moved to 1e-60, where a derivative is as good as its limit, if there is one."""
    return [np.where(v == 0, 1e-60, v.astype(np.float64)) for v in vectors]
