"""Hessian-vector products, many at once, against differences of the exact gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._check.gradient import Comparison
from jaxent.cli.check.case import Case
from jaxent.cli.check.references import WIDE

TANGENTS = 200  # so that what XLA fuses has more than 2^15 entries
EVERY = 10  # of them is compared
STEP = WIDE(2.0) ** -20  # of the differences: their error, its square, is far below a float32's
ALLOWED = 128.0  # ulp of the largest entry of a row; CPUs use a quarter of it
WAY = "jax.jvp of jax.grad"


def compare(case: Case) -> list[Comparison]:
    """The worst entry of the product for each argument."""
    rng = np.random.default_rng(0)
    args = tuple(jnp.asarray(x, dtype=jnp.float32) for x in case.args)
    tangents = tuple(rng.normal(size=(TANGENTS, *x.shape)).astype(np.float32) for x in args)
    gradient = jax.grad(case.function, tuple(range(len(args))))

    def product(*v: jax.Array) -> tuple[jax.Array, ...]:
        return jax.jvp(gradient, args, v)[1]

    found = [np.asarray(x, WIDE)[::EVERY] for x in jax.jit(jax.vmap(product))(*tangents)]
    expected = [_exact(case, [v[i].astype(WIDE) for v in tangents]) for i in range(0, TANGENTS, EVERY)]
    worst = []
    for i, got in enumerate(found):
        want = np.stack([products[i] for products in expected])
        scale = np.maximum(np.abs(want).max(-1, keepdims=True), np.finfo(np.float32).tiny)
        ulp = np.abs(got - want) / scale / np.finfo(np.float32).eps
        ulp = np.where(np.isnan(ulp), np.inf, ulp)
        at = np.unravel_index(int(np.argmax(ulp)), ulp.shape)
        numbers = float(got[at]), float(want[at]), float(ulp[at])
        worst.append(Comparison(WAY, f"args[{i}]", tuple(map(int, at[1:])), *numbers, ALLOWED))
    return worst


def _exact(case: Case, tangent: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    args = [x.astype(WIDE) for x in case.args]
    up, down = (
        case.oracle(*(x + sign * STEP * v for x, v in zip(args, tangent, strict=True))).gradients for sign in (1, -1)
    )
    return tuple((a - b) / (2 * STEP) for a, b in zip(up, down, strict=True))
