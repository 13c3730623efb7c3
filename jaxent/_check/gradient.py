"""Whether a gradient is right, and to how many digits: several ways to it, against each other and against float64."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxent._arguments import arrays
from jaxent._check.autodiff import (
    DirectionalDerivative,
    Estimates,
    FlatArguments,
    Gradient,
    autodiff_gradients,
    draws_other_bits_in_float64,
)
from jaxent._check.finite_differences import Float64Reference, evaluate, evaluate_in_float32
from jaxent._errors import ArgumentValueError, public
from jaxent.gradients import softmax_cross_entropy_gradient
from jaxent.losses import softmax_cross_entropy

# Heuristic: an error of more than a hundredth of the reference is not rounding alone.
WRONG = 0.01
CLOSED_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {softmax_cross_entropy: softmax_cross_entropy_gradient}
VALUE, GRAD, DIFFERENCES = "value", "jax.grad", "central differences"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The worst entry of one way to the derivative with respect to one argument."""

    way: str
    """`"value"`, `"closed form"`, `"jax.grad"`, `"jax.jvp"` or `"central differences"`."""
    argument: str
    """The argument and the path in it, such as `args[0]['w']`; `loss` for the value."""
    index: tuple[int, ...]
    """Where in the argument; empty for a scalar, and for what is no entry."""
    got: float
    """What this way gives."""
    want: float
    """The reference: that of float64, or the oracle's."""
    ulp: float
    """The error in units of the dtype's epsilon, relative to the entry or to what rounding moves it by."""
    allowed: float
    """The largest `ulp` that is in bounds."""

    @property
    def ok(self) -> bool:
        """Whether the error is in bounds."""
        return self.ulp <= self.allowed

    @property
    def place(self) -> str:
        """The argument with the index, as it would be written."""
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
    def compared(self) -> bool:
        """Whether any entry of the gradient could be compared: the value alone says nothing about it."""
        return any(c.way != VALUE for c in self.comparisons)

    @property
    def ok(self) -> bool:
        """Whether every comparison is in bounds; False if nothing of the gradient could be compared."""
        return self.compared and all(c.ok for c in self.comparisons)

    @property
    @public
    def worst(self) -> Comparison:
        """The comparison that is furthest out of its bounds, or nearest to them.

        **Raises:** `ValueError` if there is none.
        """
        if not self.comparisons:
            raise ArgumentValueError(f"nothing was compared: {'; '.join(self.notes)}")
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
        if not self.compared:
            verdict = "NOTHING COMPARED: no derivative has a finite reference"
        else:
            verdict = "in bounds" if self.ok else f"OUT OF BOUNDS: {self.worst.way} at {self.worst.place}"
        return "\n".join([*table(lines), *self.notes, verdict])


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines as columns, two blanks apart."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]


