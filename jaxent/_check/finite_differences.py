"""A function in float64: its gradient, how far rounding moves it, its noise, and central differences with their bounds.

Central differences know a derivative to a few digits only, so that they show gross errors and no others. With the step
`h` their error is `h^2 / 6 f'''` from the curvature and `noise / h` from rounding, least near `h = eps^(1/3)` (Nocedal
& Wright 2006, section 8.1). The first is a third of `|D(h) - D(2h)|`; the noise is measured (Moré & Wild 2011).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxent._check.autodiff import FlatArguments

# Relative steps: the cube roots of the epsilons of float64 and float32, and one more for a noisier function.
STEPS = {"float64": (2.0**-17, 2.0**-8), "float32": (2.0**-8, 2.0**-5)}
# The noise is that of the sixth differences of nine values in a row (ECNoise), whose smooth part is about 1e-28. The
# spacing is not a binary fraction, or float32 inside the function would not show. Eight sigmas are heuristic.
SPACING, POINTS, ORDER, SIGMAS = 1.7e-5, 9, 6, 8


@dataclasses.dataclass(frozen=True)
class Float64Reference:
    """Float64 value, gradient and noise of a function at its arguments, and its differences; entries as vectors."""

    exact: bool
    """Whether the noise of the function is that of float64."""
    value: float
    value_size: float
    """What an error of the value is measured by: the value, or how far relative changes of the arguments move it."""
    gradient: np.ndarray
    size: np.ndarray
    """The same for each entry of the gradient."""
    differences: np.ndarray
    bound: np.ndarray
    """Infinite where no difference is known."""
    stand_in_gradient: np.ndarray | None
    """The gradient where the differences were taken, if that is not at the arguments because the loss is not finite."""
    toward: np.ndarray
    """A random direction through all entries that can be moved."""
    along: float
    along_bound: float
    notes: list[str]


def evaluate(
    problems: Sequence[FlatArguments], compiler_options: dict[str, Any] | None = None
) -> list[Float64Reference]:
    """In float64, or, if a function cannot take it, in float32; all in one program, which compiles faster than many."""
    try:
        with jax.enable_x64(True):
            return _evaluate([_Points(flat, np.dtype(np.float64)) for flat in problems], compiler_options)
    except (TypeError, ValueError) as error:
        note = f"not callable in float64, compared with differences in float32: {str(error).splitlines()[0]}"
    return evaluate_in_float32(problems, note)


def evaluate_in_float32(problems: Sequence[FlatArguments], note: str) -> list[Float64Reference]:
    found = _evaluate([_Points(flat, np.dtype(np.float32)) for flat in problems])
    return [dataclasses.replace(float64, notes=[note, *float64.notes]) for float64 in found]


class _Points:
    """Where a function is evaluated. Its drawn entries are moved one at a time, and all of them along a direction.

    The function is not finite everywhere: `hold` and `stand_in` give other points of the same shapes, for which the
    program need not be compiled again.
    """

    def __init__(self, flat: FlatArguments, dtype: np.dtype):
        self.flat, self.dtype, self.steps = flat, dtype, STEPS[dtype.name]
        # (step, h or 2h, sign) for each entry and for the direction, which is entry -1
        self.moves = np.array([[[h, -h], [2 * h, -2 * h]] for h in self.steps])
        entries = [*np.repeat([*flat.drawn, -1], self.moves.size), *[-1] * POINTS]
        spaced = SPACING * np.arange(-(POINTS // 2), POINTS // 2 + 1)
        distances = np.concatenate([np.tile(self.moves.reshape(-1), len(flat.drawn) + 1), spaced])
        self.points = np.array(entries, np.int32), distances.astype(dtype)
        self.signs = np.random.default_rng(0).choice([-1, 1], (3, flat.count)).astype(dtype)
        self.place(flat.x)

    def place(self, x: np.ndarray) -> None:
        """Evaluate at `x` from now on, with every finite entry free to move."""
        self.x, self.scale = x.astype(self.dtype), _scales(self.flat, x).astype(self.dtype)
        self.hold(np.zeros(self.flat.count, bool))

    def hold(self, held: np.ndarray) -> None:
        """Leave these entries out of whatever moves several."""
        free = np.where(held, 0, self.scale)
        self.toward = self.signs[0] * free
        self.shifts = np.concatenate([np.zeros_like(self.x)[None], self.steps[0] * self.signs * free])
        self.shifts = self.shifts.astype(self.dtype)

    def arrays(self) -> tuple[Any, ...]:
        return self.x, self.scale, self.toward, self.points, self.shifts

    def traced(self, x: Any, scale: Any, toward: Any, points: Any, shifts: Any) -> Any:
        """The values at the points, and the values and gradients at shifts."""

        def function(x: jax.Array) -> jax.Array:
            return self.flat(self.flat.split(x))

        def at(point: tuple[jax.Array, jax.Array]) -> jax.Array:
            entry, distance = point
            one = (jnp.arange(self.flat.count, dtype=jnp.int32) == entry).astype(x.dtype)
            return function(x + distance * jnp.where(entry < 0, toward, scale * one))

        return lax.map(at, points), lax.map(lambda shift: jax.value_and_grad(function)(x + shift), shifts)

    def held_entries(self, values: np.ndarray) -> Iterator[np.ndarray]:
        """More and more entries to hold: those that leave the domain when moved, those like them, all but the drawn."""
        moved = values[: -POINTS - self.moves.size].reshape(len(self.flat.drawn), -1)
        stuck = np.zeros(self.flat.count, bool)
        stuck[self.flat.drawn] = ~np.all(np.isfinite(moved), axis=-1)
        if stuck.any():
            yield stuck
        alike = stuck | np.isin(self.x, self.x[stuck])
        if np.any(alike != stuck):
            yield alike
        undrawn = np.ones(self.flat.count, bool)
        undrawn[self.flat.drawn] = False
        if undrawn.any():
            yield alike | undrawn
        yield np.ones(self.flat.count, bool)

    def stand_ins(self) -> Iterator[tuple[np.ndarray, str]]:
        """Points near the arguments where the function may be finite, and what is said of them."""
        leaves = self.flat.split(self.flat.x)
        finite = [np.isfinite(leaf) for leaf in leaves]
        # Between 0 and 1, and not all the same, where nothing is known about the entries.
        unlike = [np.linspace(0.25, 0.75, leaf.size).reshape(leaf.shape) for leaf in leaves]
        means = [
            np.mean(leaf[kept]) if kept.any() else other
            for leaf, kept, other in zip(leaves, finite, unlike, strict=True)
        ]
        filled = [np.where(kept, leaf, mean) for leaf, kept, mean in zip(leaves, finite, means, strict=True)]
        if not all(kept.all() for kept in finite):
            yield self.flat.flat(filled), "with finite numbers in place of nan and inf"
        # Away from the ends of a domain, such as probabilities of 0 and 1.
        inside = [leaf + np.where(leaf == mean, 1, mean - leaf) / 64 for leaf, mean in zip(filled, means, strict=True)]
        yield self.flat.flat(inside), "at a point nearby"


Evaluation = tuple[np.ndarray, np.ndarray, np.ndarray]  # values at the points, values and gradients at the shifts


def _evaluate(points: list[_Points], compiler_options: dict[str, Any] | None = None) -> list[Float64Reference]:
    def all_points(arrays: list[Any]) -> list[Any]:
        return [p.traced(*each) for p, each in zip(points, arrays, strict=True)]

    program = jax.jit(all_points, compiler_options=compiler_options)

    def run() -> list[tuple[Evaluation, Any]]:
        found = program([p.arrays() for p in points])
        as_numpy = [(np.asarray(values), *map(np.asarray, at_shifts)) for values, at_shifts in found]
        return [((v.astype(np.float64), s.astype(np.float64), g.astype(np.float64)), v.dtype) for v, s, g in as_numpy]

    first = run()
    return [_settled(p, i, run, *first[i]) for i, p in enumerate(points)]


def _settled(p: _Points, at: int, run: Callable[[], Any], first: Evaluation, dtype: Any) -> Float64Reference:
    """The first evaluation has value and gradient; where it is not finite, others have the differences."""
    found, notes, stand_in = first, [], None
    if not np.isfinite(first[1][0]):
        for x, where in p.stand_ins():
            p.place(x)
            found = run()[at][0]
            if np.isfinite(found[1][0]):
                stand_in = found[2][0]
                notes.append(f"the loss is {first[1][0]} here: central differences are taken {where}")
                break
        else:
            notes.append(f"the loss is {first[1][0]} here and nearby: no central differences, which a wrong rule needs")
    if np.isfinite(found[1][0]) and not _moves_are_finite(found):
        for held in p.held_entries(found[0]):
            p.hold(held)
            found = run()[at][0]
            if _moves_are_finite(found):
                break
    return _interpreted(p, first, found, stand_in, dtype, notes)


def _moves_are_finite(found: Evaluation) -> bool:
    """Whether noise, direction and curvature can be told: where several entries move at once."""
    return bool(np.all(np.isfinite(found[0][-POINTS:])) and np.all(np.isfinite(found[1])))


def _interpreted(
    p: _Points, first: Evaluation, found: Evaluation, stand_in: np.ndarray | None, value_dtype: Any, notes: list[str]
) -> Float64Reference:
    flat, dtype = p.flat, p.dtype
    epsilon = float(max(np.finfo(dtype).eps, ml_dtypes.finfo(value_dtype).eps))
    values, shifted, gradients = found
    with np.errstate(all="ignore"):
        gradient, value = first[2][0], float(first[1][0])
        reach = float(np.sqrt(np.nansum(np.where(p.scale > 0, gradients[0] * p.scale, 0) ** 2)))
        moved = np.sqrt(np.mean(((gradients[1:] - gradients[0]) / p.steps[0]) ** 2, axis=0))
        sixth = np.diff(values[-POINTS:], ORDER)
        factor = math.factorial(ORDER) ** 2 / math.factorial(2 * ORDER)
        noise = max(float(np.sqrt(factor * np.mean(sixth**2))), epsilon / 2 * abs(float(shifted[0])))
        centre = np.array([*p.x[flat.drawn], 0], dtype)
        width = np.array([*p.scale[flat.drawn], 1], dtype)
        differences, bounds = _differences(values[:-POINTS], centre, width, p.moves, noise, epsilon)
    drawn, drawn_bound = np.zeros(flat.count), np.full(flat.count, np.inf)
    drawn[flat.drawn], drawn_bound[flat.drawn] = differences[:-1], bounds[:-1]
    # Nearer to float64's epsilon than to float32's. Where no noise can be measured, the result's dtype decides.
    share = noise / max(abs(float(shifted[0])), reach, np.finfo(np.float64).tiny)
    exact = share <= math.sqrt(2.0**-52 * 2.0**-23) if np.isfinite(share) else value_dtype == np.float64
    exact = bool(exact) and dtype == np.float64
    if not exact and dtype == np.float64:
        notes.append(f"in float64 the loss has noise of {share:.0e} of its size: compared with differences")
    unknown = int(np.sum(~np.isfinite(bounds[:-1])))
    if unknown and np.isfinite(shifted[0]):
        where = "not finite, or at the edge of the domain"
        notes.append(f"no central differences for {unknown} of {len(flat.drawn)} entries: {where}")
    return Float64Reference(
        exact=exact,
        value=value,
        value_size=max(_finite(value), _finite(reach)),
        gradient=gradient,
        size=np.fmax(np.where(np.isfinite(gradient), np.abs(gradient), 0), np.where(np.isfinite(moved), moved, 0)),
        differences=drawn,
        bound=drawn_bound,
        stand_in_gradient=stand_in,
        toward=p.toward.astype(np.float64),
        along=float(differences[-1]),
        along_bound=float(bounds[-1]),
        notes=notes,
    )


def _finite(size: float) -> float:
    return abs(size) if math.isfinite(size) else 0.0


def _scales(flat: FlatArguments, x: np.ndarray) -> np.ndarray:
    """What a relative step of 1 is: the size of the entry, near to the spread of its leaf; 0 if it is not finite.

    Logits near 1e4 live on the scale of their differences, and an entry of 0 on that of the others.
    """
    scales = []
    for leaf in flat.split(x):
        finite = np.isfinite(leaf)
        size = np.abs(np.where(finite, leaf, 0))
        spread = float(np.std(leaf[finite])) if finite.any() else 0.0
        near = np.clip(size, spread / 64, 4 * spread) if spread else np.where(size == 0, 1, size)
        scales.append(np.where(finite, near, 0))
    return flat.flat(scales)


def _differences(
    values: np.ndarray, centre: np.ndarray, width: np.ndarray, moves: np.ndarray, noise: float, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of the steps tried, the difference with the smallest bound; an infinite bound where no value is finite."""
    values = values.reshape(-1, *moves.shape)
    moved = centre[:, None, None, None] + moves.astype(centre.dtype) * width[:, None, None, None]
    run = (moved[..., 0] - moved[..., 1]).astype(np.float64)
    slopes = (values[..., 0] - values[..., 1]) / run
    curved = np.abs(slopes[..., 0] - slopes[..., 1])
    rounded = 2 * (SIGMAS * noise + epsilon * np.abs(centre[:, None] * slopes[..., 0])) / run[..., 0]
    bounds = np.where(np.isfinite(curved + rounded), curved + rounded, np.inf)
    best = np.argmin(bounds, axis=-1)[:, None]
    return np.take_along_axis(slopes[..., 0], best, -1)[:, 0], np.take_along_axis(bounds, best, -1)[:, 0]
