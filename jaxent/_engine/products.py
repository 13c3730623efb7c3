"""Matrix products whose operands may be narrower than their sums, differentiable any number of times.

JAX's transpose of a product with bf16 operands and a float32 result has a float32 operand, or a result rounded to
bf16. Here every product, of whatever derivative, has operands in the one dtype and a result in the dtype of its sums.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._arguments import arrays
from jaxent._arguments.options import Precision
from jaxent._engine import cpu_products
from jaxent._mesh.types import pcast_like

Axes = tuple[int, int]
"""Which axis of the first operand is contracted, and which of the second."""


class Operand(NamedTuple):
    """`narrow * unit`, a constant, with the derivative of `wide`, whose value is not read."""

    narrow: jax.Array
    wide: jax.Array
    unit: jax.Array | None = None


def operand(x: jax.Array, dtype: np.dtype) -> jax.Array | Operand:
    """An array as an operand of that dtype: an `Operand` if it is narrower than its sums."""
    if dtype == arrays.accumulation_dtype(dtype):
        return x.astype(dtype)
    return Operand(lax.stop_gradient(x.astype(dtype)), _derivative_of(x))


def scaled_operand(x: jax.Array, dtype: np.dtype) -> jax.Array | Operand:
    """The same of a gradient or a tangent, in a unit that its products are multiplied by.

    float16 holds nothing below 6e-8, where the gradients of most classes are as soon as the loss is a mean. In units of
    a power of two near the largest entry only what is 2**-29 of that is lost, and a tangent may be 2**11 times as large
    as that entry.
    """
    if dtype != np.float16:
        return operand(x, dtype)
    unit = unit_of(x)
    return Operand((lax.stop_gradient(x) / unit).astype(dtype), x, unit)


def unit_of(x: jax.Array) -> jax.Array:
    """The power of two in which `x` is rounded to float16, a constant."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1))
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.maximum(exponent, -100) - 5)


def dtype_of(x: jax.Array | Operand) -> np.dtype:
    return np.dtype(x.narrow.dtype if isinstance(x, Operand) else x.dtype)


def gradient_like(x: jax.Array | Operand) -> jax.Array:
    """What a gradient with respect to an operand is typed like."""
    return x.wide if isinstance(x, Operand) else x


def _derivative_of(x: jax.Array) -> jax.Array:
    return x if x.dtype == np.float32 else zeros_with_derivative(x)


@jax.custom_jvp
def zeros_with_derivative(x: jax.Array) -> jax.Array:
    """float32 zeros with the derivative of `x`."""
    return jnp.zeros_like(x, dtype=np.float32) + only_by_rule(x)


@zeros_with_derivative.defjvp
def _zeros_with_derivative_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    zeros = zeros_with_derivative(x)
    return zeros, dx.astype(zeros.dtype)


@jax.custom_vjp
def only_by_rule(x: jax.Array) -> jax.Array:
    """A zero in a function whose derivative is that of its rule. Without the rule one with respect to `x` would
    be lost: it is an error.
    """
    return _nothing(x).astype(np.float32)


def _only_by_rule_forward(x: jax.Array) -> Any:
    raise NotImplementedError(
        "jaxent: before jax 0.12, jax.lax.scan drops the derivative rules of its body when it is differentiated twice, "
        "and this derivative of a product of narrow operands would be wrong. Differentiate inside the scan: let its "
        "body add up jax.grad, or jax.jvp of jax.grad, of the loss of a step. Or pass float32, without `dtype`"
    )


only_by_rule.defvjp(_only_by_rule_forward, _only_by_rule_forward)


def product(axes: Axes, precision: Precision, a: jax.Array | Operand, b: jax.Array | Operand) -> jax.Array:
    """The product of two matrices, in at least float32."""
    if isinstance(a, Operand) and isinstance(b, Operand):
        return _product(axes, precision, a, b)
    assert not isinstance(a, Operand)
    assert not isinstance(b, Operand)
    return _dot(axes, precision, a, b)


