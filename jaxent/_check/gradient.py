"""Whether a gradient is right, and to how many digits: several ways to it, against each other and against float64."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxent._check.autodiff import Estimates, FlatArguments, autodiff_gradients
from jaxent._check.finite_differences import Float64Reference, evaluate
from jaxent.gradients import softmax_cross_entropy_gradient
from jaxent.losses import softmax_cross_entropy

CLOSED_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {softmax_cross_entropy: softmax_cross_entropy_gradient}
DIFFERENCES = "central differences"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The worst entry of one way to the derivative by one argument."""

    way: str
    argument: str
    index: tuple[int, ...]
    """Where in the argument; empty for a scalar, and for what is no entry."""
    got: float
    want: float
    ulp: float
    """The error in units of the dtype's epsilon, relative to the entry or to what rounding moves it by."""
    allowed: float
    """The largest `ulp` that is in bounds."""

    @property
    def ok(self) -> bool:
        return self.ulp <= self.allowed

    @property
    def place(self) -> str:
        return self.argument + (f"[{', '.join(map(str, self.index))}]" if self.index else "")

    @property
    def share(self) -> float:
        """How much of the bound is used up; above 1 it is broken."""
        if self.ulp == 0:
            return 0.0
        return self.ulp / self.allowed if self.allowed else float("inf")


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What `check_gradient` found; `str` is a table with a line for each way and argument."""

    comparisons: tuple[Comparison, ...]
    """One for each way and argument."""
    notes: tuple[str, ...]
    """What could not be compared, or only in part, and why."""

    @property
    def ok(self) -> bool:
        """Whether every comparison is in bounds."""
        return all(c.ok for c in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The comparison that is furthest out of its bounds, or nearest to them."""
        return max(self.comparisons, key=lambda c: c.share)

    @property
    def max_ulp(self) -> float:
        """The largest error in ulp, central differences apart: they are no match for the others."""
        return max((c.ulp for c in self.comparisons if c.way != DIFFERENCES), default=0.0)

    def __str__(self) -> str:
        lines = [("way", "error in ulp", "allowed", "at", "got", "reference", "")]
        for c in self.comparisons:
            cells = (f"{c.ulp:.3g}", f"{c.allowed:.3g}", c.place, f"{c.got:.9g}", f"{c.want:.9g}")
            lines.append((c.way, *cells, "" if c.ok else "OUT OF BOUNDS"))
        verdict = "in bounds" if self.ok else f"OUT OF BOUNDS: {self.worst.way} at {self.worst.place}"
        return "\n".join([*table(lines), *self.notes, verdict])


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines as columns, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def check_gradient(
    loss_fn: Callable[..., Any],
    *args: Any,
    closed_form: Callable[..., Any] | None = None,
    oracle: Any = None,
    tolerance: float | None = None,
    **options: Any,
) -> GradientReport:
    r"""Compares the ways to the gradient of a loss, in ulp: closed form, reverse, forward, differences, float64.

    The reference is `jax.grad` of the same function in float64, or `oracle`. An error is measured in units of the
    dtype's epsilon relative to the entry, or to how far a relative change of the arguments moves it, if that is more:
    $|g_i| \vee \sqrt{\sum_j (H_{ij} x_j)^2}$, a mixed forward-backward error (Higham 2002, section 1.5).

    Central differences see gross errors only, and have a bound of their own. They are taken in float64 with steps $h$
    and $2h$, for $h = \epsilon^{1/3}$ relative to the argument (Nocedal & Wright 2006, section 8.1) and for that of
    float32, and the better is kept. The bound is $|D(h) - D(2h)|$, three times the error from the curvature, and the
    noise of the function over $h$, which is measured (Moré & Wild 2011). If the noise shows that the function computes
    in less than float64, or if it cannot be called in float64, the other ways are compared with the differences.

    **Arguments:**

    - `loss_fn`: `loss_fn(*args, **options)`, a real scalar, traceable by `jax.jit`.
    - `args`: pytrees; their floating leaves are differentiated, the others and `options` are not.
    - `closed_form`: a function of the same arguments that gives the gradient by the first argument with floating
      leaves, or a tuple with one for each. Known for `softmax_cross_entropy`.
    - `oracle`: the exact gradient in the form of `closed_form`'s, or a function that gives it, called with the
      arguments of `loss_fn`, the floating leaves as float64 NumPy arrays.
    - `tolerance`: the largest error in ulp; None allows $\epsilon^{-1/2}$, half of the digits of the dtype.

    **Returns:** a `GradientReport`. Where the reference is nan or infinite, the others must be so too. Beyond 256
    entries, forward mode and differences look at 256 that are drawn, and the differences at a direction through all.

    **Raises:** `TypeError` if nothing is floating or the loss is not, `ValueError` if the loss is not a scalar.

    >>> late = jnp.array([0.0, -20.0, -25.0])
    >>> report = check_gradient(softmax_cross_entropy, late, jnp.array(0))
    >>> report.ok, report.max_ulp < 8
    (True, True)
    >>> usual = check_gradient(lambda z: -jax.nn.log_softmax(z)[0], late)
    >>> usual.ok, usual.worst.got, f"{usual.worst.want:.1e}"
    (False, 0.0, '-2.1e-09')
    """
    entries = FlatArguments("check_gradient", loss_fn, args, options)
    (wide,) = evaluate([entries])
    (own,) = autodiff_gradients([(entries, closed_form or _known_closed_form(loss_fn))])
    reference = Reference.of(wide)
    if oracle is not None:
        exact = oracle(*entries.arguments(entries.split(entries.x)), **options) if callable(oracle) else oracle
        reference = reference.replaced(*entries.gradient(exact, "oracle"))
    # A float32 value of bfloat16 arguments may well have been computed in bfloat16.
    own = dataclasses.replace(own, epsilon=max(own.epsilon, float(entries.epsilon.max())))
    allowed, value_allowed = entries.epsilon**-0.5, own.epsilon**-0.5
    if tolerance is not None:
        allowed, value_allowed = np.full(entries.count, float(tolerance)), float(tolerance)
    found = compare(entries, own, wide, reference, allowed, value_allowed)
    return GradientReport(tuple(found), (*own.notes, *wide.notes))


