"""Safe arithmetic on probabilities: terms of the information measures and their closed-form derivatives.

Every term is exact where the textbook formula subtracts two nearly equal numbers, and every singular point is taken
out of the operand before the singular operation: a nan in the branch that `where` drops would reach the gradient as
0 * nan.

Operands are in the accumulation dtype, finite and at least 0, or nan (`in_domain`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._mesh.class_axis import row_sum


def in_domain(*operands: jax.Array) -> tuple[jax.Array, ...]:
    """The operands, nan in all of them, and so in all derivatives, where one is negative, infinite or nan."""
    valid = functools.reduce(jnp.logical_and, ((x >= 0) & (x < jnp.inf) for x in operands))
    return tuple(x + jnp.where(valid, 0, jnp.nan).astype(x.dtype) for x in operands)


def _polynomial(coefficients: list[float], x: jax.Array) -> jax.Array:
    """Horner's scheme; float32 leaves out the coefficients that only float64 can see."""
    kept = coefficients if x.dtype == jnp.float64 else coefficients[: (len(coefficients) + 1) // 2]
    total = jnp.full_like(x, kept[-1])
    for c in reversed(kept[:-1]):
        total = total * x + c
    return total


# 18 terms reach 1/20! = 4e-19 at |y| = 1, the 9 of float32 1/11! = 3e-8 of a sum that is about 1/2.
_EXP_TAIL = [1 / math.factorial(n + 2) for n in range(18)]


def exp_tail(y: jax.Array) -> jax.Array:
    """`exp(y) - 1 - y` for |y| <= 1, never negative: `expm1(y) - y` at 1e-4 keeps three digits of 5e-9."""
    return y * y * _polynomial(_EXP_TAIL, y)


@jax.custom_jvp
def expm1(x: jax.Array) -> jax.Array:
    """`exp(x) - 1`; JAX's own rule has the derivative `expm1(x) + 1`, which is 0 below x = -17."""
    return jnp.expm1(x)


@expm1.defjvp
def _expm1_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return expm1(x), jnp.exp(x) * dx


@jax.custom_jvp
def _tanh(x: jax.Array) -> jax.Array:
    """The hyperbolic tangent, with a slope that keeps its digits: `1 - t^2` of JAX's own rule is 0 beyond 9."""
    return jnp.tanh(x)


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _tanh(x), _squared_sech(x) * dx


@jax.custom_jvp
def soft_cap(x: jax.Array, cap: jax.Array) -> jax.Array:
    """`c tanh(x / c)`; plain JAX gives rounding for its derivative with respect to a cap far above `x`."""
    return cap * _tanh(x / cap)


@soft_cap.defjvp
def _soft_cap_jvp(primals, tangents):
    (x, cap), (dx, d_cap) = primals, tangents
    u = x / cap
    return soft_cap(x, cap), _squared_sech(u) * dx + _tanh_excess(u) * d_cap


@jax.custom_jvp
def _squared_sech(x: jax.Array) -> jax.Array:
    """`1 - tanh(x)^2`, as `4 s / (1 + s)^2` with `s = exp(-2 |x|)`."""
    s = jnp.exp(-2 * jnp.abs(x))
    return 4 * s / jnp.square(1 + s)


@_squared_sech.defjvp
def _squared_sech_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _squared_sech(x), -2 * _tanh(x) * _squared_sech(x) * dx


# sum_n (2 x)^(2 n + 3) / (2 n + 3)!: sinh(2 x) - 2 x.
_SINH_TAIL = [2 ** (2 * n + 3) / math.factorial(2 * n + 3) for n in range(12)]


@jax.custom_jvp
def _tanh_excess(x: jax.Array) -> jax.Array:
    """`tanh(x) - x sech(x)^2`, as `(sinh(2 x) - 2 x) sech(x)^2 / 2` where the difference would cancel."""
    near = jnp.abs(x) < 1
    y = jnp.where(near, x, 0)
    series = y * y * y * _polynomial(_SINH_TAIL, y * y) * _squared_sech(y) / 2
    return jnp.where(near, series, _tanh(x) - x * _squared_sech(x))


@_tanh_excess.defjvp
def _tanh_excess_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _tanh_excess(x), 2 * x * _tanh(x) * _squared_sech(x) * dx


def bounded(coefficient: jax.Array) -> jax.Array:
    """At most the largest finite number: an infinite coefficient would make nan of a tangent of 0."""
    largest = float(jnp.finfo(coefficient.dtype).max)
    return jnp.clip(coefficient, -largest, largest)


# ----------------------------------------------------------------------------------------------------------------------
# Ratios of positive numbers


@jax.custom_jvp
def ratio(p: jax.Array, q: jax.Array) -> jax.Array:
    """`p / q`; JAX's own rule squares `q` and overflows below 1e-19."""
    return p / q


@jax.custom_jvp
def excess(p: jax.Array, q: jax.Array) -> jax.Array:
    """`(p - q) / q`, which is `p / q - 1` with all of its digits."""
    return (p - q) / q


def _ratio_tangent(p: jax.Array, q: jax.Array, dp: jax.Array, dq: jax.Array) -> jax.Array:
    return (dp - ratio(p, q) * dq) * reciprocal(q)


@ratio.defjvp
def _ratio_jvp(primals, tangents):
    return ratio(*primals), _ratio_tangent(*primals, *tangents)


@excess.defjvp
def _excess_jvp(primals, tangents):
    return excess(*primals), _ratio_tangent(*primals, *tangents)


@jax.custom_jvp
def root_ratio(p: jax.Array, q: jax.Array) -> jax.Array:
    """`sqrt(p / q)`, where the quotient may overflow or underflow."""
    return jnp.sqrt(p) / jnp.sqrt(q)


@root_ratio.defjvp
def _root_ratio_jvp(primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    return root_ratio(p, q), root_ratio(p, q) * (dp * reciprocal(p) - dq * reciprocal(q)) / 2


@jax.custom_jvp
def reciprocal(x: jax.Array) -> jax.Array:
    """`1 / x`, which is finite, as its derivative is: times a tangent of 0 they are 0."""
    return bounded(1 / x)


@reciprocal.defjvp
def _reciprocal_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return reciprocal(x), -bounded(reciprocal(x) * reciprocal(x)) * dx


@jax.custom_jvp
def log(x: jax.Array) -> jax.Array:
    """Of positive numbers; JAX's own rule divides, and its second derivative squares `x`."""
    return jnp.log(x)


@log.defjvp
def _log_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log(x), dx * reciprocal(x)


def log_ratio_with_gap(p: jax.Array, q: jax.Array, gap: jax.Array) -> jax.Array:
    """`log(p / q)`, given `p - q` as exactly as the caller has it.

    `log p - log q` at p = 0.5, q = 0.50001 is wrong in the third digit, hence `log1p((p - q) / q)`, where the
    subtraction is exact within a factor of two. Further away the quotient's logarithm (jaxlib 0.10's float64 `log1p` is
    wrong by 119 ulp around -0.4), unless the quotient overflows or underflows: then the difference of the logarithms is
    at least 87 and good to a few ulp.
    """
    near = jnp.abs(gap) <= q / 4
    quotient = p / q
    info = jnp.finfo(p.dtype)
    in_range = (quotient >= float(info.tiny)) & (quotient <= float(info.max))
    far = jnp.where(in_range, jnp.log(quotient), jnp.log(p) - jnp.log(q))
    return jnp.where(near, jnp.log1p(gap / q), far)


@jax.custom_jvp
def log_ratio(p: jax.Array, q: jax.Array) -> jax.Array:
    """`log(p / q)` with full relative accuracy, however near to 0 or large."""
    return log_ratio_with_gap(p, q, p - q)


@log_ratio.defjvp
def _log_ratio_jvp(primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    return log_ratio(p, q), dp * reciprocal(p) - dq * reciprocal(q)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_of_others(p: jax.Array, axis: int) -> jax.Array:
    """`sum_{j != k} p_j` for each k; the largest entry is left out of its own sum, where `sum(p) - p` would cancel."""
    p = lax.optimization_barrier(p)  # XLA may recompute it at each use, and round it differently
    largest = jnp.max(p, axis=axis, keepdims=True)
    top = p == largest
    ties = row_sum(top.astype(p.dtype), axis)
    below = row_sum(jnp.where(top, 0, p), axis) + (ties - 1) * largest
    return jnp.where(top, below, (below - p) + largest)


@sum_of_others.defjvp
def _sum_of_others_jvp(axis, primals, tangents):
    (p,), (dp,) = primals, tangents
    return sum_of_others(p, axis), row_sum(dp, axis) - dp


# ----------------------------------------------------------------------------------------------------------------------
# Poles


def infinite_factors(at: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest number and a large one, or 0 and 0, for coefficients that are infinite there.

    A coefficient of inf would turn the zero tangents of the other classes into nan (0 * inf). The tangent takes the one
    factor and the cotangent the other, and each product is finite by itself.
    """
    largest = jnp.where(at, float(jnp.finfo(like.dtype).max), 0)
    large = jnp.where(at, large_number(like), 0)
    return largest.astype(like.dtype), large.astype(like.dtype)


def large_number(like: jax.Array) -> float:
    """One whose square is infinite, and which stays finite times 2**23 in float32 (heuristic)."""
    return 2.0 ** (jnp.finfo(like.dtype).maxexp * 13 // 16)


@jax.custom_jvp
def pole(p: jax.Array, q: jax.Array) -> jax.Array:
    """`+inf` where `p > 0` and `q = 0`, else 0: what `-p log q` and `p log(p / q)` have there.

    The derivative is +inf w.r.t. `p` and -inf w.r.t. `q`; the second +inf w.r.t. `q`, and the mixed one -inf.
    """
    return jnp.where((p > 0) & (q == 0), jnp.inf, 0).astype(p.dtype)


@pole.defjvp
def _pole_jvp(primals, tangents):
    # The terms in `q` and `p - p` are 0 here, and give the next derivative.
    (p, q), (dp, dq) = primals, tangents
    largest, large = infinite_factors((p > 0) & (q == 0), p)
    by_p = largest - q * large
    by_q = by_p + (p - lax.stop_gradient(p)) * large
    return pole(p, q), (dp * by_p) * large - (dq * by_q) * large


@jax.custom_jvp
def infinity(log_p: jax.Array, at: jax.Array) -> jax.Array:
    """`+inf` there, else 0: the pole of a probability that is given by its logarithm, with derivatives of +inf."""
    return jnp.where(at, jnp.inf, 0).astype(log_p.dtype)


@infinity.defjvp
def _infinity_jvp(primals, tangents):
    (log_p, at), (d_log_p, _) = primals, tangents
    largest, large = infinite_factors(at, log_p)
    slope = largest + (log_p - lax.stop_gradient(log_p)) * large
    return infinity(log_p, at), (d_log_p * slope) * large


# ----------------------------------------------------------------------------------------------------------------------
# Terms of the measures


@jax.custom_jvp
def _entropy(p: jax.Array) -> jax.Array:
    return -p * jnp.log(p)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    (p,), (dp,) = primals, tangents
    return _entropy(p), -(1 + log(p)) * dp


def entropy_term(p: jax.Array) -> jax.Array:
    """`-p log p`; 0, with all derivatives 0, at `p = 0`."""
    return jnp.where(p == 0, 0, _entropy(jnp.where(p == 0, 1, p)))


@jax.custom_jvp
def _cross_entropy(p: jax.Array, q: jax.Array) -> jax.Array:
    return -p * jnp.log(q)


@_cross_entropy.defjvp
def _cross_entropy_jvp(primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    return _cross_entropy(p, q), -log(q) * dp - ratio(p, q) * dq


def cross_entropy_term(p: jax.Array, q: jax.Array) -> jax.Array:
    """`-p log q`; 0 at `p = 0`, also where `q = 0`; +inf at `p > 0`, `q = 0`."""
    return _cross_entropy(p, jnp.where(q == 0, 1, q)) + pole(p, q)


def kl_given_log_ratio(p: jax.Array, q: jax.Array, log_r: jax.Array) -> jax.Array:
    """`p log(p / q) + (q - p)`, never negative, for positive `p` and `q`.

    Near `p = q` this is `p (d + expm1(-d))` with `d = log(p / q)` in one series. Summed over 1000 classes,
    `p (log p - log q)` gives -1.8e-7 where the truth is 4.9e-9.
    """
    near = jnp.abs(log_r) <= 1
    return jnp.where(near, p * exp_tail(jnp.where(near, -log_r, 0)), p * log_r + (q - p))


@jax.custom_jvp
def kl_of_positive(p: jax.Array, q: jax.Array) -> jax.Array:
    return kl_given_log_ratio(p, q, log_ratio(p, q))


@kl_of_positive.defjvp
def _kl_of_positive_jvp(primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    return kl_of_positive(p, q), log_ratio(p, q) * dp - excess(p, q) * dq


def kl_term(p: jax.Array, q: jax.Array) -> jax.Array:
    """`p log(p / q) + (q - p)`; `q`, with derivative 0 w.r.t. `p`, at `p = 0`; +inf at `p > 0`, `q = 0`."""
    dropped = (p == 0) | (q == 0)
    term = kl_of_positive(jnp.where(dropped, 1, p), jnp.where(dropped, 1, q))
    return jnp.where(p == 0, q, term) + pole(p, q)
