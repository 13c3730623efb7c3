"""Measures of several variables, from a table of their joint probabilities.

`jaxent.information` describes what all measures have in common; `empirical_distribution` makes a table of labels.
"""

from typing import Literal

import jax

from jaxent._arguments import arrays
from jaxent._arguments.distributions import Measure, check_joint, evaluate
from jaxent._errors import ArgumentValueError, public
from jaxent._math import joint
from jaxent._typing import ArrayLike

Normalizer = Literal["mean", "min", "max", "geometric", "joint"]


@public
def joint_entropy(pxy: ArrayLike, *, base: ArrayLike | None = None, keepdims: bool = False) -> jax.Array:
    r"""Entropy of a pair of variables, in nats (or in units of log `base`; 2 gives bits).

    $$H(X, Y) = -\sum_{x,y} p(x, y) \log p(x, y)$$

    Cover & Thomas (2006), equation 2.8.

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating. `base`: of the logarithm.
    `keepdims`: keep the axes of the table, with length 1.

    **Returns:** `(*batch,)`; edges as in `entropy`.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or base.

    >>> joint_entropy(jnp.array([[0.25, 0.25], [0.25, 0.25]]), base=2)
    Array(2., dtype=float32)
    """
    return _of_table(joint.entropy, pxy, base, keepdims)


@public
def conditional_entropy(
    pxy: ArrayLike, *, axis: int = -1, base: ArrayLike | None = None, keepdims: bool = False
) -> jax.Array:
    r"""Entropy of one variable of a pair given the other, in nats (or in units of log `base`; 2 gives bits).

    $$H(X \mid Y) = -\sum_{x,y} p(x, y) \log \frac{p(x, y)}{p(y)}$$

    Cover & Thomas (2006), equation 2.10. `axis` is the variable that is known: with `pxy` of shape
    `(x_classes, y_classes)`, `axis=-1` gives `H(X | Y)` and `axis=-2` gives `H(Y | X)`.

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating. `axis`: one of the last two,
    the variable conditioned on. `base`, `keepdims`: as in `joint_entropy`.

    **Returns:** `(*batch,)`, never negative, relatively accurate also when one variable nearly determines the other. An
    entry with `p = 0` adds 0 and has derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape, axis or base.

    >>> conditional_entropy(jnp.array([[0.25, 0.25], [0.5, 0.0]]), axis=-2, base=2)  # H(Y | X)
    Array(0.5, dtype=float32)
    """
    p = check_joint("pxy", pxy, 2)
    axis = arrays.canonical_axis(axis, p.ndim)
    if axis < -2:
        raise ArgumentValueError(f"`axis` must be one of the last two of {p.ndim}, got {axis}")
    return _of_table(joint.entropy_of_x if axis == -1 else joint.entropy_of_y, p, base, keepdims)


@public
def mutual_information(pxy: ArrayLike, *, base: ArrayLike | None = None, keepdims: bool = False) -> jax.Array:
    r"""Mutual information of a pair of variables, in nats (or in units of log `base`; 2 gives bits).

    $$I(X; Y) = D(P_{XY} \| P_X P_Y) = \sum_{x,y} p(x, y) \log \frac{p(x, y)}{p(x)\, p(y)}$$

    Cover & Thomas (2006), equation 2.28. Taken as a divergence it is never negative and keeps its digits near
    independence, where `H(X) + H(Y) - H(X, Y)` has none; in float32 its floor is about 1e-14.

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating, that sum to one; for a table
    of counts pass `counts / counts.sum()`. For a table that does not sum to one the value is the divergence from a
    product with another sum, which is not a mutual information. `base`, `keepdims`: as in `joint_entropy`.

    **Returns:** `(*batch,)`. An entry with `p = 0` has derivative 0; the others' is `log(p_xy / (p_x p_y))`, which
    leaves out the constant that moving off the simplex would add.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or base.

    >>> mutual_information(jnp.array([[0.5, 0.0], [0.0, 0.5]]), base=2)
    Array(1., dtype=float32)
    """
    return _of_table(joint.mutual_information, pxy, base, keepdims)


@public
def conditional_mutual_information(
    pxyz: ArrayLike, *, base: ArrayLike | None = None, keepdims: bool = False
) -> jax.Array:
    r"""Mutual information of two variables given a third, in nats (or in units of log `base`; 2 gives bits).

    $$I(X; Y \mid Z) = \sum_{x,y,z} p(x, y, z) \log \frac{p(x, y, z)\, p(z)}{p(x, z)\, p(y, z)}$$

    Cover & Thomas (2006), equations 2.60 and 2.61. As accurate as `mutual_information`, and never negative.

    **Arguments:** `pxyz`: joint probabilities, `(*batch, x_classes, y_classes, z_classes)`, floating. `base`: of the
    logarithm. `keepdims`: keep the axes of the table, with length 1.

    **Returns:** `(*batch,)`. An entry with `p = 0` has derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or base.

    >>> p = jnp.zeros((2, 2, 2)).at[[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]].set(0.25)  # z = x xor y
    >>> conditional_mutual_information(p, base=2), mutual_information(p.sum(-1))
    (Array(1., dtype=float32), Array(0., dtype=float32))
    """
    return _of_table(joint.conditional_mutual_information, pxyz, base, keepdims, variables=3)