def _dot(axes: Axes, precision: Precision, a: jax.Array, b: jax.Array) -> jax.Array:
    if axes == (1, 1) and cpu_products.has_kernel_first(a, b):
        return cpu_products.turned(_dot_as_given(axes, precision, b, a))
    if axes == (1, 0) and cpu_products.turns_for_logits(a, b):
        return _dot_as_given((0, 0), precision, cpu_products.turned(a), b)
    if axes == (0, 0) and cpu_products.turns_for_kernel(a, b):
        return _dot_as_given((1, 0), precision, cpu_products.turned(a), b)
    return _dot_as_given(axes, precision, a, b)


def _dot_as_given(axes: Axes, precision: Precision, a: jax.Array, b: jax.Array) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    dtype = arrays.accumulation_dtype(a, b)
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(axes: Axes, precision: Precision, a: Operand, b: Operand) -> jax.Array:
    z = _dot(axes, precision, a.narrow, b.narrow)
    for unit in (a.unit, b.unit):
        z = z if unit is None else z * unit.astype(z.dtype)
    return z + (only_by_rule(a.wide) + only_by_rule(b.wide)).astype(z.dtype)


def _product_jvp(axes, precision, primals, tangents):
    a, b = primals
    da, db = (tangent.wide for tangent in tangents)
    of_a, of_b = axes
    z = _product(axes, precision, a, b)
    dz = []
    if not isinstance(da, jax.custom_derivatives.SymbolicZero):
        back = ((1, 1 - of_b), False) if of_a == 1 else ((1 - of_b, 1), True)
        dz.append(_linear((axes, False), back, precision, da, b))
    if not isinstance(db, jax.custom_derivatives.SymbolicZero):
        back = ((1 - of_a, 0), True) if of_b == 0 else ((0, 1 - of_a), False)
        dz.append(_linear((axes, True), back, precision, db, a))
    return z, sum(dz[1:], dz[0]) if dz else jnp.zeros_like(z)


_product.defjvp(_product_jvp, symbolic_zeros=True)


def _linear(forth: tuple[Axes, bool], back: tuple[Axes, bool], precision: Precision, t: jax.Array, n: Operand) -> Any:
    """The product of `t` with `n`, and on the way back the product of a cotangent with `n`: linear in `t`.

    `forth` and `back` are the axes, and whether `n` comes first. Only a linear solve has a transpose of its own that is
    differentiable, too. With A = [[1, 0], [-N, 1]] the system [[0, A'], [A, 0]] (x, y) = (r, s) has the solution
    A x = s, A' y = r, in which N multiplies one part of s, and its transpose one part of r; and it is symmetric, so
    that no product is left to JAX to transpose.
    """

    def times(way: tuple[Axes, bool], t: jax.Array, n: Operand) -> jax.Array:
        axes, n_first = way
        other = scaled_operand(t, n.narrow.dtype)
        return product(axes, precision, n, other) if n_first else product(axes, precision, other, n)

    def matvec(xy: Any) -> Any:
        (x1, x2), (y1, y2) = xy
        none = _nothing(n.wide)
        r = y1 - times(back, y2, n), y2 + none
        s = x1 + none, x2 - times(forth, x1, n)
        return r, s

    def solve(_: Any, rs: Any) -> Any:
        (r1, r2), (s1, s2) = rs
        return (s1, s2 + times(forth, s1, n)), (r1 + times(back, r2, n), r2)

    z = jax.eval_shape(lambda: times(forth, t, n))
    t = pcast_like(t, [z])
    none = _nothing(t)
    zero_t, zero_z = jnp.broadcast_to(none, t.shape), jnp.broadcast_to(none, z.shape)
    (x1, x2), (y1, y2) = lax.custom_linear_solve(matvec, ((zero_t, zero_z), (t, zero_z)), solve, solve, symmetric=True)
    # JAX takes no system of which a part is not moving, or not used.
    return x2 + _nothing(x1) + _nothing(y1) + _nothing(y2)


def _nothing(x: jax.Array) -> jax.Array:
    """A zero that depends on `x`, as far as JAX knows."""
    return jnp.where(np.False_, jnp.sum(x), 0)
