"""Measures of a distribution, and the cross-entropy of two.

What all measures have in common, including those of the other modules:

- Probabilities are taken as they are: nothing is rescaled to sum to one. If they do not, the formulas still give a
  number, but it measures no information. Integers raise an error: from counts, pass `counts / counts.sum()`, or
  labels to `empirical_distribution`. A negative, infinite or nan probability gives nan.
- `axis` is one class axis or a tuple of them, counted in the broadcast shape; `keepdims=True` keeps them with length 1.
- `where` deletes classes. A row without any class left is 0, with derivative 0.
- Results are float64 if any operand is, else float32.
- Every measure can be differentiated any number of times. Where `p = 0`, a derivative with an infinite limit is 0
  unless the value is infinite too, and one with a finite limit is that limit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.distributions import Axes, Axis, Options, check_order, evaluate, of_distributions, probabilities
from jaxent._errors import public
from jaxent._math import powers, renyi, safe
from jaxent._mesh.class_axis import row_sum
from jaxent._typing import ArrayLike


@public
def self_information(p: ArrayLike, *, base: ArrayLike | None = None) -> jax.Array:
    r"""Self-information of events with probability `p`, in nats (or in units of log `base`; 2 gives bits).

    $$I(x) = -\log p(x)$$

    Shannon (1948), section 6.

    **Arguments:** `p`: any shape, floating. `base`: of the logarithm, positive and not 1.

    **Returns:** the shape of `p`; float64 for float64, else float32. At `p = 0` +inf with derivative -inf.

    **Raises:** `TypeError` if `p` is not floating, `ValueError` for a `base` out of range.

    >>> self_information(jnp.array([1.0, 0.5, 0.25]), base=2)
    Array([0., 1., 2.], dtype=float32)
    """
    p = probabilities("p", p)
    return evaluate(_self_information, (p,), None, arrays.log_base(base), axes=())


@public
def entropy(
    p: ArrayLike,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Shannon entropy of distributions, in nats (or in units of log `base`; 2 gives bits).

    $$H(P) = -\sum_k p_k \log p_k$$

    Shannon (1948), section 6. Equal to `scipy.stats.entropy(p, base=base)` for `p` that sum to one; unlike it, `p` is
    not rescaled.

    **Arguments:**

    - `p`: probabilities, `(*batch, classes)`, floating; the classes lie at `axis`, or at all of a tuple of axes.
    - `base`: of the logarithm, positive and not 1; None is e.
    - `where`: bool, broadcast to `p`; False deletes a class. A row without classes has entropy 0, with derivative 0.
    - `keepdims`: keep the class axes, with length 1.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A class with `p = 0` adds 0 to the value and has
    derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> entropy(jnp.array([0.5, 0.25, 0.25]), base=2)
    Array(1.5, dtype=float32)
    """
    return of_distributions(_entropy, {"p": p}, Options(axis, where, keepdims, base))


@public
def perplexity(p: ArrayLike, *, axis: Axis = -1, where: ArrayLike | None = None, keepdims: bool = False) -> jax.Array:
    r"""Perplexity of distributions: the number of equally likely classes with the same entropy.

    $$\mathrm{PP}(P) = \exp H(P)$$

    Jelinek et al. (1977).

    **Arguments:** as in `entropy`; the base does not matter.

    **Returns:** `(*batch,)`, from 1 to the number of classes; 0 for a row in which `where` leaves no class. Edges as in
    `entropy`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> perplexity(jnp.array([0.5, 0.5, 0.0]))
    Array(2., dtype=float32)
    """
    return of_distributions(_perplexity, {"p": p}, Options(axis, where, keepdims))


