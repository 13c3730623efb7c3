"""The information measures that the tests share, each with its oracle, and how their derivatives are taken."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles_information as oracle

import jaxent as info

INF, NAN = math.inf, math.nan


def f32(x: Any) -> np.ndarray:
    return np.array(x, np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A measure of one or two vectors, its oracle, and the ulp that a float32 value may be off."""

    measure: Callable[..., Any]
    oracle: Callable[..., Any]
    operands: int = 1
    ulp: float = 4


class Derivatives(NamedTuple):
    """Of a measure with respect to each operand; the Hessian has a row and a column of blocks."""

    value: Any
    gradient: Any
    forward: Any
    hessian: Any


@functools.cache
def compiled(measure: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(measure)


@functools.cache
def differentiated(measure: Callable[..., Any], operands: int) -> Callable[..., Derivatives]:
    """Value and derivatives with respect to all operands in one program, compiled once for vectors of one length."""
    every = tuple(range(operands))

    def of(*x: jax.Array) -> Derivatives:
        def columns(*steps: jax.Array) -> Any:
            return jax.jvp(jax.grad(measure, every), x, steps)

        steps = jnp.split(jnp.eye(sum(v.size for v in x)), operands, axis=1)
        gradient, columns_of = jax.vmap(columns, out_axes=(None, -1))(*steps)
        hessian = tuple(tuple(jnp.split(block, operands, axis=1)) for block in columns_of)
        return Derivatives(measure(*x), gradient, jax.jacfwd(measure, every)(*x), hessian)

    return jax.jit(of)


@functools.cache
def third_derivative(measure: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """The derivative of the Hessian with respect to one entry, counted through the operands laid end to end."""

    def of(at: jax.Array, *x: jax.Array) -> jax.Array:
        def hessian(flat: jax.Array) -> jax.Array:
            return jax.hessian(lambda flat: measure(*jnp.split(flat, operands)))(flat)

        flat = jnp.concatenate(x)
        return jax.jvp(hessian, (flat,), (jax.nn.one_hot(at, flat.size),))[1]

    return jax.jit(of)


def order_case(name: str, order: float, operands: int, ulp: float) -> Case:
    measure, exact = (functools.partial(getattr(module, name), order=order) for module in (info, oracle))
    return Case(measure, exact, operands, ulp)


ONE = {
    "entropy": Case(info.entropy, oracle.entropy),
    "perplexity": Case(info.perplexity, oracle.perplexity),
    **{
        f"renyi_{a:g}": order_case("renyi_entropy", a, 1, 8)
        for a in (0, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 7, 1e3, 1e38, INF)
    },
    **{f"tsallis_{a:g}": order_case("tsallis_entropy", a, 1, 6) for a in (0, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 7)},
    **{f"renyi_1{e:+g}": order_case("renyi_entropy", 1 + e, 1, 6) for e in (-1e-6, 1e-6)},
    **{f"tsallis_1{e:+g}": order_case("tsallis_entropy", 1 + e, 1, 6) for e in (-1e-6, 1e-6)},
}
TWO = {
    "cross_entropy": Case(info.cross_entropy, oracle.cross_entropy, 2),
    "kl": Case(info.kl_divergence, oracle.kl_divergence, 2),
    "js": Case(info.jensen_shannon_divergence, oracle.jensen_shannon_divergence, 2),
    "js_1/8": Case(
        functools.partial(info.jensen_shannon_divergence, weight=0.125),
        functools.partial(oracle.jensen_shannon_divergence, weight=0.125),
        2,
    ),
    "tv": Case(info.total_variation_distance, oracle.total_variation_distance, 2),
    "hellinger": Case(info.hellinger_distance, oracle.hellinger_distance, 2),
    **{f"renyi_{a:g}": order_case("renyi_divergence", a, 2, 8) for a in (0, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 7, 1e3, INF)},
    **{f"renyi_1{e:+g}": order_case("renyi_divergence", 1 + e, 2, 6) for e in (-1e-6, 1e-6)},
}
CASES = {f"{name}({'p' if c.operands == 1 else 'p, q'})": c for d in (ONE, TWO) for name, c in d.items()}
LOGITS = {
    "entropy_with_logits": Case(info.entropy_with_logits, oracle.of_logits(oracle.entropy)),
    "cross_entropy_with_logits": Case(info.cross_entropy_with_logits, oracle.of_logits(oracle.cross_entropy), 2),
    "kl_divergence_with_logits": Case(info.kl_divergence_with_logits, oracle.of_logits(oracle.kl_divergence), 2),
}
# Every order is a program of its own; these stand for the others where derivatives are compiled too.
FEW = [
    "entropy(p)", "perplexity(p)", "renyi_0.5(p)", "renyi_2(p)", "renyi_inf(p)", "renyi_1+1e-06(p)", "tsallis_0.5(p)",
    "tsallis_2(p)", "cross_entropy(p, q)", "kl(p, q)", "js(p, q)", "js_1/8(p, q)", "tv(p, q)", "hellinger(p, q)",
    "renyi_0.25(p, q)", "renyi_0.5(p, q)", "renyi_2(p, q)", "renyi_inf(p, q)", "renyi_1+1e-06(p, q)",
]  # fmt: skip


def draw_close(rng: np.random.Generator, shape: tuple[int, ...], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Two positive distributions of multiples of 2**-24, all of whose entries differ by up to `steps` of those."""
    count = shape[-1]
    p = 1 + rng.multinomial(2**24 - count, rng.dirichlet(np.full(count, 5.0), size=shape[:-1]))
    change = rng.integers(-steps, steps + 1, size=shape)
    change = np.where(p > 4 * steps * count, change, 0)
    change[..., 0] -= change.sum(axis=-1)
    return (p / 2**24).astype(np.float32), ((p + change) / 2**24).astype(np.float32)


def draw_positive(rng: np.random.Generator, count: int) -> np.ndarray:
    return ((1 + rng.multinomial(2**12 - count, np.full(count, 1 / count))) / 2**12).astype(np.float32)


def draw_grid(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Logits on a grid of 2**-10, whose differences are exact."""
    return (np.round(rng.normal(size=shape) * scale * 1024) / 1024).astype(np.float32)