@public
def check_gradient(
    loss_fn: Callable[..., Any],
    *args: Any,
    closed_form: Callable[..., Any] | None = None,
    oracle: Any = None,
    tolerance: float | None = None,
    second_order: bool = False,
    **options: Any,
) -> GradientReport:
    r"""Compares several ways to the gradient of a loss, in ulp: closed form, reverse, forward, differences, float64.

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
    - `closed_form`: a function of the same arguments that gives the gradient with respect to the first argument with
      floating leaves, or a tuple with one for each. Known for `softmax_cross_entropy`.
    - `oracle`: the exact gradient in the form of `closed_form`'s, or a function that gives it, called with the
      arguments of `loss_fn`, the floating leaves as float64 NumPy arrays.
    - `tolerance`: the largest error in ulp; None allows $\epsilon^{-1/2}$, half of the digits of the dtype.
    - `second_order`: checks the gradient of the derivative along a fixed direction in place of the loss, which is a
      product with the Hessian. There is no closed form or oracle of it.

    **Returns:** a `GradientReport`, which is not `ok` if nothing could be compared. Where the reference is nan or
    infinite, the others must be so too. Beyond 256 entries, forward mode and differences look at 256 that are drawn,
    and the differences at a direction through all. Entries at the edge of the domain have no central differences; where
    the loss itself is not finite, they are taken nearby. A note says so, and what follows from the comparisons.

    **Raises:** `TypeError` if nothing is floating or the loss is not, `ValueError` if the loss is not a scalar or no
    entry is floating.

    >>> late = jnp.array([0.0, -20.0, -25.0])
    >>> report = check_gradient(softmax_cross_entropy, late, jnp.array(0))
    >>> report.ok, report.max_ulp < 8
    (True, True)
    >>> usual = check_gradient(lambda z: -jax.nn.log_softmax(z)[0], late)
    >>> usual.ok, usual.worst.got, f"{usual.worst.want:.1e}"
    (False, 0.0, '-2.1e-09')
    """
    if not callable(loss_fn):
        raise arrays.dtype_error("loss_fn", "be a function", loss_fn)
    if second_order and not (closed_form is None and oracle is None):
        raise ArgumentValueError("`closed_form` and `oracle` go with second_order=False")
    if second_order:
        flat = DirectionalDerivative(loss_fn, args, options)
    else:
        flat = FlatArguments(loss_fn, args, options)
        closed_form = closed_form or _known_closed_form(loss_fn)
    (float64,) = evaluate([flat])
    (estimates,) = autodiff_gradients([(flat, closed_form)])
    # A float32 value of bfloat16 arguments may well have been computed in bfloat16.
    estimates = dataclasses.replace(estimates, epsilon=max(estimates.epsilon, float(flat.epsilon.max())))
    exact = oracle
    if callable(oracle):
        exact = oracle(*flat.arguments(flat.split(flat.x)), **options)
    given = None if exact is None else flat.gradient(exact, "oracle")
    report = _report(flat, estimates, float64, given, tolerance)
    if not report.ok and draws_other_bits_in_float64(flat):
        (float32,) = evaluate_in_float32([flat], RANDOM_BITS)
        report = _report(flat, estimates, float32, given, tolerance)
    return report


RANDOM_BITS = (
    "its random numbers are others in float64, which changes the default dtype and with it the bits that are drawn: "
    "compared with differences in float32. Give jax.random a dtype, or draw outside of the loss, to compare in float64"
)


def _report(
    flat: FlatArguments,
    estimates: Estimates,
    float64: Float64Reference,
    oracle: Gradient | None,
    tolerance: float | None,
) -> GradientReport:
    reference = Reference.of(float64)
    if oracle is not None:
        reference = reference.replaced(*oracle)
    allowed, value_allowed = flat.epsilon**-0.5, estimates.epsilon**-0.5
    if tolerance is not None:
        allowed, value_allowed = np.full(flat.count, float(tolerance)), float(tolerance)
    comparisons = tuple(compare(flat, estimates, float64, reference, allowed, value_allowed))
    if not _tells_something(float64, reference):
        comparisons = tuple(c for c in comparisons if c.way == VALUE)
    return GradientReport(comparisons, (*estimates.notes, *float64.notes, *_conclusions(comparisons, float64.exact)))


def _conclusions(comparisons: Sequence[Comparison], exact: bool) -> Iterator[str]:
    """What the comparisons say together, where that is more than each says alone."""
    bad = {c.way: c for c in sorted(comparisons, key=lambda c: c.share) if not c.ok}
    differences, gradient = bad.get(DIFFERENCES), bad.get(GRAD)
    if differences is not None and gradient is None and exact:
        yield (
            f"The derivative rule is wrong: jax.grad agrees with itself in float64, so no digits are lost, but moving "
            f"{differences.place} changes the loss at a rate of {differences.got:.9g}, not {differences.want:.9g}. "
            "Look at the custom_vjp, custom_jvp or stop_gradient in the loss."
        )
    elif gradient is not None and not exact and abs(gradient.got - gradient.want) > WRONG * abs(gradient.want):
        yield (
            f"The derivative rule is wrong, or loses nearly all digits: moving {gradient.place} changes the loss "
            f"at a rate of {gradient.want:.9g}, not {gradient.got:.9g}."
        )
    if gradient is None and differences is None:
        for way in ("closed form", "jax.jvp"):
            if way in bad:
                yield f"Of all ways only {way} is out of bounds: it is wrong there, or loses digits."


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
    def of(cls, float64: Float64Reference) -> "Reference":
        size = float64.size
        if float64.exact:
            known, nothing = np.ones_like(size, bool), np.zeros_like(size)
            return cls(float64.value, float64.value_size, float64.gradient, known, size, nothing)
        known = np.isfinite(float64.bound) & (float64.stand_in_gradient is None)
        return cls(None, 0.0, float64.differences, known, size, float64.bound)

    def replaced(self, gradient: np.ndarray, known: np.ndarray) -> "Reference":
        """With another gradient where that one is known."""
        return dataclasses.replace(
            self,
            gradient=np.where(known, gradient, self.gradient),
            known=known | self.known,
            slack=np.where(known, 0, self.slack),
        )


