"""Divergences of two rows of logits. They keep the class axis with length 1, as `row_losses` does."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxent._math import safe, softmax
from jaxent._mesh.class_axis import ClassAxis


def kl_rows(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`D(softmax(z_p) || softmax(z_q))` of each row; +inf where `z_q` has removed a class that `z_p` has."""
    return _kl_rows(z_p, z_q, classes) + _pole(z_p, z_q, classes)


def _lost_mass(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """The probability under P of the classes that Q has removed."""
    return classes.sum(jnp.where(jnp.isneginf(z_q), softmax.softmax(z_p, classes), 0))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pole(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`+inf` where mass is lost, else 0; its derivative w.r.t. `z_p` is infinite, with the sign of the lost mass's."""
    return jnp.where(_lost_mass(z_p, z_q, classes) > 0, jnp.inf, 0).astype(z_p.dtype)


@_pole.defjvp
def _pole_jvp(classes, primals, tangents):
    (z_p, z_q), (dz_p, _) = primals, tangents
    # The next derivative is as much larger in front of the softmax: behind it, reverse mode would subtract infinities.
    removed = jnp.isneginf(z_p)
    kept = jnp.where(removed, 0, z_p)
    moved = jnp.where(removed, z_p, kept + (kept - lax.stop_gradient(kept)) * safe.large_number(z_p))
    lost = _lost_mass(moved, z_q, classes)
    largest, large = safe.infinite_factors(lost > 0, z_p)
    slope = softmax.softmax(moved, classes) * (jnp.isneginf(z_q).astype(z_p.dtype) - lost)
    coefficient = jnp.sign(slope) * largest + (slope - lax.stop_gradient(slope))
    return _pole(z_p, z_q, classes), classes.sum((dz_p * coefficient) * large)


def cross_entropy_rows(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`H(P, Q) = H(P) + D(P || Q)`: neither is negative, and a class that both have removed is in neither."""
    return softmax.entropy(z_p, classes) + kl_rows(z_p, z_q, classes)


def _centred_differences(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`c_k = d_k - E_p[d]` with `d = z_q - z_p`, 0 where a class is not in both; `E_p[d]`; and the shift of `z_q`.

    Each is shifted first, so that a constant added to either leaves the digits of `d` alone, and both at the class with
    the largest `z_p`: there `c` is then `-E_p[d]` with the digits of a sum over the other classes.
    """
    both = ~(jnp.isneginf(z_p) | jnp.isneginf(z_q))
    shift_p = softmax.normalizer(z_p, classes).shift
    there = classes.max(jnp.where(z_p == shift_p, z_q, -jnp.inf))
    shift_q = jnp.where(jnp.isneginf(there), softmax.normalizer(z_q, classes).shift, there)
    differences = jnp.where(both, (z_q - shift_q) - (z_p - shift_p), 0)
    mean = classes.sum(softmax.softmax(z_p, classes) * differences)
    return jnp.where(both, differences - mean, 0), mean, shift_q


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl_rows(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`log E_p[exp(c)] = log1p(sum_k p_k (exp(c_k) - 1 - c_k))`: no term is negative, whatever the size of the sum.

    Above 1 the sum may overflow, and the divergence is large enough for `sum_k p_k L_k + (q_k - p_k)`.
    """
    p, q = softmax.softmax(z_p, classes), softmax.softmax(z_q, classes)
    row_p, row_q = softmax.normalizer(z_p, classes), softmax.normalizer(z_q, classes)
    removed_p, removed_q = jnp.isneginf(z_p), jnp.isneginf(z_q)
    centred, mean, shift_q = _centred_differences(z_p, z_q, classes)
    near = jnp.abs(centred) <= 1
    small = p * safe.exp_tail(jnp.where(near, centred, 0))
    # p exp(c) as one exponential: `p` alone may be 0 where the product is not.
    large = jnp.exp((z_q - shift_q) - mean - row_p.log_total) - p * (1 + centred)
    growth = classes.sum(jnp.where(removed_q, 0, jnp.where(near & ~removed_p, small, large)))
    log_r = ((z_p - row_p.shift) - row_p.log_total) - ((z_q - row_q.shift) - row_q.log_total)
    terms = jnp.where(removed_p, q, safe.kl_given_log_ratio(p, q, jnp.where(removed_p | removed_q, 0, log_r)))
    return jnp.where(growth <= 1, jnp.log1p(growth), classes.sum(jnp.where(removed_q, 0, terms)))


@_kl_rows.defjvp
def _kl_rows_jvp(classes, primals, tangents):
    (z_p, z_q), (dz_p, dz_q) = primals, tangents
    in_p = softmax.softmax(z_p, classes) * _centred(z_p, z_q, classes)
    return _kl_rows(z_p, z_q, classes), classes.sum(_gaps(z_p, z_q, classes) * dz_q - in_p * dz_p)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _gaps(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`q_k - p_k = p_k expm1(c_k - D)`, the derivative of the divergence with respect to `z_q`."""
    p, q = softmax.softmax(z_p, classes), softmax.softmax(z_q, classes)
    log_q_over_p = _centred(z_p, z_q, classes) - _kl_rows(z_p, z_q, classes)
    near = (jnp.abs(log_q_over_p) <= 1) & ~jnp.isneginf(z_p) & (_lost_mass(z_p, z_q, classes) == 0)
    return jnp.where(near, p * jnp.expm1(jnp.where(near, log_q_over_p, 0)), q - p)


@_gaps.defjvp
def _gaps_jvp(classes, primals, tangents):
    # The derivative of each softmax by itself keeps its digits where one class has nearly everything.
    dp, dq = (
        jax.jvp(lambda z: softmax.softmax(z, classes), (z,), (dz,))[1] for z, dz in zip(primals, tangents, strict=True)
    )
    return _gaps(*primals, classes), dq - dp


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _centred(z_p: jax.Array, z_q: jax.Array, classes: ClassAxis) -> jax.Array:
    """`d_k - E_p[d]` with `d = z_q - z_p`; `-p_k` times it is the derivative of the divergence w.r.t. `z_p`."""
    return _centred_differences(z_p, z_q, classes)[0]


@_centred.defjvp
def _centred_jvp(classes, primals, tangents):
    # Each tangent less its mean under P, and less what moving P does to the mean of d.
    (z_p, z_q), row = primals, softmax.normalizer(primals[0], classes)
    centred, p = _centred(z_p, z_q, classes), softmax.probabilities(z_p, row, classes)
    from_p, from_q = (softmax.log_probabilities_jvp(classes, (z_p, row), (dz, None))[1] for dz in tangents)
    tangent = (from_q - from_p) - classes.sum(p * from_p * centred)
    return centred, jnp.where(jnp.isneginf(z_p) | jnp.isneginf(z_q), 0, tangent)


def jensen_shannon_rows(z_p: jax.Array, z_q: jax.Array, mixture: jax.Array, classes: ClassAxis) -> jax.Array:
    """`b D(P || M) + (1 - b) D(Q || M)` of each row, with `M = b P + (1 - b) Q`."""
    log_p, log_q = softmax.log_softmax(z_p, classes), softmax.log_softmax(z_q, classes)
    removed = jnp.isneginf(log_p) & jnp.isneginf(log_q)
    log_m = jnp.logaddexp(
        jnp.where(removed, 0, log_p) + jnp.log(mixture), jnp.where(removed, 0, log_q) + jnp.log1p(-mixture)
    )
    log_m = jnp.where(removed, -jnp.inf, log_m)
    return mixture * kl_rows(log_p, log_m, classes) + (1 - mixture) * kl_rows(log_q, log_m, classes)
