"""How far distributions are from each other. `jaxent.information` describes what all measures have in common."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.distributions import (
    Axes,
    Axis,
    Options,
    check_class_axes,
    check_class_mask,
    check_order,
    evaluate,
    of_distributions,
    probabilities,
)
from jaxent._errors import ArgumentValueError, public
from jaxent._math import distances, renyi, safe
from jaxent._math.mixture import jensen_shannon_term
from jaxent._mesh.class_axis import row_sum
from jaxent._typing import ArrayLike


@public
def kl_divergence(
    p: ArrayLike,
    q: ArrayLike,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Kullback-Leibler divergence of `p` from `q`, in nats (or in units of log `base`; 2 gives bits).

    $$D(P \| Q) = \sum_k \Big[ p_k \log \frac{p_k}{q_k} + (q_k - p_k) \Big]$$

    Kullback & Leibler (1951), equation 2.4. The second bracket adds 0 for distributions and makes every term >= 0: the
    divergence of two nearly equal distributions keeps its relative accuracy (1e-6 at 7e-15, where the textbook sum is
    noise of 1e-7 of either sign). For `p` and `q` that do not sum to one this is the generalised divergence of Csiszar
    (1991). Off the simplex every entry of the gradient with respect to `q` holds the constant 1 of that bracket, and
    the gradient with respect to `p` lacks the constant 1 of the textbook's.

    **Arguments:** as in `cross_entropy`.

    **Returns:** `(*batch,)`, never negative; float64 if either is float64, else float32. A class with `p = 0` adds `q`,
    with derivative 0 with respect to `p`; `p > 0`, `q = 0` gives +inf, with derivative -inf with respect to `q`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> kl_divergence(jnp.array([0.0, 1.0]), jnp.array([0.75, 0.25]), base=2)
    Array(2., dtype=float32)
    """
    return of_distributions(_kl_divergence, {"p": p, "q": q}, Options(axis, where, keepdims, base))


@public
def jensen_shannon_divergence(
    p: ArrayLike,
    q: ArrayLike,
    *,
    weight: ArrayLike = 0.5,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Jensen-Shannon divergence between `p` and `q`, in nats (or in units of log `base`; 2 gives bits).

    $$\mathrm{JS}(P, Q) = w D(P \| M) + (1 - w) D(Q \| M), \qquad M = w P + (1 - w) Q$$

    Lin (1991), section IV. With equal shares it is symmetric, from 0 to log 2, and its square root is
    `scipy.spatial.distance.jensenshannon`. Relatively accurate for nearly equal distributions.

    **Arguments:** `weight`: `w`, the share of P, a scalar in [0, 1]; it may be traced and differentiated. The others as
    in `cross_entropy`.

    **Returns:** `(*batch,)`, never negative; float64 if either is float64, else float32. Where `p = 0` the derivative
    with respect to that `p` is 0, and likewise for `q`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis, weight or base.

    >>> jensen_shannon_divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), base=2)
    Array(1., dtype=float32)
    """
    options = Options(axis, where, keepdims, base)
    share = jnp.asarray(arrays.scalar("weight", weight, low=0.0, high=1.0))
    return of_distributions(_jensen_shannon, {"p": p, "q": q}, options, jnp.stack([share, 1 - share]))


@public
def generalized_jensen_shannon_divergence(
    distributions: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    distribution_axis: int = 0,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Jensen-Shannon divergence of any number of distributions, in nats (or in units of log `base`; 2 gives bits).

    $$\mathrm{JS}_w(P_1, \dots, P_n) = H\Big(\sum_i w_i P_i\Big) - \sum_i w_i H(P_i) = \sum_i w_i D(P_i \| M)$$

    Lin (1991). It is the mutual information between a draw from the mixture `M` and the index of the distribution that
    it came from. Never negative, and relatively accurate for nearly equal distributions.

    **Arguments:**

    - `distributions`: probabilities, stacked along `distribution_axis`, floating; the classes lie at `axis`, or at all
      of a tuple of axes. Axes are counted in the stacked array.
    - `weights`: `(n,)`, `w >= 0`; rescaled to sum to one. None gives each the same share.
    - `base`: of the logarithm. `where`: bool, broadcast to `distributions`; False deletes a class of a distribution.
    - `keepdims`: keep the axes of the distributions and of the classes, with length 1.

    **Returns:** `(*batch,)`; float64 for float64, else float32. An entry with `p = 0` has derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> generalized_jensen_shannon_divergence(jnp.eye(4), base=2)
    Array(2., dtype=float32)
    """
    p = probabilities("distributions", distributions)
    if p.ndim < 2:
        raise arrays.shape_error("distributions", "have a distribution axis and a class axis", p)
    stacked = arrays.canonical_axis(distribution_axis, p.ndim, "distribution_axis")
    axes = arrays.canonical_axes(axis, p.ndim)
    if stacked in axes:
        raise ArgumentValueError(f"`axis` must leave out `distribution_axis`, got {axis} and {distribution_axis}")
    check_class_axes("distributions", p, axes)
    count = p.shape[stacked]
    if count == 0:
        raise arrays.shape_error("distributions", f"hold at least one distribution at axis {stacked}", p)
    where = check_class_mask(where, p.shape, "`distributions`")
    if weights is None:
        w = jnp.ones(count)
    else:
        w = arrays.real("weights", weights)
        arrays.check_shape("weights", w, (count,), "one for each distribution")
    # The distributions come first, which shifts the axes that were before theirs.
    p = jnp.moveaxis(p, stacked, 0)
    where = None if where is None else jnp.moveaxis(where, stacked, 0)
    axes = (-p.ndim, *(a + 1 if a < stacked else a for a in axes))
    value = evaluate(_mixture, (p,), where, arrays.log_base(base), w, axes=axes, keepdims=bool(keepdims))
    return jnp.moveaxis(value, 0, stacked) if keepdims else value