@public
def renyi_entropy(
    p: ArrayLike,
    order: float,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Renyi entropy of distributions, in nats (or in units of log `base`; 2 gives bits).

    $$H_\alpha(P) = \frac{1}{1-\alpha} \log \frac{\sum_k p_k^\alpha}{\sum_k p_k}$$

    Renyi (1961), equation 2.5, whose denominator is 1 for a distribution. Order 0 is the logarithm of the number of
    classes with `p > 0`, order 1 the Shannon entropy, 2 the collision entropy, infinity the min-entropy
    `-log max_k p_k`. It falls as the order grows, and is as accurate at order 1 + 1e-6 as at 2.

    **Arguments:** `order`: a Python number in [0, inf]; it picks the formula, so it cannot be traced. The others as in
    `entropy`.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A class with `p = 0` adds 0. Derivatives with respect
    to that `p` are 0 for orders up to 1, where the first has an infinite limit. Above 1 they are the limit, or 0 where
    it is infinite. It is finite for the first derivative from order 1 on, for the second from order 2, and for the
    third from order 3 or at order 2. At order infinity tied classes share the derivative.

    **Raises:** `TypeError` for a wrong dtype or a traced order, `ValueError` for a wrong shape, axis, base or order.

    >>> renyi_entropy(jnp.array([0.5, 0.5, 0.0]), 2, base=2)
    Array(1., dtype=float32)
    """
    order = check_order(order, np.inf)
    return of_distributions(renyi.entropy, {"p": p}, Options(axis, where, keepdims, base), order=order)


@public
def tsallis_entropy(
    p: ArrayLike, order: float, *, axis: Axis = -1, where: ArrayLike | None = None, keepdims: bool = False
) -> jax.Array:
    r"""Tsallis entropy of distributions, a pure number (nats at order 1).

    $$S_q(P) = \frac{1}{q-1} \sum_k (p_k - p_k^q), \quad = \frac{1 - \sum_k p_k^q}{q-1} \text{ if } \sum_k p_k = 1$$

    Tsallis (1988), equation 1. Order 1 is the Shannon entropy, order 2 the Gini impurity.

    **Arguments:** `order`: a Python number in [0, inf), not traced. The others as in `entropy`; there is no base, since
    the value is not a logarithm.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A class with `p = 0` adds 0. Derivatives with respect
    to that `p` as in `renyi_entropy`.

    **Raises:** `TypeError` for a wrong dtype or a traced order, `ValueError` for a wrong shape, axis or order.

    >>> tsallis_entropy(jnp.array([0.5, 0.5]), 2)
    Array(0.5, dtype=float32)
    """
    order = check_order(order, float(np.finfo(np.float32).max))
    return of_distributions(_tsallis_entropy, {"p": p}, Options(axis, where, keepdims), order=order)


@public
def cross_entropy(
    p: ArrayLike,
    q: ArrayLike,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Cross-entropy of `q` relative to `p`, in nats (or in units of log `base`; 2 gives bits).

    $$H(P, Q) = -\sum_k p_k \log q_k = H(P) + D(P \| Q)$$

    The mean length of a code for Q used on P: Cover & Thomas (2006), section 5.4. These are probabilities; for logits
    see `cross_entropy_with_logits` and `softmax_cross_entropy`.

    **Arguments:**

    - `p`, `q`: probabilities, `(*batch, classes)`, floating; their batch dimensions broadcast. The classes lie at
      `axis`, or at all of a tuple of axes, counted in the broadcast shape.
    - `base`: of the logarithm, positive and not 1; None is e.
    - `where`: bool, broadcast to the common shape; False deletes a class from both. A row without classes is 0.
    - `keepdims`: keep the class axes, with length 1.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. A class with `p = 0` adds 0, with derivative
    `-log q` with respect to `p` (0 where `q = 0` too); `p > 0`, `q = 0` gives +inf, with derivative -inf with respect
    to `q`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> cross_entropy(jnp.array([0.0, 0.0, 1.0]), jnp.array([0.3, 0.3, 0.4]))
    Array(0.9162907, dtype=float32)
    """
    return of_distributions(_cross_entropy, {"p": p, "q": q}, Options(axis, where, keepdims, base))


def _self_information(p: jax.Array, *, axes: Axes) -> jax.Array:
    return safe.cross_entropy_term(jnp.ones_like(p), p)


def _entropy(p: jax.Array, *, axes: Axes) -> jax.Array:
    return row_sum(safe.entropy_term(p), axes)


def _perplexity(p: jax.Array, *, axes: Axes) -> jax.Array:
    return jnp.exp(_entropy(p, axes=axes))


def _tsallis_entropy(p: jax.Array, *, axes: Axes, order: float) -> jax.Array:
    return _entropy(p, axes=axes) if order == 1 else row_sum(powers.tsallis_term(p, order), axes)


def _cross_entropy(p: jax.Array, q: jax.Array, *, axes: Axes) -> jax.Array:
    return row_sum(safe.cross_entropy_term(p, q), axes)