@public
def pointwise_mutual_information(pxy: ArrayLike, *, base: ArrayLike | None = None) -> jax.Array:
    r"""Pointwise mutual information of each pair of classes, in nats (or in units of log `base`; 2 gives bits).

    $$\mathrm{pmi}(x, y) = \log \frac{p(x, y)}{p(x)\, p(y)}$$

    Fano (1961), chapter 2; Church & Hanks (1990). Its mean over the table is `mutual_information`.

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating, that sum to one. `base`: of
    the logarithm.

    **Returns:** the shape of `pxy`; float64 for float64, else float32. Where `p(x) p(y) = 0`, which says nothing about
    the pair, it is 0 with derivative 0. Elsewhere `p(x, y) = 0` gives -inf, with derivative +inf with respect to that
    entry.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or base.

    >>> pointwise_mutual_information(jnp.array([[0.5, 0.0], [0.0, 0.5]]), base=2)
    Array([[  1., -inf],
           [-inf,   1.]], dtype=float32)
    """
    p = check_joint("pxy", pxy, 2)
    return evaluate(joint.pointwise_mutual_information, (p,), None, arrays.log_base(base), axes=())


@public
def normalized_mutual_information(
    pxy: ArrayLike, *, normalizer: Normalizer = "mean", keepdims: bool = False
) -> jax.Array:
    r"""Mutual information of a pair of variables as a share of their entropy, a number from 0 to 1.

    $$\mathrm{NMI}(X, Y) = \frac{I(X; Y)}{N(H(X), H(Y))}$$

    Vinh, Epps & Bailey (2010). Equal to `sklearn.metrics.normalized_mutual_info_score` of the labels that
    `pxy` is the `empirical_distribution` of, with `average_method` "arithmetic" for "mean".

    **Arguments:** `pxy`: joint probabilities, `(*batch, x_classes, y_classes)`, floating, that sum to one.
    `normalizer`: `N`, the "mean" of the two entropies, their "min" or "max", the "geometric" mean, or "joint" for
    `H(X, Y)`. `keepdims`: as in `joint_entropy`.

    **Returns:** `(*batch,)`. If one variable has a single class, 0; if both have, 1. An entry with `p = 0` has
    derivative 0, and off the simplex the derivative leaves out what that of `mutual_information` does. Where the two
    entropies are equal, "min" and "max" have a kink, with the mean of both derivatives.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or normalizer.

    >>> normalized_mutual_information(jnp.array([[0.5, 0.0], [0.0, 0.5]]))
    Array(1., dtype=float32)
    """
    if normalizer not in joint.SHARES:
        expected = ", ".join(map(repr, joint.SHARES))
        raise ArgumentValueError(f"`normalizer` must be one of {expected}, got {normalizer!r}")
    return _of_table(joint.SHARES[normalizer], pxy, None, keepdims)


@public
def variation_of_information(pxy: ArrayLike, *, base: ArrayLike | None = None, keepdims: bool = False) -> jax.Array:
    r"""Variation of information between two variables, in nats (or in units of log `base`; 2 gives bits).

    $$\mathrm{VI}(X, Y) = H(X \mid Y) + H(Y \mid X) = H(X, Y) - I(X; Y)$$

    Meila (2007). A metric on partitions: 0 if each variable determines the other.

    **Arguments:** as in `joint_entropy`.

    **Returns:** `(*batch,)`, never negative, relatively accurate near 0. An entry with `p = 0` has derivative 0.

    **Raises:** `TypeError` for a wrong dtype, `ValueError` for a wrong shape or base.

    >>> variation_of_information(jnp.full((2, 2), 0.25), base=2)
    Array(2., dtype=float32)
    """
    return _of_table(joint.variation, pxy, base, keepdims)


def _of_table(
    measure: Measure,
    table: ArrayLike,
    base: ArrayLike | None,
    keepdims: bool,
    variables: int = 2,
) -> jax.Array:
    p = check_joint("pxyz"[: 1 + variables], table, variables)
    axes = tuple(range(-variables, 0))
    return evaluate(measure, (p,), None, arrays.log_base(base), axes=axes, keepdims=bool(keepdims))