@public
def renyi_divergence(
    p: ArrayLike,
    q: ArrayLike,
    order: float,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Renyi divergence of `p` from `q`, in nats (or in units of log `base`; 2 gives bits).

    $$D_\alpha(P \| Q) = \frac{1}{\alpha-1} \log \sum_k p_k^\alpha q_k^{1-\alpha}$$

    Renyi (1961), equation 3.3. Order 0 is `-log sum_{p_k > 0} q_k`, order 1/2 twice the Bhattacharyya distance, order 1
    the Kullback-Leibler divergence, infinity `max_k log(p_k / q_k)` over `p_k > 0`. It grows with the order, is as
    accurate at order 1 + 1e-6 as at 2, and keeps its relative accuracy for nearly equal distributions. Both must sum to
    one: the sum is taken relative to `order * sum(p) + (1 - order) * sum(q)`; above order 16, where the rounding of
    these sums would show, both are rescaled instead.

    **Arguments:** `order`: a Python number in [0, inf]; it picks the formula, so it cannot be traced. The others as in
    `cross_entropy`.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. `p > 0`, `q = 0` gives +inf, with derivative
    -inf with respect to `q`, for orders from 1 on. Up to order 1 derivatives with respect to a `p = 0` are 0, since the
    first has an infinite limit, and below 1 those with respect to a `q = 0`; above, they are the limit, or 0 where it
    is infinite. Below order 1 the value is +inf, with derivative 0, if no class has both `p > 0` and `q > 0`.

    **Raises:** `TypeError` for a wrong dtype or a traced order, `ValueError` for a wrong shape, axis, base or order.

    >>> renyi_divergence(jnp.array([1.0, 0.0]), jnp.array([0.25, 0.75]), float("inf"), base=2)
    Array(2., dtype=float32)
    """
    options = Options(axis, where, keepdims, base)
    return of_distributions(renyi.divergence, {"p": p, "q": q}, options, order=check_order(order, np.inf))


@public
def total_variation_distance(
    p: ArrayLike, q: ArrayLike, *, axis: Axis = -1, where: ArrayLike | None = None, keepdims: bool = False
) -> jax.Array:
    r"""Total variation distance between distributions: the largest difference between the probabilities of an event.

    $$\mathrm{TV}(P, Q) = \tfrac12 \sum_k |p_k - q_k|$$

    Levin & Peres (2017), proposition 4.2. Symmetric, from 0 to 1.

    **Arguments:** as in `cross_entropy`; there is no base, since the value is not a logarithm.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. The derivative is 0 where `p = q`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> total_variation_distance(jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75]))
    Array(0.25, dtype=float32)
    """
    return of_distributions(_total_variation, {"p": p, "q": q}, Options(axis, where, keepdims))


@public
def hellinger_distance(
    p: ArrayLike, q: ArrayLike, *, axis: Axis = -1, where: ArrayLike | None = None, keepdims: bool = False
) -> jax.Array:
    r"""Hellinger distance between distributions, a pure number from 0 to 1.

    $$H(P, Q) = \sqrt{\tfrac12 \sum_k (\sqrt{p_k} - \sqrt{q_k})^2}, \quad H^2 = 1 - \sum_k \sqrt{p_k q_k}
    \text{ for distributions}$$

    Hellinger (1909). Symmetric, and relatively accurate for nearly equal distributions.

    **Arguments:** as in `cross_entropy`; there is no base, since the value is not a logarithm.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. Where `p = 0` the derivative with respect to
    that `p` is 0, and likewise for `q`; where `P = Q`, which is a kink, all derivatives are 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> hellinger_distance(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
    Array(1., dtype=float32)
    """
    return of_distributions(_hellinger, {"p": p, "q": q}, Options(axis, where, keepdims))


def _kl_divergence(p: jax.Array, q: jax.Array, *, axes: Axes) -> jax.Array:
    return row_sum(safe.kl_term(p, q), axes)


def _jensen_shannon(p: jax.Array, q: jax.Array, shares: jax.Array, *, axes: Axes) -> jax.Array:
    shares = shares.reshape(2, *[1] * p.ndim)
    return row_sum(jensen_shannon_term(jnp.stack([p, q]), shares)[0], axes)


def _mixture(p: jax.Array, weights: jax.Array, *, axes: Axes) -> jax.Array:
    """Of distributions on the first axis."""
    weights = jnp.where(weights >= 0, weights, jnp.nan)
    shares = (weights / jnp.sum(weights)).reshape(-1, *[1] * (p.ndim - 1))
    return row_sum(jensen_shannon_term(p, shares), axes)


def _total_variation(p: jax.Array, q: jax.Array, *, axes: Axes) -> jax.Array:
    gaps = p - q
    return row_sum(gaps * jax.lax.stop_gradient(jnp.sign(gaps)), axes) / 2  # `abs` has derivative 1 at 0


def _hellinger(p: jax.Array, q: jax.Array, *, axes: Axes) -> jax.Array:
    return distances.root(row_sum(distances.hellinger_term(p, q), axes))