def _known_closed_form(loss_fn: Callable[..., Any]) -> Callable[..., Any] | None:
    """The library's own, also for a `functools.partial` of one of its losses."""
    if isinstance(loss_fn, functools.partial):
        closed = _known_closed_form(loss_fn.func)
        return None if closed is None else functools.partial(closed, *loss_fn.args, **loss_fn.keywords)
    return next((closed for loss, closed in CLOSED_FORMS.items() if loss is loss_fn), None)


# ----------------------------------------------------------------------------------------------------------------------
# Errors


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the ways are compared with, as vectors of entries."""

    value: float | None
    value_size: float
    """What an error of the value is measured by, if it is more than the value."""
    gradient: np.ndarray
    known: np.ndarray
    size: np.ndarray
    """What the errors of the entries are measured by, if it is more than the entry."""
    slack: np.ndarray
    """The error of the reference itself."""

    @classmethod
    def of(cls, wide: Float64Reference) -> "Reference":
        if wide.exact:
            nothing = np.zeros_like(wide.size)
            return cls(wide.value, wide.value_size, wide.gradient, np.ones_like(nothing, bool), wide.size, nothing)
        return cls(None, 0.0, wide.differences, np.isfinite(wide.bound), wide.size, wide.bound)

    def replaced(self, gradient: np.ndarray, known: np.ndarray) -> "Reference":
        """With another gradient where that one is known."""
        return dataclasses.replace(
            self,
            gradient=np.where(known, gradient, self.gradient),
            known=known | self.known,
            slack=np.where(known, 0, self.slack),
        )


def compare(
    entries: FlatArguments,
    own: Estimates,
    wide: Float64Reference,
    reference: Reference,
    allowed: np.ndarray,
    value_allowed: float,
) -> Iterator[Comparison]:
    """The value, then each way and argument by its worst entry, then the differences."""
    if reference.value is not None:
        unit = max(own.epsilon * max(reference.value_size, abs(reference.value)), own.floor)
        ulp = float(_error(np.array(own.value), np.array(reference.value)) / unit)
        yield Comparison("value", "loss", (), own.value, reference.value, ulp, value_allowed)
    want = reference.gradient
    finite = np.where(np.isfinite(want), want, 0)
    unit = np.maximum(entries.epsilon * np.fmax(reference.size, np.abs(finite)), entries.floor)
    slack = np.where(reference.known, reference.slack, 0) / unit
    for way, (got, known) in own.gradients.items():
        yield from _worst(entries, way, got, want, known & reference.known, unit, allowed + slack)
    if wide.exact:
        bound = np.where(np.isfinite(wide.bound), wide.bound, 0) / unit
        yield from _worst(entries, DIFFERENCES, wide.differences, want, np.isfinite(wide.bound), unit, bound)
    if entries.count > len(entries.drawn) and np.isfinite(wide.along):
        got, _ = own.gradients["jax.grad"]
        toward = np.where(np.isfinite(got), wide.toward, 0)
        total = float(np.sum(np.where(toward == 0, 0, got) * toward))
        scale = float(np.sqrt(np.sum((unit * toward) ** 2)))
        ulp = abs(total - wide.along) / scale
        within = float(allowed.max()) + wide.along_bound / scale
        yield Comparison(DIFFERENCES, "a random direction", (), total, wide.along, ulp, within)


def _error(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """`|got - want|`; what is not finite must be the same."""
    with np.errstate(invalid="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        return np.where(same, 0, np.where(np.isfinite(got) & np.isfinite(want), np.abs(got - want), np.inf))


def _worst(
    entries: FlatArguments,
    way: str,
    got: np.ndarray,
    want: np.ndarray,
    known: np.ndarray,
    unit: np.ndarray,
    allowed: np.ndarray,
) -> Iterator[Comparison]:
    """For each argument of which something is known, the entry that is furthest out of its bounds."""
    ulp = _error(got, want) / unit
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(known, np.where(ulp == 0, 0, ulp / allowed), -1)
    for name, shape, start, end in zip(entries.names, entries.shapes, entries.bounds, entries.bounds[1:], strict=False):
        if start < end and np.max(share[start:end]) >= 0:
            at = start + int(np.argmax(share[start:end]))
            index = tuple(map(int, np.unravel_index(at - start, shape))) if shape else ()
            yield Comparison(way, name, index, float(got[at]), float(want[at]), float(ulp[at]), float(allowed[at]))
