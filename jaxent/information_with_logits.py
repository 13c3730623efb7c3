"""The measures of distributions that are given by their logits. Log-probabilities are logits too."""

import jax

from jaxent._arguments.distributions import Axis, Options, of_logits
from jaxent._errors import public
from jaxent._math import softmax
from jaxent._math.divergences import cross_entropy_rows, kl_rows
from jaxent._mesh.class_axis import ClassAxis
from jaxent._typing import ArrayLike


@public
def self_information_with_logits(
    logits: ArrayLike, *, axis: Axis = -1, base: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Self-information of every class under the softmax of logits, in nats (or in units of log `base`; 2 gives bits).

    $$I_k = -\log \mathrm{softmax}(z)_k$$

    Relatively accurate however close to 1 the probability is. Log-probabilities are logits too.

    **Arguments:** `logits`: `(*batch, classes)`, floating, the classes at `axis`, or at all of a tuple of axes. `base`:
    of the logarithm. `where`: bool, broadcast to `logits`; False deletes a class, as a logit of -inf does.

    **Returns:** the shape of `logits`; float64 for float64, else float32; +inf for a deleted class. A row with nan,
    +inf or only -inf is nan, and one in which `where` leaves no class is 0, with derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> self_information_with_logits(jnp.array([0.0, 0.0]), base=2)
    Array([1., 1.], dtype=float32)
    """
    return of_logits(_self_information, {"logits": logits}, Options(axis, where, base=base), per_class=True)


@public
def entropy_with_logits(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Shannon entropy of the softmax of logits, in nats (or in units of log `base`; 2 gives bits).

    $$H = \log \sum_k e^{z_k} - \sum_k \mathrm{softmax}(z)_k z_k$$

    `entropy` of the softmax, relatively accurate however small it is.

    **Arguments:** as in `self_information_with_logits`. `keepdims`: keep the class axes, with length 1.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A logit of -inf deletes its class, with derivative 0. A
    row with nan, +inf or only -inf is nan, and one in which `where` leaves no class is 0, with derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> entropy_with_logits(jnp.zeros(4), base=2)
    Array(2., dtype=float32)
    """
    return of_logits(softmax.entropy, {"logits": logits}, Options(axis, where, keepdims, base))


@public
def cross_entropy_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Cross-entropy between the softmax of two arrays of logits, in nats (or in units of log `base`; 2 gives bits).

    $$H(P, Q) = -\sum_k p_k \log q_k, \quad p = \mathrm{softmax}(z^p),\ q = \mathrm{softmax}(z^q)$$

    The gradient with respect to `q_logits` is `q - p`. To compare logits with labels or probabilities, see
    `softmax_cross_entropy`.

    **Arguments:** `p_logits`, `q_logits`: `(*batch, classes)`, floating; their batch dimensions broadcast, the classes
    lie at `axis`. `base`, `where`, `keepdims`: as in `entropy_with_logits`; `where` deletes a class from both.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. A class that both have deleted (logit -inf)
    adds 0; one that only Q has deleted gives +inf, with derivative `q - p` with respect to `q_logits` and an infinite
    one with respect to `p_logits`. A row with nan, +inf or only -inf is nan, and one in which `where` leaves no class
    is 0, with derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> cross_entropy_with_logits(jnp.zeros(4), jnp.ones(4), base=2)
    Array(2., dtype=float32)
    """
    values = {"p_logits": p_logits, "q_logits": q_logits}
    return of_logits(cross_entropy_rows, values, Options(axis, where, keepdims, base))


@public
def kl_divergence_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: Axis = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
    keepdims: bool = False,
) -> jax.Array:
    r"""Kullback-Leibler divergence between the softmax of two arrays of logits, in nats (or in units of log `base`).

    $$D(P \| Q) = \log \sum_k p_k\, e^{c_k}, \quad c_k = (z^q_k - z^p_k) - \sum_j p_j (z^q_j - z^p_j)$$

    Kullback & Leibler (1951). With the differences centred, `sum_k p_k c_k` is 0, and `log1p(sum_k p_k (expm1(c_k) -
    c_k))` has no negative term: it keeps its relative accuracy as Q approaches P, and does not see a constant added to
    either. The gradient with respect to `q_logits` is `q - p`, with respect to `p_logits` it is `-p c`.

    **Arguments:** as in `cross_entropy_with_logits`.

    **Returns:** `(*batch,)`, never negative; float64 if either is float64, else float32. Edges as in
    `cross_entropy_with_logits`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> divergence = kl_divergence_with_logits(jnp.array([5.0, 5.0]), jnp.array([0.0, 1e-4]))
    >>> f"{divergence:.4e}"
    '1.2500e-09'
    """
    values = {"p_logits": p_logits, "q_logits": q_logits}
    return of_logits(kl_rows, values, Options(axis, where, keepdims, base))


def _self_information(z: jax.Array, classes: ClassAxis) -> jax.Array:
    return -softmax.log_softmax(z, classes)
