"""The gradient of a function by several ways, in the dtypes of its arguments.

All floating arguments are laid out as one flat vector of entries.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxent._arguments import arrays
from jaxent._errors import ArgumentTypeError, ArgumentValueError

# Up to this many entries are differentiated one at a time. Of more, this many are drawn; a random direction covers all.
MAX_ENTRIES = 256


# The entries, and which of them are known.
Gradient = tuple[np.ndarray, np.ndarray]


class FlatArguments:
    """The floating leaves of `args` as one vector, and the loss as a function of it."""

    def __init__(self, loss_fn: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]):
        self.loss_fn, self.options = loss_fn, options
        paths, self.structure = jax.tree_util.tree_flatten_with_path(args)
        self.leaves = [_leaf(leaf) for _, leaf in paths]
        self.at = [i for i, leaf in enumerate(self.leaves) if _is_floating(leaf)]
        if not self.at:
            raise ArgumentTypeError(f"`args` must hold something floating, got {', '.join(map(repr, args))}")
        self.names = [f"args{jax.tree_util.keystr(paths[i][0])}" for i in self.at]
        self.shapes = [self.leaves[i].shape for i in self.at]
        self.dtypes = [self.leaves[i].dtype for i in self.at]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.bounds = [0, *np.cumsum(self.sizes).tolist()]
        self.count = self.bounds[-1]
        if self.count == 0:
            raise ArgumentValueError(f"`args` must hold at least one floating entry, got shapes {self.shapes}")
        self.epsilon = self._each(lambda d: float(ml_dtypes.finfo(d).eps))
        self.floor = self._each(_least)
        self.x = self.flat([self.leaves[i] for i in self.at])
        drawn = np.random.default_rng(0).permutation(self.count)[:MAX_ENTRIES]
        self.drawn = np.sort(drawn).astype(np.int32)
        out = jax.eval_shape(self, [self.leaves[i] for i in self.at])
        if getattr(out, "shape", None) != ():
            raise arrays.shape_error("loss_fn", "return a scalar (take the sum, or reduction='sum')", out)
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise arrays.dtype_error("loss_fn", "return a floating scalar", out)

    def _each(self, of: Callable[[Any], float]) -> np.ndarray:
        return np.repeat([of(dtype) for dtype in self.dtypes], self.sizes)

    def flat(self, leaves: list[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in leaves])

    def split(self, x: Any) -> list[Any]:
        """The leaves in a vector of NumPy or JAX."""
        return [x[a:b].reshape(s) for a, b, s in zip(self.bounds, self.bounds[1:], self.shapes, strict=False)]

    def __call__(self, floating: list[Any]) -> jax.Array:
        return self.loss_fn(*self.arguments(floating), **self.options)

    def arguments(self, floating: list[Any]) -> tuple[Any, ...]:
        leaves = list(self.leaves)
        for i, leaf in zip(self.at, floating, strict=True):
            leaves[i] = leaf
        return self.structure.unflatten(leaves)

    def gradient(self, given: Any, argument: str) -> Gradient:
        """What was given with respect to the first argument with floating leaves, or a tuple of one for each."""
        marks = self.structure.unflatten([i if i in self.at else None for i in range(len(self.leaves))])
        places = [places for mark in marks if (places := jax.tree.leaves(mark))]
        parts = given if isinstance(given, tuple) and len(places) > 1 else (given,)
        leaves: list[Any] = [np.zeros(shape) for shape in self.shapes]
        known = [np.zeros(shape) for shape in self.shapes]
        for part, at in zip(parts, places, strict=False):
            for i, leaf in zip(at, jax.tree.leaves(part), strict=True):
                if np.shape(leaf) != self.leaves[i].shape:
                    of = self.names[self.at.index(i)]
                    expected = f"give a gradient of shape {self.leaves[i].shape} with respect to {of}"
                    raise arrays.shape_error(argument, expected, np.asarray(leaf))
                leaves[self.at.index(i)] = leaf
                known[self.at.index(i)][...] = True
        return self.flat(leaves), self.flat(known) > 0


class DirectionalDerivative(FlatArguments):
    """The derivative of the loss along a fixed direction, whose gradient is a product with the Hessian."""

    def __call__(self, floating: list[Any]) -> jax.Array:
        gradient = jax.grad(super().__call__)(floating)
        return self.along(gradient, jnp.result_type(*(arrays.accumulation_dtype(g) for g in gradient)))

    def along(self, gradient: list[jax.Array], dtype: Any) -> jax.Array:
        signs = self.split(np.random.default_rng(1).choice([-1.0, 1.0], self.count))
        terms = [jnp.sum(g.astype(dtype) * jnp.asarray(s, dtype)) for g, s in zip(gradient, signs, strict=True)]
        return sum(terms[1:], terms[0])


def _leaf(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, (bool, int, float, np.ndarray, np.generic)) else leaf


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _least(dtype: Any) -> float:
    """The smallest number that every back end has: some flush subnormal numbers to zero, but not those of float16."""
    info = ml_dtypes.finfo(dtype)
    return float(info.smallest_subnormal if dtype == np.float16 else info.tiny)


# ----------------------------------------------------------------------------------------------------------------------
# Closed form, reverse, forward


@dataclasses.dataclass(frozen=True)
class Estimates:
    """The value and the gradients by several ways."""

    value: float
    epsilon: float
    floor: float
    gradients: dict[str, Gradient]
    notes: list[str]


# A function, and its closed form if there is one.
Problem = tuple[FlatArguments, Callable[..., Any] | None]


def autodiff_gradients(problems: Sequence[Problem]) -> list[Estimates]:
    """The closed form if there is one, `jax.grad`, and `jax.jvp` along the entries; one program for all problems."""
    leaves, notes = [[flat.leaves[i] for i in flat.at] for flat, _ in problems], []

    def all_ways(forward: bool, leaves: list[Any]) -> list[dict[str, Any]]:
        return [_ways(*problem, each, forward) for problem, each in zip(problems, leaves, strict=True)]

    try:
        found = jax.jit(functools.partial(all_ways, True))(leaves)
    except TypeError as error:  # a custom_vjp in the loss, or an error that comes again
        found = jax.jit(functools.partial(all_ways, False))(leaves)
        notes.append(f"no jax.jvp: {str(error).splitlines()[0]}")
    return [_estimates(flat, each, notes) for (flat, _), each in zip(problems, found, strict=True)]


def _ways(flat: FlatArguments, closed_form: Any, leaves: list[jax.Array], forward: bool) -> dict[str, Any]:
    def along(entry: jax.Array) -> jax.Array:
        parts = flat.split(jnp.arange(flat.count, dtype=jnp.int32) == entry)
        direction = [part.astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        return jax.jvp(flat, (leaves,), (direction,))[1]

    found = {"jax.grad": jax.value_and_grad(flat)(leaves)}
    if closed_form is not None:
        found["closed form"] = closed_form(*flat.arguments(leaves), **flat.options)
    if forward:
        found["jax.jvp"] = lax.map(along, jnp.asarray(flat.drawn))
    return found


def _estimates(flat: FlatArguments, found: dict[str, Any], notes: list[str]) -> Estimates:
    value, gradient = found["jax.grad"]
    gradients = {"jax.grad": (flat.flat(gradient), np.ones(flat.count, bool))}
    if "closed form" in found:
        gradients = {"closed form": flat.gradient(found["closed form"], "closed_form"), **gradients}
    if "jax.jvp" in found:
        forward, known = np.zeros(flat.count), np.zeros(flat.count, bool)
        forward[flat.drawn], known[flat.drawn] = np.asarray(found["jax.jvp"], np.float64), True
        gradients["jax.jvp"] = forward, known
    return Estimates(float(value), float(ml_dtypes.finfo(value.dtype).eps), _least(value.dtype), gradients, notes)


# ----------------------------------------------------------------------------------------------------------------------
# Random bits

RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")


def draws_other_bits_in_float64(flat: FlatArguments) -> bool:
    """Whether the function draws random numbers whose bits depend on the default dtype, as those of dropout do."""
    here = _random_draws(flat, [flat.leaves[i] for i in flat.at])
    if not here:
        return False
    with jax.enable_x64(True):
        try:
            return here != _random_draws(flat, flat.split(jnp.asarray(flat.x)))
        except (TypeError, ValueError):
            return False


def _random_draws(flat: FlatArguments, leaves: list[Any]) -> list[str]:
    """Each draw in the program, with the shape and the width of what is drawn."""
    found = []

    def search(value: Any) -> None:
        for equation in getattr(value, "eqns", ()):
            if equation.primitive.name in RANDOM:
                found.append(f"{equation.primitive.name} {[str(out.aval) for out in equation.outvars]}")
            for parameter in equation.params.values():
                for part in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                    search(part)

    search(jax.make_jaxpr(flat)(leaves))
    return found
