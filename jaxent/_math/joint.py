"""Measures of several variables, from a table of their joint probabilities.

The table has the classes of X at -2 and those of Y at -1. Where something is known of a third variable Z, its classes
lie at -3, and there is a table for each of them. Results keep the axes of the table with length 1.

A cell of probability 0 is a constant: the derivative with respect to it has an infinite limit, and is 0 by convention.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxent._math import safe
from jaxent._mesh.class_axis import kept_apart, row_sum

Axes = tuple[int, ...]


def _zeros_kept(p: jax.Array) -> jax.Array:
    return jnp.where(p == 0, 0, p)


def _or_one(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)


def entropy(p: jax.Array, *, axes: Axes) -> jax.Array:
    return row_sum(safe.entropy_term(p), axes)


# ----------------------------------------------------------------------------------------------------------------------
# What one variable leaves unknown about the other


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _conditional_surprise(p: jax.Array, axis: int) -> jax.Array:
    """`-log(p_k / sum_j p_j)`, relatively accurate when one entry has nearly all; 0 at `p = 0`."""
    positive = _or_one(p)
    others = safe.sum_of_others(p, axis)
    surprise = jnp.where(others <= positive, jnp.log1p(others / positive), safe.log_ratio(others + positive, positive))
    return jnp.where(p == 0, 0, surprise)


@_conditional_surprise.defjvp
def _conditional_surprise_jvp(axis, primals, tangents):
    (p,), (dp,) = primals, tangents
    total = jnp.where(p == 0, 1, row_sum(p, axis))
    own = safe.ratio(safe.sum_of_others(p, axis), _or_one(p))
    tangent = ((row_sum(dp, axis) - dp) - own * dp) * safe.reciprocal(total)
    return _conditional_surprise(p, axis), jnp.where(p == 0, 0, tangent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _conditional_entropy(p: jax.Array, axis: int) -> jax.Array:
    """The entropy along `axis` (-1 or -2), given the other axis."""
    return row_sum(p * _conditional_surprise(p, axis), (-2, -1))


@_conditional_entropy.defjvp
def _conditional_entropy_jvp(axis, primals, tangents):
    (p,), (dp,) = primals, tangents
    return _conditional_entropy(p, axis), row_sum(_conditional_surprise(p, axis) * dp, (-2, -1))


def entropy_of_x(p: jax.Array, *, axes: Axes) -> jax.Array:
    """`H(X | Y)`."""
    return _conditional_entropy(_zeros_kept(p), -2)


def entropy_of_y(p: jax.Array, *, axes: Axes) -> jax.Array:
    """`H(Y | X)`."""
    return _conditional_entropy(_zeros_kept(p), -1)


def variation(p: jax.Array, *, axes: Axes) -> jax.Array:
    """`H(X | Y) + H(Y | X)`."""
    return entropy_of_x(p, axes=axes) + entropy_of_y(p, axes=axes)


# ----------------------------------------------------------------------------------------------------------------------
# What one variable says about the other


def _product(p: jax.Array, given_z: bool) -> tuple[jax.Array, jax.Array]:
    """Factors of what independence would make of each cell: `p_x` and `p_y`, or `p_xz` and `p_yz / p_z`."""
    p_x, p_y = row_sum(p, -1), row_sum(p, -2)
    return p_x, safe.ratio(p_y, _or_one(row_sum(p, (-2, -1)))) if given_z else p_y


@jax.custom_jvp
def _log_quotient(p: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`log(p / (a b))` of positive numbers. The product of two of 1e-20 is no float32 number."""
    q = a * b
    split = safe.log_ratio(p, a) - jnp.log(b)
    return jnp.where(q >= float(jnp.finfo(p.dtype).tiny), safe.log_ratio(p, q), split)


@_log_quotient.defjvp
def _log_quotient_jvp(primals, tangents):
    # What a and b add is kept apart from the spreading over the table, whose transpose is a sum: see `row_sum`.
    (p, a, b), (dp, da, db) = primals, tangents
    by_p, by_a, by_b = (dx * safe.reciprocal(x) for dx, x in ((dp, p), (da, a), (db, b)))
    return _log_quotient(p, a, b), by_p - kept_apart(by_a) - kept_apart(by_b)