def _tells_something(float64: Float64Reference, reference: Reference) -> bool:
    """Whether a reference is finite, and no gradient that is finite everywhere belongs to a loss of nan.

    Such a gradient agrees with itself in every dtype, and no difference of the loss can vouch for it.
    """
    if float64.stand_in_gradient is not None:
        return True
    finite = np.isfinite(reference.gradient)
    return bool(np.any(reference.known & finite)) and not (np.isnan(float64.value) and np.all(finite))


def compare(
    flat: FlatArguments,
    estimates: Estimates,
    float64: Float64Reference,
    reference: Reference,
    allowed: np.ndarray,
    value_allowed: float,
) -> Iterator[Comparison]:
    """The value, then each way and argument by its worst entry, then the differences."""
    if reference.value is not None:
        size = abs(reference.value) if np.isfinite(reference.value) else 0.0
        unit = max(estimates.epsilon * max(reference.value_size, size), estimates.floor)
        ulp = float(_error(np.array(estimates.value), np.array(reference.value)) / unit)
        yield Comparison(VALUE, "loss", (), estimates.value, reference.value, ulp, value_allowed)
    want = reference.gradient
    finite = np.where(np.isfinite(want), want, 0)
    unit = np.maximum(flat.epsilon * np.fmax(reference.size, np.abs(finite)), flat.floor)
    slack = np.where(reference.known, reference.slack, 0) / unit
    for way, (got, known) in estimates.gradients.items():
        yield from _worst(flat, way, got, want, known & reference.known, unit, allowed + slack)
    gradient = estimates.gradients[GRAD][0]
    if float64.stand_in_gradient is not None:
        gradient = want = float64.stand_in_gradient
    if float64.exact or float64.stand_in_gradient is not None:
        known = np.isfinite(float64.bound)
        bound = np.where(known, float64.bound, 0) / unit
        yield from _worst(flat, DIFFERENCES, float64.differences, want, known, unit, bound)
    if flat.count > len(flat.drawn) and np.isfinite(float64.along):
        toward = np.where(np.isfinite(gradient), float64.toward, 0)
        total = float(np.sum(np.where(toward == 0, 0, gradient) * toward))
        scale = float(np.sqrt(np.sum((unit * toward) ** 2)))
        if scale > 0:
            ulp = abs(total - float64.along) / scale
            within = float(allowed.max()) + float64.along_bound / scale
            yield Comparison(DIFFERENCES, "a random direction", (), total, float64.along, ulp, within)


def _error(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """`|got - want|`; what is not finite must be the same."""
    with np.errstate(invalid="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        return np.where(same, 0, np.where(np.isfinite(got) & np.isfinite(want), np.abs(got - want), np.inf))


def _worst(
    flat: FlatArguments,
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
    for name, shape, start, end in zip(flat.names, flat.shapes, flat.bounds, flat.bounds[1:], strict=False):
        if start < end and np.max(share[start:end]) >= 0:
            at = start + int(np.argmax(share[start:end]))
            index = tuple(map(int, np.unravel_index(at - start, shape))) if shape else ()
            yield Comparison(way, name, index, float(got[at]), float(want[at]), float(ulp[at]), float(allowed[at]))
