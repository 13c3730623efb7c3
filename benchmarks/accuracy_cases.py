"""What `--suite accuracy` asks: cases of `jaxent check` that all can state, edges, losses of every size.

What is due comes from the definition, in NumPy's widest float.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.cases import IGNORED
from jaxent.cli.check import cases as checked
from jaxent.cli.check import references

WIDE = np.longdouble
Group = Literal["jaxent check", "edges", "sizes"]
Quantity = Literal["value", "gradient", "curvature"]
QUANTITIES: tuple[Quantity, ...] = ("value", "gradient", "curvature")
STATED = {"targets", "where", "weights", "ignore_index"}  # options that every peer has, or a line of its user's code
SIZES = 10.0 ** np.arange(-36, 4)  # from where all that a derivative is made of is a normal float32 still


@dataclass(frozen=True)
class Case:
    """The sum of the losses of float32 rows."""

    group: Group
    name: str
    logits: np.ndarray
    targets: np.ndarray
    """Labels, `IGNORED` among them, or probabilities."""
    where: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def by_label(self) -> bool:
        return np.issubdtype(self.targets.dtype, np.integer)

    @property
    def counts(self) -> np.ndarray:
        """Which rows do."""
        kept = np.ones(len(self.logits), bool) if self.where is None else self.where
        return kept & (self.targets != IGNORED) if self.by_label else kept

    @property
    def tangent(self) -> np.ndarray:
        """That curvature is multiplied by: distinct entries near 1."""
        rows, classes = self.logits.shape
        return np.float32(1) + np.random.default_rng(rows).random((rows, classes), np.float32)

    def due(self) -> dict[Quantity, tuple[np.ndarray, np.ndarray]]:
        """Each quantity, and the size of the terms that cancel in it however it is computed, 0 where none need to."""
        z, kept = self.logits.astype(WIDE), self.counts
        weights = np.ones(len(z), WIDE) if self.weights is None else self.weights.astype(WIDE)
        counted = kept & (weights != 0)
        shares, defined = self._shares()
        gradient, size, curvature, terms = (np.zeros(z.shape, WIDE) for _ in range(4))
        value, several = WIDE(0), bool(np.any(np.sum(shares != 0, axis=-1) > 1))
        with np.errstate(all="ignore"):
            for n in np.flatnonzero(counted):
                row = slice(n, n + 1)
                exact = references.cross_entropy_rows(z[row], shares[row], weights[row], 0.0, several)
                usable = bool(defined[n]) and np.isfinite(z[n].max()) and not np.any(np.isnan(z[n]))
                value += exact.value if usable else np.nan
                gradient[n] = exact.gradients[0] if usable else np.nan
                size[n] = exact.sizes[0]
                p, v = references.Softmax.of(z[row]).p[0], self.tangent[n].astype(WIDE)
                difference = v[:, None] - v[None, :]
                mass = weights[n] * shares[n].sum() * p
                curvature[n] = mass * (difference @ p) if usable else np.nan
                terms[n] = abs(mass) * (abs(difference) @ p)
        return {
            "value": (np.asarray(value), np.zeros((), WIDE)),
            "gradient": (gradient, size),
            "curvature": (curvature, terms),
        }

    def _shares(self) -> tuple[np.ndarray, np.ndarray]:
        """The target of each row as a distribution, and whether there is one."""
        if not self.by_label:
            return self.targets.astype(WIDE), np.ones(len(self.targets), bool)
        classes = self.logits.shape[1]
        labels = self.targets.astype(np.int64)
        return (labels[:, None] == np.arange(classes)).astype(WIDE), (labels >= 0) & (labels < classes)


def cases() -> Iterator[Case]:
    yield from _of_check()
    yield from _edges()
    yield from (sized(size) for size in SIZES)


def _of_check() -> Iterator[Case]:
    for case in checked.cases():
        if case.loss != "softmax_cross_entropy" or case.option.startswith(("reduction", "axis")):
            continue
        options: dict[str, Any] = case.function.args[0]  # pyright: ignore[reportFunctionMemberAccess]
        if options.keys() <= STATED:
            logits = case.args[0].astype(np.float32)
            yield Case(
                "jaxent check", case.option, logits, options["targets"], options.get("where"), options.get("weights")
            )


def _edges() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    plain = np.round(rng.normal(size=(3, 4)) * 48).astype(np.float32) / 16
    labels = np.array([1, 0, 3], np.int32)

    def with_row(row: Any) -> np.ndarray:
        return np.concatenate([plain[:2], np.array([row], np.float32)])

    nan, inf = np.nan, np.inf
    dropped = np.array([True, True, False])
    yield Case("edges", "a row of nan that `where` drops", with_row([nan] * 4), labels, where=dropped)
    yield Case("edges", "a row of nan that is ignored", with_row([nan] * 4), np.array([1, 0, IGNORED], np.int32))
    yield Case("edges", "a row of weight 0", plain, labels, weights=np.array([1, 0.5, 0], np.float32))
    yield Case("edges", "no row that counts", plain, labels, where=np.zeros(3, bool))
    for label in (4, 300, -1):
        yield Case("edges", f"label {label} of 4 classes", plain, np.array([1, 0, label], np.int32))
    yield Case("edges", "another class at -inf", with_row([-inf, 0.5, -1, 2]), labels)
    yield Case("edges", "the label at -inf", with_row([1, 0.5, -1, -inf]), labels)
    yield Case("edges", "a logit of +inf", with_row([inf, 0.5, -1, 2]), labels)
    yield Case("edges", "the label at +inf", with_row([1, 0.5, -1, inf]), labels)
    yield Case("edges", "a logit of nan", with_row([nan, 0.5, -1, 2]), labels)
    yield Case("edges", "a row of -inf", with_row([-inf] * 4), labels)
    yield Case("edges", "one class", plain[:, :1], np.zeros(3, np.int32))
    yield Case("edges", "a probability of 0 at -inf", np.array([[-inf, 0, 1]], np.float32), np.array([[0, 0.5, 0.5]]))
    narrow = np.round(rng.normal(size=(2, 1000)) * 48).astype(np.float32) / 16
    yield Case("edges", "int8 labels of 1000 classes", narrow, np.array([3, 127], np.int8))
    for shift in (1e4, -1e4):
        yield Case("edges", f"logits near {shift:g}", plain + np.float32(shift), labels)
    yield Case("edges", "logits of thousands", plain * np.float32(1000), labels)


def sized(size: float) -> Case:
    """One row of four classes with a loss of this size, up to a factor of two."""
    others = np.array([0, -0.5, -1], np.float32)
    lead = np.float32(-np.log(np.expm1(size)) if size < 1 else -size)
    return Case("sizes", f"a loss of {size:.0e}", np.concatenate([[lead], others])[None, :], np.zeros(1, np.int32))
