"""Information measures that are more than a sum of terms, each with its derivative in closed form.

Measures of probabilities take and drop the class axis; measures of logits keep it with length 1, like `_rows`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxent import _numerics, _softmax
from jaxent._sharding import ClassAxis

# ----------------------------------------------------------------------------------------------------------------------
# Renyi


def _log_mean(
    weights: jax.Array, exponents: jax.Array, excess: jax.Array, mass: jax.Array, d: float, axis: int
) -> jax.Array:
    """`log(S / mass) / d` of the sum `S = sum_k w_k exp(e_k)`, which is also `mass + d * excess`.

    Near order 1 `S` is nearly `mass` and its logarithm nearly 0: at d = 1e-6 `log(S) / d` has no digit. A sum below
    mass / 2 would cancel in `mass + d * excess`, and one beyond 3 mass / 2 might overflow there.
    """
    relative = d * excess / mass
    near = jnp.abs(relative) <= 0.5
    exponents = jnp.where(weights > 0, exponents, -jnp.inf)
    shift = jnp.max(exponents, axis=axis, keepdims=True)
    shift = jnp.where(jnp.isneginf(shift), 0, shift)
    far = shift + jnp.log(_sum(weights * jnp.exp(exponents - shift), axis) / mass)
    return jnp.where(near, jnp.log1p(jnp.where(near, relative, 0)), far) / d


def _sum(x: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(x, axis=axis, keepdims=True)


def renyi_entropy(p: jax.Array, *, axis: int, order: float) -> jax.Array:
    if order == 0:
        return jnp.log(jnp.sum(p > 0, axis=axis, dtype=jnp.int32).astype(p.dtype)) + 0 * jnp.sum(p, axis=axis)
    if order == 1:
        return jnp.sum(_numerics.entropy_term(p), axis=axis) / jnp.sum(p, axis=axis)
    if order == float("inf"):
        return -jnp.log(jnp.max(p, axis=axis))
    return jnp.squeeze(_renyi_entropy(p, axis, order), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _renyi_entropy(p: jax.Array, axis: int, order: float) -> jax.Array:
    d = order - 1
    safe = jnp.where(p == 0, 1, p)
    excess = _sum(jnp.where(p == 0, 0, _numerics.power_excess(safe, order)), axis)
    # p**order as p exp(d log p) or exp(order log p): the smaller exponent has the smaller error.
    weights, exponent = (p, d) if order >= 0.5 else (jnp.where(p == 0, 0, p / safe), order)
    return -_log_mean(weights, exponent * jnp.log(safe), excess, _sum(p, axis), d, axis)


@_renyi_entropy.defjvp
def _renyi_entropy_jvp(axis, order, primals, tangents):
    (p,), (dp,) = primals, tangents
    entropy = _renyi_entropy(p, axis, order)
    slope = _numerics.power_entropy_slope(p, order, entropy) / _sum(p, axis)
    return entropy, _sum(slope * dp, axis)


def renyi_divergence(p: jax.Array, q: jax.Array, *, axis: int, order: float) -> jax.Array:
    if 0 < order < 0.5:
        # D_a(P || Q) = a / (1 - a) D_{1-a}(Q || P): near a = 0 the terms below would cancel.
        return order / (1 - order) * renyi_divergence(q, p, axis=axis, order=1 - order)
    if order == 0:
        missed, met = (jnp.sum(jnp.where(kept, q, 0), axis=axis) for kept in (p == 0, p > 0))
        return jnp.log1p(missed / met) + 0 * jnp.sum(p, axis=axis)
    if order == 1:
        return jnp.sum(_numerics.kl_term(p, q), axis=axis) / jnp.sum(p, axis=axis)
    poles = jnp.zeros_like(p)
    if order > 1:
        poles = _numerics.pole(p, q)
        infinite = jnp.isinf(jnp.max(poles, axis=axis, keepdims=True))
        p, q = jnp.where(infinite, 1, p), jnp.where(infinite, 1, q)
    if order == float("inf"):
        support, log_r = _supported_log_ratio(p, q)
        regular = jnp.max(jnp.where(p == 0, -jnp.inf, jnp.where(support, log_r, p + q)), axis=axis)
    else:
        regular = jnp.squeeze(_renyi_divergence(p, q, axis, order), axis)
    return regular + jnp.sum(poles, axis=axis)


def _supported_log_ratio(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where both are positive, and `log(p / q)` there, 0 elsewhere."""
    support = (p > 0) & (q > 0)
    return support, _numerics.log_ratio(jnp.where(support, p, 1), jnp.where(support, q, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _renyi_divergence(p: jax.Array, q: jax.Array, axis: int, order: float) -> jax.Array:
    # For orders of at least 1/2. With d = order - 1 and L = log(p / q), sum p exp(d L) = mass + d * sum of
    #   excess_k = (p exp(d L) - p) / d - (p - q) = [p L + (q - p)] + p (exp(d L) - 1 - d L) / d,
    # no term of which is negative for d > 0: it is right for d = 1e-6 as well as for P almost equal to Q.
    d = order - 1
    support, log_r = _supported_log_ratio(p, q)
    exponents = d * log_r
    near = jnp.abs(exponents) <= 1
    kl = _numerics.kl_given_log_ratio(p, q, log_r)
    excess = jnp.where(
        near,
        kl + p * _numerics.exp_tail(jnp.where(near, exponents, 0)) / d,
        p * jnp.expm1(exponents) / d - (p - q),
    )
    alone = jnp.where(p == 0, q, -order / d * p)
    excess = jnp.where(support, excess, alone)
    mass = _sum(p, axis) + d * _sum(p - q, axis)
    return _log_mean(jnp.where(q == 0, 0, p), exponents, _sum(excess, axis), mass, d, axis)


@_renyi_divergence.defjvp
def _renyi_divergence_jvp(axis, order, primals, tangents):
    (p, q), (dp, dq) = primals, tangents
    d = order - 1
    divergence = _renyi_divergence(p, q, axis, order)
    support, log_r = _supported_log_ratio(p, q)
    by_p = order / d * jnp.expm1(d * (log_r - divergence))
    by_p = jnp.where(support, by_p, jnp.where((p == 0) & (d < 0), 0, -order / d))
    by_q = -jnp.expm1(order * log_r - d * divergence)
    by_q = jnp.where(support, by_q, jnp.where((p == 0) & ((q > 0) | (d > 0)), 1, 0))
    mass = _sum(p, axis) + d * _sum(p - q, axis)
    return divergence, _sum(by_p * dp + by_q * dq, axis) / mass


# ----------------------------------------------------------------------------------------------------------------------
# Two variables


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _others(p: jax.Array, axis: int) -> jax.Array:
    """`sum_{j != k} p_j` for each k; the largest entry is left out of its own sum, where `sum(p) - p` would cancel."""
    p = lax.optimization_barrier(p)  # XLA may compute it anew in each use, and round it otherwise
    largest = jnp.max(p, axis=axis, keepdims=True)
    top = p == largest
    ties = _sum(top.astype(p.dtype), axis)
    below = _sum(jnp.where(top, 0, p), axis) + (ties - 1) * largest
    return jnp.where(top, below, (below - p) + largest)


@_others.defjvp
def _others_jvp(axis, primals, tangents):
    (p,), (dp,) = primals, tangents
    return _others(p, axis), _sum(dp, axis) - dp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _conditional_surprise(p: jax.Array, axis: int) -> jax.Array:
    """`-log(p_k / sum_j p_j)`, relatively accurate when one entry has nearly all; 0 at `p = 0`."""
    safe = jnp.where(p == 0, 1, p)
    others = _others(p, axis)
    surprise = jnp.where(others <= safe, jnp.log1p(others / safe), _numerics.log_ratio(others + safe, safe))
    return jnp.where(p == 0, 0, surprise)


@_conditional_surprise.defjvp
def _conditional_surprise_jvp(axis, primals, tangents):
    (p,), (dp,) = primals, tangents
    safe = jnp.where(p == 0, 1, p)
    total = jnp.where(p == 0, 1, _sum(p, axis))
    own = _numerics.ratio(_others(p, axis), safe)
    tangent = ((_sum(dp, axis) - dp) - own * dp) / total
    return _conditional_surprise(p, axis), jnp.where(p == 0, 0, tangent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _conditional_entropy(p: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(p * _conditional_surprise(p, axis), axis=(-2, -1))


@_conditional_entropy.defjvp
def _conditional_entropy_jvp(axis, primals, tangents):
    (p,), (dp,) = primals, tangents
    return _conditional_entropy(p, axis), jnp.sum(_conditional_surprise(p, axis) * dp, axis=(-2, -1))


def conditional_entropy(p: jax.Array, *, axis: int) -> jax.Array:
    """`axis` (-1 or -2) is the variable that is known; the entropy left is that of the other one."""
    return _conditional_entropy(p, -3 - axis)


@jax.custom_jvp
def _dependence(p: jax.Array) -> jax.Array:
    """`log(p_xy / (p_x p_y))`; 0 at `p = 0`."""
    safe, p_x, p_y = (jnp.where(p == 0, 1, x) for x in (p, _sum(p, -1), _sum(p, -2)))
    q = p_x * p_y
    # The product of two marginals of 1e-20 is no float32 number.
    split = _numerics.log_ratio(safe, p_x) - jnp.log(p_y)
    return jnp.where(q >= float(jnp.finfo(p.dtype).tiny), _numerics.log_ratio(safe, q), split)


@_dependence.defjvp
def _dependence_jvp(primals, tangents):
    (p,), (dp,) = primals, tangents
    safe, p_x, p_y = (jnp.where(p == 0, 1, x) for x in (p, _sum(p, -1), _sum(p, -2)))
    tangent = dp / safe - _sum(dp, -1) / p_x - _sum(dp, -2) / p_y
    return _dependence(p), jnp.where(p == 0, 0, tangent)


@jax.custom_jvp
def mutual_information(p: jax.Array) -> jax.Array:
    """The divergence of `p` from the product of its marginals.

    Near independence the rounding of the marginals costs only second order, because the product has the marginals of
    `p`: in float32 5e-15, and with the rounding of the product 2e-4 of an information of 5e-11 (40 x 30 classes).
    """
    q = _sum(p, -1) * _sum(p, -2)
    return jnp.sum(jnp.where(p == 0, q, _numerics.kl_given_log_ratio(p, q, _dependence(p))), axis=(-2, -1))


@mutual_information.defjvp
def _mutual_information_jvp(primals, tangents):
    (p,), (dp,) = primals, tangents
    return mutual_information(p), jnp.sum(_dependence(p) * dp, axis=(-2, -1))


# ----------------------------------------------------------------------------------------------------------------------
# Two rows of logits


def kl_rows(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`D(softmax(z_p) || softmax(z_q))` of each row; +inf where `z_q` has removed a class that `z_p` has."""
    return _kl_rows(z_p, z_q, classes) + _pole(z_p, z_q, classes)


def _lost_mass(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """The probability under P of the classes that Q has removed."""
    return classes.sum(jnp.where(jnp.isneginf(z_q), _softmax.softmax(z_p, classes), 0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pole(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`+inf` where mass is lost, else 0; the derivative by `z_p` is infinite, with the sign of the lost mass's."""
    return jnp.where(_lost_mass(z_p, z_q, classes) > 0, jnp.inf, 0).astype(z_p.dtype)


@_pole.defjvp
def _pole_jvp(classes, primals, tangents):
    # Twice the largest number, as in `_numerics.pole`: inf itself would make nan of 0 tangents and 0 coefficients.
    (z_p, z_q), (dz_p, _) = primals, tangents
    lost = _lost_mass(z_p, z_q, classes)
    big = jnp.where(lost > 0, float(jnp.finfo(z_p.dtype).max), 0).astype(z_p.dtype)
    slope = _softmax.softmax(z_p, classes) * (jnp.isneginf(z_q).astype(z_p.dtype) - lost)
    sign = jnp.sign(slope) + (slope - lax.stop_gradient(slope)) * big
    return _pole(z_p, z_q, classes), classes.sum((dz_p * (sign * big)) * big)


def cross_entropy_rows(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`H(P, Q) = H(P) + D(P || Q)`: neither is negative, and a class that both have removed is in neither."""
    return _softmax.entropy(z_p, classes) + kl_rows(z_p, z_q, classes)


def _centred_differences(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`c_k = d_k - E_p[d]` with `d = z_q - z_p`, 0 where a class is not in both; `E_p[d]`; and the shift of `z_q`.

    Each is shifted first, so that a constant added to either leaves the digits of `d` alone, and both at the class with
    the largest `z_p`: there `c` is then `-E_p[d]` with the digits of a sum over the other classes.
    """
    both = ~(jnp.isneginf(z_p) | jnp.isneginf(z_q))
    shift_p = _softmax.normalizer(z_p, classes).shift
    there = classes.max(jnp.where(z_p == shift_p, z_q, -jnp.inf))
    shift_q = jnp.where(jnp.isneginf(there), _softmax.normalizer(z_q, classes).shift, there)
    differences = jnp.where(both, (z_q - shift_q) - (z_p - shift_p), 0)
    mean = classes.sum(_softmax.softmax(z_p, classes) * differences)
    return jnp.where(both, differences - mean, 0), mean, shift_q


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl_rows(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`log E_p[exp(c)] = log1p(sum_k p_k (exp(c_k) - 1 - c_k))`: no term is negative, whatever the size of the sum.

    Above 1 the sum may overflow, and the divergence is large enough for `sum_k p_k L_k + (q_k - p_k)`.
    """
    p, q = _softmax.softmax(z_p, classes), _softmax.softmax(z_q, classes)
    row_p, row_q = _softmax.normalizer(z_p, classes), _softmax.normalizer(z_q, classes)
    removed_p, removed_q = jnp.isneginf(z_p), jnp.isneginf(z_q)
    centred, mean, shift_q = _centred_differences(z_p, z_q, classes)
    near = jnp.abs(centred) <= 1
    small = p * _numerics.exp_tail(jnp.where(near, centred, 0))
    # p exp(c) as one exponential: `p` alone may be 0 where the product is not.
    large = jnp.exp((z_q - shift_q) - mean - row_p.log_total) - p * (1 + centred)
    growth = classes.sum(jnp.where(removed_q, 0, jnp.where(near & ~removed_p, small, large)))
    log_r = ((z_p - row_p.shift) - row_p.log_total) - ((z_q - row_q.shift) - row_q.log_total)
    terms = jnp.where(removed_p, q, _numerics.kl_given_log_ratio(p, q, jnp.where(removed_p | removed_q, 0, log_r)))
    return jnp.where(growth <= 1, jnp.log1p(growth), classes.sum(jnp.where(removed_q, 0, terms)))


@_kl_rows.defjvp
def _kl_rows_jvp(classes, primals, tangents):
    # By z_p: p_k (log(p_k / q_k) - D) = -p_k c_k. By z_q: q_k - p_k = p_k expm1(c_k - D).
    (z_p, z_q), (dz_p, dz_q) = primals, tangents
    divergence = _kl_rows(z_p, z_q, classes)
    p, q = _softmax.softmax(z_p, classes), _softmax.softmax(z_q, classes)
    centred, _, _ = _centred_differences(z_p, z_q, classes)
    log_q_over_p = centred - divergence
    near = (jnp.abs(log_q_over_p) <= 1) & ~jnp.isneginf(z_p) & (_lost_mass(z_p, z_q, classes) == 0)
    by_q = jnp.where(near, p * jnp.expm1(jnp.where(near, log_q_over_p, 0)), q - p)
    return divergence, classes.sum(by_q * dz_q - p * centred * dz_p)


def jensen_shannon_rows(z_p: jax.Array, z_q: jax.Array, mixture: jax.Array, classes: ClassAxis) -> jax.Array:
    """`b D(P || M) + (1 - b) D(Q || M)` of each row, with `M = b P + (1 - b) Q`."""
    log_p, log_q = _softmax.log_softmax(z_p, classes), _softmax.log_softmax(z_q, classes)
    removed = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    log_m = jnp.logaddexp(
        jnp.where(removed, 0, log_p) + jnp.log(mixture), jnp.where(removed, 0, log_q) + jnp.log1p(-mixture)
    )
    log_m = jnp.where(removed, -jnp.inf, log_m)
    return mixture * kl_rows(log_p, log_m, classes) + (1 - mixture) * kl_rows(log_q, log_m, classes)
