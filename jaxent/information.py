"""Measures of information: of distributions, of the logits they come from, and the distribution of the data itself.

Probabilities are taken as they are: nothing is rescaled to sum to one. A negative or nan probability gives nan.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxent._arguments import arrays
from jaxent._arguments.targets import check_classes, check_row_arguments
from jaxent._math import joint, renyi, safe, softmax
from jaxent._math.divergences import cross_entropy_rows, kl_rows
from jaxent._math.label_loss import INVALID, encode_labels
from jaxent._mesh.class_axis import ClassAxis

# ----------------------------------------------------------------------------------------------------------------------
# One distribution


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
    name = "self_information"
    p = arrays.floating(name, "p", p)
    return _evaluate(_self_information, (p,), None, arrays.log_base(name, base), axis=None)


def entropy(
    p: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Shannon entropy of distributions, in nats (or in units of log `base`; 2 gives bits).

    $$H(P) = -\sum_k p_k \log p_k$$

    Shannon (1948), section 6. Equal to `scipy.stats.entropy(p, base=base)` for `p` that sum to one; unlike it, `p` is
    not rescaled.

    **Arguments:**

    - `p`: probabilities, `(*batch, classes)`, floating; the classes lie at `axis`.
    - `base`: of the logarithm, positive and not 1; None is e.
    - `where`: bool, broadcast to `p`; False deletes a class.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A class with `p = 0` adds 0 to the value and has
    derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> entropy(jnp.array([0.5, 0.25, 0.25]), base=2)
    Array(1.5, dtype=float32)
    """
    return _of_one("entropy", _entropy, p, axis, where, base)


