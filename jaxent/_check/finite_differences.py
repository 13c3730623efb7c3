"""A function in float64: its gradient, how far rounding moves it, its noise, and central differences with their bounds.

Central differences know a derivative to a few digits only, so that they show gross errors and no others. With the step
`h` their error is `h^2 / 6 f'''` from the curvature and `noise / h` from rounding, least near `h = eps^(1/3)` (Nocedal
& Wright 2006, section 8.1). The first is a third of `|D(h) - D(2h)|`; the noise is measured (Moré & Wild 2011).
"""

import dataclasses
import math
from collections.abc import Sequence
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
# spacing is no binary fraction, or a float32 inside would not show. Eight sigmas are heuristic.
SPACING, POINTS, ORDER, SIGMAS = 1.7e-5, 9, 6, 8


@dataclasses.dataclass(frozen=True)
class Float64Reference:
    """What float64 tells of a function at its arguments, as vectors of entries."""

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
    toward: np.ndarray
    """A random direction through all entries."""
    along: float
    along_bound: float
    notes: list[str]


def evaluate(problems: Sequence[FlatArguments]) -> list[Float64Reference]:
    """In float64, or, if a function cannot take it, in float32; all in one program, which compiles faster than many."""
    try:
        with jax.enable_x64(True):
            return _evaluate([_Points(entries, np.dtype(np.float64)) for entries in problems])
    except (TypeError, ValueError) as error:
        note = f"not callable in float64, compared with differences in float32: {str(error).splitlines()[0]}"
    found = _evaluate([_Points(entries, np.dtype(np.float32)) for entries in problems])
    return [dataclasses.replace(wide, notes=[note]) for wide in found]


class _Points:
    """Where a function is evaluated. Its drawn entries are moved one at a time, and all of them along a direction."""

    def __init__(self, entries: FlatArguments, dtype: np.dtype):
        self.entries, self.dtype, self.steps = entries, dtype, STEPS[dtype.name]
        self.x, self.scale = entries.x.astype(dtype), _scales(entries).astype(dtype)
        # (step, h or 2h, sign) for each entry and for the direction, which is entry -1
        self.moves = np.array([[[h, -h], [2 * h, -2 * h]] for h in self.steps])
        who = [*np.repeat([*entries.drawn, -1], self.moves.size), *[-1] * POINTS]
        spaced = SPACING * np.arange(-(POINTS // 2), POINTS // 2 + 1)
        far = np.concatenate([np.tile(self.moves.reshape(-1), len(entries.drawn) + 1), spaced])
        self.points = np.array(who, np.int32), far.astype(dtype)
        signs = np.random.default_rng(0).choice([-1, 1], (3, entries.count)).astype(dtype)
        self.toward = signs[0] * self.scale
        self.shifts = np.concatenate([np.zeros_like(self.x)[None], self.steps[0] * signs * self.scale]).astype(dtype)

    def arrays(self) -> tuple[Any, ...]:
        return self.x, self.scale, self.toward, self.points, self.shifts

    def traced(self, x: Any, scale: Any, toward: Any, points: Any, shifts: Any) -> Any:
        """The values at the points, and the values and gradients at shifts."""

        def function(x: jax.Array) -> jax.Array:
            return self.entries(self.entries.split(x))

        def at(point: tuple[jax.Array, jax.Array]) -> jax.Array:
            entry, far = point
            one = (jnp.arange(self.entries.count, dtype=jnp.int32) == entry).astype(x.dtype)
            return function(x + far * jnp.where(entry < 0, toward, scale * one))

        return lax.map(at, points), lax.map(lambda shift: jax.value_and_grad(function)(x + shift), shifts)


def _evaluate(points: list[_Points]) -> list[Float64Reference]:
    program = jax.jit(lambda arrays: [p.traced(*each) for p, each in zip(points, arrays, strict=True)])
    found = program([p.arrays() for p in points])
    return [_interpreted(p, *each) for p, each in zip(points, found, strict=True)]


def _interpreted(p: _Points, values: Any, at_shifts: tuple[Any, Any]) -> Float64Reference:
    entries, dtype = p.entries, p.dtype
    epsilon = float(max(np.finfo(dtype).eps, ml_dtypes.finfo(values.dtype).eps))
    values, shifted, gradients = (np.asarray(found, np.float64) for found in (values, *at_shifts))
    with np.errstate(all="ignore"):
        gradient, value = gradients[0], float(shifted[0])
        reach = float(np.sqrt(np.nansum(np.where(p.scale > 0, gradient * p.scale, 0) ** 2)))
        moved = np.sqrt(np.mean(((gradients[1:] - gradient) / p.steps[0]) ** 2, axis=0))
        sixth = np.diff(values[-POINTS:], ORDER)
        factor = math.factorial(ORDER) ** 2 / math.factorial(2 * ORDER)
        noise = max(float(np.sqrt(factor * np.mean(sixth**2))), epsilon / 2 * abs(value))
        centre = np.array([*p.x[entries.drawn], 0], dtype)
        width = np.array([*p.scale[entries.drawn], 1], dtype)
        differences, bounds = _differences(values[:-POINTS], centre, width, p.moves, noise, epsilon)
    drawn, drawn_bound = np.zeros(entries.count), np.full(entries.count, np.inf)
    drawn[entries.drawn], drawn_bound[entries.drawn] = differences[:-1], bounds[:-1]
    # Nearer to float64's epsilon than to float32's.
    share = noise / max(abs(value), reach, np.finfo(np.float64).tiny)
    exact = dtype == np.float64 and share <= math.sqrt(2.0**-52 * 2.0**-23)
    notes = [] if exact else [f"in float64 the loss has noise of {share:.0e} of its size: compared with differences"]
    size = np.fmax(np.abs(gradient), moved)
    return Float64Reference(
        exact,
        value,
        max(abs(value), reach),
        gradient,
        size,
        drawn,
        drawn_bound,
        p.toward.astype(np.float64),
        float(differences[-1]),
        float(bounds[-1]),
        notes,
    )


def _scales(entries: FlatArguments) -> np.ndarray:
    """What a relative step of 1 is: the size of the entry, near to the spread of its leaf; 0 if it is not finite.

    Logits near 1e4 live on the scale of their differences, and an entry of 0 on that of the others.
    """
    scales = []
    for leaf in entries.split(entries.x):
        finite = np.isfinite(leaf)
        size = np.abs(np.where(finite, leaf, 0))
        spread = float(np.std(leaf[finite])) if finite.any() else 0.0
        near = np.clip(size, spread / 64, 4 * spread) if spread else np.where(size == 0, 1, size)
        scales.append(np.where(finite, near, 0))
    return entries.flat(scales)


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
