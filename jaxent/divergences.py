"""How far one distribution is from another.

Probabilities are taken as they are: nothing is rescaled to sum to one. A negative or nan probability gives nan.
"""

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxent._arguments.distributions import Axes, check_order, of_distributions
from jaxent._errors import public
from jaxent._math import renyi, safe
from jaxent._mesh.class_axis import row_sum


@public
def kl_divergence(
    p: ArrayLike, q: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Kullback-Leibler divergence of `p` from `q`, in nats (or in units of log `base`; 2 gives bits).

    $$D(P \| Q) = \sum_k \Big[ p_k \log \frac{p_k}{q_k} + (q_k - p_k) \Big]$$

    Kullback & Leibler (1951), equation 2.4. The second bracket adds 0 for distributions and makes every term >= 0: the
    divergence of two nearly equal distributions keeps its relative accuracy (1e-6 at 7e-15, where the textbook sum is
    noise of 1e-7 of either sign). For `p` and `q` that do not sum to one this is the generalised divergence of Csiszar
    (1991), and off the simplex every entry of the gradient by `q` holds the constant 1 of that bracket, and the one by
    `p` lacks the textbook's.

    **Arguments:** as in `cross_entropy`.

    **Returns:** `(*batch,)`, never negative; float64 if either is float64, else float32. A class with `p = 0` adds `q`,
    with derivative 0 by `p`; `p > 0`, `q = 0` gives +inf, with derivative -inf by `q`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> kl_divergence(jnp.array([0.0, 1.0]), jnp.array([0.75, 0.25]), base=2)
    Array(2., dtype=float32)
    """
    return of_distributions(_kl_divergence, {"p": p, "q": q}, axis=axis, where=where, base=base)


@public
def jensen_shannon_divergence(
    p: ArrayLike, q: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Jensen-Shannon divergence between `p` and `q`, in nats (or in units of log `base`; 2 gives bits).

    $$\mathrm{JS}(P, Q) = \tfrac12 D(P \| M) + \tfrac12 D(Q \| M), \qquad M = \tfrac12 (P + Q)$$

    Lin (1991), section IV. Symmetric, from 0 to log 2, and relatively accurate for nearly equal distributions. Its
    square root is `scipy.spatial.distance.jensenshannon`.

    **Arguments:** as in `cross_entropy`.

    **Returns:** `(*batch,)`, never negative; float64 if either is float64, else float32. Where `p = 0` the derivative
    by that `p` is 0, and so for `q`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> jensen_shannon_divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), base=2)
    Array(1., dtype=float32)
    """
    return of_distributions(_jensen_shannon, {"p": p, "q": q}, axis=axis, where=where, base=base)


@public
def renyi_divergence(
    p: ArrayLike,
    q: ArrayLike,
    order: float,
    *,
    axis: int = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Renyi divergence of `p` from `q`, in nats (or in units of log `base`; 2 gives bits).

    $$D_\alpha(P \| Q) = \frac{1}{\alpha-1} \log \sum_k p_k^\alpha q_k^{1-\alpha}$$

    Renyi (1961), equation 3.3. Order 0 is `-log sum_{p_k > 0} q_k`, order 1/2 twice the Bhattacharyya distance, order 1
    the Kullback-Leibler divergence, infinity `max_k log(p_k / q_k)` over `p_k > 0`. It grows with the order, is as
    accurate at order 1 + 1e-6 as at 2, and keeps its relative accuracy for nearly equal distributions. Both must sum to
    one: the sum is taken relative to `order * sum(p) + (1 - order) * sum(q)`.

    **Arguments:** `order`: a Python number in [0, inf]; it picks the formula, so it cannot be traced. The others as in
    `cross_entropy`.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. `p > 0`, `q = 0` gives +inf, with derivative
    -inf by `q`, for orders from 1 on. Below 1 the derivative is 0 by an entry that is 0, where its limit is infinite,
    and the value +inf if no class has both.

    **Raises:** `TypeError` for a wrong dtype or a traced order, `ValueError` for a wrong shape, axis, base or order.

    >>> renyi_divergence(jnp.array([1.0, 0.0]), jnp.array([0.25, 0.75]), float("inf"), base=2)
    Array(2., dtype=float32)
    """
    order = check_order(order, np.inf)
    return of_distributions(renyi.divergence, {"p": p, "q": q}, axis=axis, where=where, base=base, order=order)


def _kl_divergence(p: jax.Array, q: jax.Array, *, axes: Axes) -> jax.Array:
    return row_sum(safe.kl_term(p, q), axes)


def _jensen_shannon(p: jax.Array, q: jax.Array, *, axes: Axes) -> jax.Array:
    return row_sum(safe.jensen_shannon_term(p, q), axes)