def perplexity(p: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    r"""Perplexity of distributions: the number of equally likely classes with the same entropy.

    $$\mathrm{PP}(P) = \exp H(P)$$

    Jelinek et al. (1977).

    **Arguments:** as in `entropy`; the base does not matter.

    **Returns:** `(*batch,)`, from 1 to the number of classes. Edges as in `entropy`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or axis.

    >>> perplexity(jnp.array([0.5, 0.5, 0.0]))
    Array(2., dtype=float32)
    """
    return jnp.exp(_of_one("perplexity", _entropy, p, axis, where, None))


def renyi_entropy(
    p: ArrayLike,
    order: float,
    *,
    axis: int = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Renyi entropy of distributions, in nats (or in units of log `base`; 2 gives bits).

    $$H_\alpha(P) = \frac{1}{1-\alpha} \log \frac{\sum_k p_k^\alpha}{\sum_k p_k}$$

    Renyi (1961), equation 2.5, whose denominator is 1 for a distribution. Order 0 is the logarithm of the number of
    classes with `p > 0`, order 1 the Shannon entropy, 2 the collision entropy, infinity the min-entropy
    `-log max_k p_k`. It falls as the order grows, and is as accurate at order 1 + 1e-6 as at 2.

    **Arguments:** `order`: a Python number in [0, inf]; it picks the formula, so it cannot be traced. The others as in
    `entropy`.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A class with `p = 0` adds 0. The derivative by that `p`
    is 0 for orders up to 1, where its limit is infinite, and the limit above. At infinity ties share it.

    **Raises:** `TypeError` for a wrong dtype or a traced order, `ValueError` for a wrong shape, axis, base or order.

    >>> renyi_entropy(jnp.array([0.5, 0.5, 0.0]), 2, base=2)
    Array(1., dtype=float32)
    """
    order = _check_order("renyi_entropy", order, np.inf)
    return _of_one("renyi_entropy", renyi.entropy, p, axis, where, base, order=order)


def tsallis_entropy(p: ArrayLike, order: float, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    r"""Tsallis entropy of distributions, a pure number (nats at order 1).

    $$S_q(P) = \frac{1}{q-1} \sum_k (p_k - p_k^q), \quad = \frac{1 - \sum_k p_k^q}{q-1} \text{ if } \sum_k p_k = 1$$

    Tsallis (1988), equation 1. Order 1 is the Shannon entropy, order 2 the Gini impurity.

    **Arguments:** `order`: a Python number in [0, inf), not traced. The others as in `entropy`; there is no base, since
    the value is not a logarithm.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A class with `p = 0` adds 0. The derivative by that `p`
    is 0 for orders up to 1, where its limit is infinite, and the limit above.

    **Raises:** `TypeError` for a wrong dtype or a traced order, `ValueError` for a wrong shape, axis or order.

    >>> tsallis_entropy(jnp.array([0.5, 0.5]), 2)
    Array(0.5, dtype=float32)
    """
    order = _check_order("tsallis_entropy", order, float(np.finfo(np.float32).max))
    return _of_one("tsallis_entropy", _tsallis_entropy, p, axis, where, None, order=order)


# ----------------------------------------------------------------------------------------------------------------------
# Two distributions


def cross_entropy(
    p: ArrayLike, q: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Cross-entropy of `q` relative to `p`, in nats (or in units of log `base`; 2 gives bits).

    $$H(P, Q) = -\sum_k p_k \log q_k = H(P) + D(P \| Q)$$

    The mean length of a code for Q used on P: Cover & Thomas (2006), section 5.4. These are probabilities; for logits
    see `cross_entropy_with_logits` and `softmax_cross_entropy`.

    **Arguments:**

    - `p`, `q`: probabilities, `(*batch, classes)`, floating; their batch dimensions broadcast. The classes lie at
      `axis`, counted in the broadcast shape.
    - `base`: of the logarithm, positive and not 1; None is e.
    - `where`: bool, broadcast to the common shape; False deletes a class from both.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. A class with `p = 0` adds 0, with derivative
    `-log q` by `p` (0 where `q = 0` too); `p > 0`, `q = 0` gives +inf, with derivative -inf by `q`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> cross_entropy(jnp.array([0.0, 0.0, 1.0]), jnp.array([0.3, 0.3, 0.4]))
    Array(0.9162907, dtype=float32)
    """
    return _of_two("cross_entropy", _cross_entropy, p, q, axis, where, base)


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
    return _of_two("kl_divergence", _kl_divergence, p, q, axis, where, base)


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
    return _of_two("jensen_shannon_divergence", _jensen_shannon, p, q, axis, where, base)


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
    order = _check_order("renyi_divergence", order, np.inf)
    return _of_two("renyi_divergence", renyi.divergence, p, q, axis, where, base, order=order)


# ----------------------------------------------------------------------------------------------------------------------
# Two variables


def joint_entropy(pxy: ArrayLike, *, base: ArrayLike | None = None) -> jax.Array:
    r"""Entropy of a pair of variables, in nats (or in units of log `base`; 2 gives bits).

    $$H(X, Y) = -\sum_{x,y} p(x, y) \log p(x, y)$$

    Cover & Thomas (2006), equation 2.8.

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating. `base`: of the logarithm.

    **Returns:** `(*batch,)`; edges as in `entropy`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or base.

    >>> joint_entropy(jnp.array([[0.25, 0.25], [0.25, 0.25]]), base=2)
    Array(2., dtype=float32)
    """
    p, log_base = _check_joint("joint_entropy", pxy, base)
    return _evaluate(_entropy, (p,), None, log_base, axis=(-2, -1))


def conditional_entropy(pxy: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None) -> jax.Array:
    r"""Entropy of one variable of a pair given the other, in nats (or in units of log `base`; 2 gives bits).

    $$H(X \mid Y) = -\sum_{x,y} p(x, y) \log \frac{p(x, y)}{p(y)}$$

    Cover & Thomas (2006), equation 2.10. `axis` is the variable that is known: with `pxy` of shape
    `(x_classes, y_classes)`, `axis=-1` gives `H(X | Y)` and `axis=-2` gives `H(Y | X)`.

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating. `axis`: one of the last two,
    the variable conditioned on. `base`: of the logarithm.

    **Returns:** `(*batch,)`, never negative, relatively accurate also when one variable nearly decides the other.
    An entry with `p = 0` adds 0 and has derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> conditional_entropy(jnp.array([[0.25, 0.25], [0.5, 0.0]]), axis=-2, base=2)  # H(Y | X)
    Array(0.5, dtype=float32)
    """
    name = "conditional_entropy"
    p, log_base = _check_joint(name, pxy, base)
    axis = arrays.canonical_axis(name, axis, p.ndim)
    if axis < -2:
        raise ValueError(f"jaxent.{name}: `axis` must be one of the last two of {p.ndim}, got {axis}")
    return _evaluate(joint.conditional_entropy, (p,), None, log_base, axis=axis)


def mutual_information(pxy: ArrayLike, *, base: ArrayLike | None = None) -> jax.Array:
    r"""Mutual information of a pair of variables, in nats (or in units of log `base`; 2 gives bits).

    $$I(X; Y) = D(P_{XY} \| P_X P_Y) = \sum_{x,y} p(x, y) \log \frac{p(x, y)}{p(x)\, p(y)}$$

    Cover & Thomas (2006), equation 2.28. Taken as a divergence it is never negative and keeps its digits near
    independence, where `H(X) + H(Y) - H(X, Y)` has none; in float32 its floor is about 1e-14.

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating, that sum to one. `base`: of
    the logarithm.

    **Returns:** `(*batch,)`. An entry with `p = 0` has derivative 0; the others' is `log(p_xy / (p_x p_y))`, which
    leaves out the constant that moving off the simplex would add.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or base.

    >>> mutual_information(jnp.array([[0.5, 0.0], [0.0, 0.5]]), base=2)
    Array(1., dtype=float32)
    """
    p, log_base = _check_joint("mutual_information", pxy, base)
    return _evaluate(_mutual_information, (p,), None, log_base, axis=(-2, -1))


# ----------------------------------------------------------------------------------------------------------------------
# Distributions given by logits


def self_information_with_logits(
    logits: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Self-information of every class under the softmax of logits, in nats (or in units of log `base`; 2 gives bits).

    $$I_k = -\log \mathrm{softmax}(z)_k$$

    Relatively accurate however close to 1 the probability is. Log-probabilities are logits too.

    **Arguments:** `logits`: `(*batch, classes)`, floating, the classes at `axis`. `base`: of the logarithm. `where`:
    bool, broadcast to `logits`; False deletes a class, as a logit of -inf does.

    **Returns:** the shape of `logits`; float64 for float64, else float32; +inf for a deleted class. A row with nan,
    +inf or only -inf is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> self_information_with_logits(jnp.array([0.0, 0.0]), base=2)
    Array([1., 1.], dtype=float32)
    """
    return _of_logits(
        "self_information_with_logits", _self_information_of_rows, ("logits",), (logits,), axis, where, base
    )


def entropy_with_logits(
    logits: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None, where: ArrayLike | None = None
) -> jax.Array:
    r"""Shannon entropy of the softmax of logits, in nats (or in units of log `base`; 2 gives bits).

    $$H = \log \sum_k e^{z_k} - \sum_k \mathrm{softmax}(z)_k z_k$$

    `entropy` of the softmax, relatively accurate however small it is.

    **Arguments:** as in `self_information_with_logits`.

    **Returns:** `(*batch,)`; float64 for float64, else float32. A logit of -inf deletes its class, with derivative 0. A
    row with nan, +inf or only -inf is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> entropy_with_logits(jnp.zeros(4), base=2)
    Array(2., dtype=float32)
    """
    return _of_logits("entropy_with_logits", softmax.entropy, ("logits",), (logits,), axis, where, base)


def cross_entropy_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: int = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Cross-entropy between the softmax of two arrays of logits, in nats (or in units of log `base`; 2 gives bits).

    $$H(P, Q) = -\sum_k p_k \log q_k, \quad p = \mathrm{softmax}(z^p),\ q = \mathrm{softmax}(z^q)$$

    The gradient by `q_logits` is `q - p`. To compare logits with labels or probabilities, see `softmax_cross_entropy`.

    **Arguments:** `p_logits`, `q_logits`: `(*batch, classes)`, floating; their batch dimensions broadcast, the classes
    lie at `axis`. `base`, `where`: as in `self_information_with_logits`; `where` deletes a class from both.

    **Returns:** `(*batch,)`; float64 if either is float64, else float32. A class that both have deleted (logit -inf)
    adds 0; one that only Q has deleted gives +inf, with derivative `q - p` by `q_logits` and infinite by `p_logits`. A
    row with nan, +inf or only -inf is nan.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> cross_entropy_with_logits(jnp.zeros(4), jnp.ones(4), base=2)
    Array(2., dtype=float32)
    """
    name = "cross_entropy_with_logits"
    return _of_logits(name, cross_entropy_rows, ("p_logits", "q_logits"), (p_logits, q_logits), axis, where, base)


def kl_divergence_with_logits(
    p_logits: ArrayLike,
    q_logits: ArrayLike,
    *,
    axis: int = -1,
    base: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Kullback-Leibler divergence between the softmax of two arrays of logits, in nats (or in units of log `base`).

    $$D(P \| Q) = \log \sum_k p_k\, e^{c_k}, \quad c_k = (z^q_k - z^p_k) - \sum_j p_j (z^q_j - z^p_j)$$

    Kullback & Leibler (1951). With the differences centred, `sum_k p_k c_k` is 0, and `log1p(sum_k p_k (expm1(c_k) -
    c_k))` has no negative term: it keeps its relative accuracy as Q approaches P, and does not see a constant added to
    either. The gradient by `q_logits` is `q - p`, by `p_logits` `-p c`.

    **Arguments:** as in `cross_entropy_with_logits`.

    **Returns:** `(*batch,)`, never negative; float64 if either is float64, else float32. Edges as in
    `cross_entropy_with_logits`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> divergence = kl_divergence_with_logits(jnp.array([5.0, 5.0]), jnp.array([0.0, 1e-4]))
    >>> f"{divergence:.4e}"
    '1.2500e-09'
    """
    name = "kl_divergence_with_logits"
    return _of_logits(name, kl_rows, ("p_logits", "q_logits"), (p_logits, q_logits), axis, where, base)


# ----------------------------------------------------------------------------------------------------------------------
# The data


def empirical_distribution(labels: ArrayLike, num_classes: int, *, weights: ArrayLike | None = None) -> jax.Array:
    r"""The distribution of labels in the data: relative frequencies.

    $$\hat P(k) = \frac{\sum_n w_n [y_n = k]}{\sum_n w_n}$$

    Cover & Thomas (2006), section 11.1 (the type of a sequence). Counts are exact integers; weights add up in float32.

    **Arguments:** `labels`: class indices, any shape and integer dtype, all of one sample. `num_classes`: a Python int.
    `weights`: shaped like `labels`, each >= 0; None counts every label once.

    **Returns:** `(num_classes,)`, the default floating dtype, or with floating weights float64 for float64, else
    float32. A label out of range gives nan everywhere, unless its weight is 0; so does a negative weight. Without a
    label or weight there is no distribution: nan everywhere.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or `num_classes < 1`.

    >>> empirical_distribution(jnp.array([0, 2, 2, 1]), 3)
    Array([0.25, 0.25, 0.5 ], dtype=float32)
    """
    name = "empirical_distribution"
    labels = arrays.integer(name, "labels", labels)
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)):
        raise arrays.dtype_error(name, "num_classes", "be an int", num_classes)
    if num_classes < 1:
        raise ValueError(f"jaxent.{name}: `num_classes` must be at least 1, got {num_classes}")
    _, weights = check_row_arguments(name, labels.shape, None, weights)
    return _empirical_distribution(labels, weights, count=int(num_classes))


@functools.partial(jax.jit, static_argnames=("count",), inline=True)
def _empirical_distribution(labels: jax.Array, weights: jax.Array | None, *, count: int) -> jax.Array:
    codes = encode_labels(labels, count, None, None).reshape(-1)
    if weights is None:
        dtype, amounts = jnp.result_type(float), jnp.ones(codes.shape, jnp.int32)
    else:
        (amounts,) = arrays.accumulated(weights.reshape(-1))
        dtype = amounts.dtype
    invalid = jnp.any((codes == INVALID) & (amounts != 0))
    # An index out of range is dropped; a negative one would count from the end.
    index = jnp.where(codes == INVALID, count, codes)
    sums = jnp.zeros(count, amounts.dtype).at[index].add(amounts, mode="drop")
    return jnp.where(invalid, jnp.nan, sums.astype(dtype) / jnp.sum(sums).astype(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# The measures as functions of arrays, and their evaluation


def _self_information(p: jax.Array, *, axis: None) -> jax.Array:
    return safe.cross_entropy_term(jnp.ones_like(p), p)


def _entropy(p: jax.Array, *, axis: int | tuple[int, int]) -> jax.Array:
    return jnp.sum(safe.entropy_term(p), axis=axis)


def _tsallis_entropy(p: jax.Array, *, axis: int, order: float) -> jax.Array:
    return _entropy(p, axis=axis) if order == 1 else jnp.sum(safe.tsallis_term(p, order), axis=axis)


def _cross_entropy(p: jax.Array, q: jax.Array, *, axis: int) -> jax.Array:
    return jnp.sum(safe.cross_entropy_term(p, q), axis=axis)


def _kl_divergence(p: jax.Array, q: jax.Array, *, axis: int) -> jax.Array:
    return jnp.sum(safe.kl_term(p, q), axis=axis)


def _jensen_shannon(p: jax.Array, q: jax.Array, *, axis: int) -> jax.Array:
    return jnp.sum(safe.jensen_shannon_term(p, q), axis=axis)


def _mutual_information(p: jax.Array, *, axis: tuple[int, int]) -> jax.Array:
    return joint.mutual_information(p)


def _self_information_of_rows(z: jax.Array, classes: ClassAxis) -> jax.Array:
    return -softmax.log_softmax(z, classes)


@functools.partial(jax.jit, static_argnames=("measure", "axis", "order"), inline=True)
def _evaluate(
    measure: Callable[..., jax.Array],
    operands: tuple[jax.Array, ...],
    where: jax.Array | None,
    log_base: jax.Array | None,
    *,
    axis: int | tuple[int, int] | None,
    order: float | None = None,
) -> jax.Array:
    """A deleted class is one of probability 0: in every measure it adds nothing where all operands are 0."""
    operands = arrays.accumulated(*operands)
    if where is not None:
        operands = tuple(jnp.where(where, x, 0) for x in operands)
    options = {} if order is None else {"order": order}
    return _in_base(measure(*safe.in_domain(*operands), axis=axis, **options), log_base)


@functools.partial(jax.jit, static_argnames=("measure", "axis"), inline=True)
def _evaluate_logits(
    measure: Callable[..., jax.Array],
    operands: tuple[jax.Array, ...],
    where: jax.Array | None,
    log_base: jax.Array | None,
    *,
    axis: int,
) -> jax.Array:
    operands = arrays.accumulated(*operands)
    if where is not None:
        operands = tuple(jnp.where(where, z, -jnp.inf) for z in operands)
    value = measure(*operands, ClassAxis(axis))
    return _in_base(value if measure is _self_information_of_rows else jnp.squeeze(value, axis), log_base)


def _in_base(value: jax.Array, log_base: jax.Array | None) -> jax.Array:
    return value if log_base is None else value / log_base.astype(value.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def _of_one(
    function: str,
    measure: Callable[..., jax.Array],
    p: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    base: ArrayLike | None,
    order: float | None = None,
) -> jax.Array:
    operands, axis, where = _check_operands(function, ("p",), (p,), axis, where)
    return _evaluate(measure, operands, where, arrays.log_base(function, base), axis=axis, order=order)


def _of_two(
    function: str,
    measure: Callable[..., jax.Array],
    p: ArrayLike,
    q: ArrayLike,
    axis: int,
    where: ArrayLike | None,
    base: ArrayLike | None,
    order: float | None = None,
) -> jax.Array:
    operands, axis, where = _check_operands(function, ("p", "q"), (p, q), axis, where)
    return _evaluate(measure, operands, where, arrays.log_base(function, base), axis=axis, order=order)


def _of_logits(
    function: str,
    measure: Callable[..., jax.Array],
    names: tuple[str, ...],
    logits: tuple[ArrayLike, ...],
    axis: int,
    where: ArrayLike | None,
    base: ArrayLike | None,
) -> jax.Array:
    operands, axis, where = _check_operands(function, names, logits, axis, where)
    return _evaluate_logits(measure, operands, where, arrays.log_base(function, base), axis=axis)


def _check_operands(
    function: str, names: tuple[str, ...], values: tuple[ArrayLike, ...], axis: int, where: ArrayLike | None
) -> tuple[tuple[jax.Array, ...], int, jax.Array | None]:
    """The operands and `where`, broadcast to one shape, and the axis of the classes in it, counted from the end."""
    operands = [arrays.floating(function, name, value) for name, value in zip(names, values, strict=True)]
    axis = arrays.canonical_axis(function, axis, max(max(x.ndim for x in operands), 1))
    for name, x in zip(names, operands, strict=True):
        if x.ndim < -axis:
            raise arrays.shape_error(function, name, f"have a class axis at {axis}", x)
        check_classes(function, name, x.shape, axis)
        if x.shape[axis] != operands[0].shape[axis]:
            expected = f"have {operands[0].shape[axis]} classes at axis {axis}, as `{names[0]}` has"
            raise arrays.shape_error(function, name, expected, x)
    try:
        shape = np.broadcast_shapes(*(x.shape for x in operands))
    except ValueError as error:
        expected = f"broadcast against `{names[0]}`, {arrays.describe(operands[0])}"
        raise arrays.shape_error(function, names[-1], expected, operands[-1]) from error
    if where is not None:
        where = arrays.boolean(function, "where", where)
        arrays.check_broadcast(function, "where", where, shape, " and ".join(f"`{name}`" for name in names))
        where = jnp.broadcast_to(where, shape)
    return tuple(jnp.broadcast_to(x, shape) for x in operands), axis, where


def _check_joint(function: str, pxy: ArrayLike, base: ArrayLike | None) -> tuple[jax.Array, jax.Array | None]:
    p = arrays.floating(function, "pxy", pxy)
    if p.ndim < 2:
        raise arrays.shape_error(function, "pxy", "have two class axes", p)
    for axis in (-2, -1):
        check_classes(function, "pxy", p.shape, axis)
    return p, arrays.log_base(function, base)


def _check_order(function: str, order: Any, high: float) -> float:
    if isinstance(order, bool) or not isinstance(order, (int, float, np.integer, np.floating)):
        raise arrays.dtype_error(function, "order", "be a Python number, known when the function is traced", order)
    if not 0 <= order <= high:
        raise ValueError(f"jaxent.{function}: `order` must lie in [0, inf{']' if high == np.inf else ')'}, got {order}")
    return float(order)