def _dependence(p: jax.Array, given_z: bool) -> jax.Array:
    """`log(p_xy / (p_x p_y))`, or the same of each table given Z; 0 at `p = 0`."""
    a, b = _product(p, given_z)
    return jnp.where(p == 0, 0, _log_quotient(*map(_or_one, (p, a, b))))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _information(p: jax.Array, given_z: bool) -> jax.Array:
    """The divergence of each table from the product of its marginals.

    Near independence the rounding of the marginals costs only second order, because the product has the marginals of
    `p`: in float32 5e-15, and with the rounding of the product 2e-4 of an information of 5e-11 (40 x 30 classes).
    """
    a, b = _product(p, given_z)
    q = a * b
    return row_sum(jnp.where(p == 0, q, safe.kl_given_log_ratio(p, q, _dependence(p, given_z))), (-2, -1))


@_information.defjvp
def _information_jvp(given_z, primals, tangents):
    (p,), (dp,) = primals, tangents
    return _information(p, given_z), row_sum(_dependence(p, given_z) * dp, (-2, -1))


def mutual_information(p: jax.Array, *, axes: Axes) -> jax.Array:
    return _information(_zeros_kept(p), False)


def conditional_mutual_information(p: jax.Array, *, axes: Axes) -> jax.Array:
    """Of a table with Z on its last axis."""
    return row_sum(_information(_zeros_kept(jnp.moveaxis(p, -1, -3)), True), -3)


def pointwise_mutual_information(p: jax.Array, *, axes: Axes) -> jax.Array:
    a, b = _product(p, False)
    possible = (a > 0) & (b > 0)
    value = _log_quotient(*map(_or_one, (p, a, b))) - safe.pole(jnp.ones_like(p), jnp.where(possible, p, 1))
    return jnp.where(possible | jnp.isnan(value), value, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Information as a share of entropy


def _root_of_product(h_x: jax.Array, h_y: jax.Array) -> jax.Array:
    # No root of either at 0, where its derivative is infinite: the share is 0 there in any case.
    return jnp.sqrt(jnp.where(h_x > 0, h_x, 1)) * jnp.sqrt(jnp.where(h_y > 0, h_y, 1))


def _mean(h_x: jax.Array, h_y: jax.Array) -> jax.Array:
    return (h_x + h_y) / 2


def _share(p: jax.Array, normalizer: Callable[[jax.Array, jax.Array], jax.Array] | None) -> jax.Array:
    """`I(X; Y)` divided by a mean of `H(X)` and `H(Y)`, or by `H(X, Y)`.

    Where one variable has a single class the share is 0, and 1 where both have; the support decides this, since
    the entropy of a class that has 0.9999999 is not 0.
    """
    p = _zeros_kept(p)
    p_x, p_y = row_sum(p, -1), row_sum(p, -2)
    of_x, of_y = (row_sum((x > 0).astype(jnp.int32), (-2, -1)) > 1 for x in (p_x, p_y))
    if normalizer is None:
        size = entropy(p, axes=(-2, -1))
    else:
        size = normalizer(entropy(p_x, axes=(-2, -1)), entropy(p_y, axes=(-2, -1)))
    varied = of_x & of_y
    share = safe.ratio(_information(p, False), jnp.where(varied, size, 1))
    return jnp.where(varied | jnp.isnan(share), share, jnp.where(of_x | of_y, 0, 1).astype(p.dtype))


def _share_of(normalizer: Callable[[jax.Array, jax.Array], jax.Array] | None) -> Callable[..., jax.Array]:
    def share(p: jax.Array, *, axes: Axes) -> jax.Array:
        return _share(p, normalizer)

    return share


SHARES = {
    "mean": _share_of(_mean),
    "min": _share_of(jnp.minimum),
    "max": _share_of(jnp.maximum),
    "geometric": _share_of(_root_of_product),
    "joint": _share_of(None),
}
