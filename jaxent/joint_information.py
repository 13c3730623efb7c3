"""Measures of several variables, from a table of their joint probabilities.

Probabilities are taken as they are: nothing is rescaled to sum to one. A negative or nan probability gives nan.
"""

import jax
from jax.typing import ArrayLike

from jaxent._arguments import arrays
from jaxent._arguments.distributions import Measure, check_joint, evaluate
from jaxent._errors import ArgumentValueError, public
from jaxent._math import joint


@public
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
    return _of_table(joint.entropy, pxy, base)


@public
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
    p = check_joint("pxy", pxy, 2)
    axis = arrays.canonical_axis(axis, p.ndim)
    if axis < -2:
        raise ArgumentValueError(f"`axis` must be one of the last two of {p.ndim}, got {axis}")
    return _of_table(joint.entropy_of_x if axis == -1 else joint.entropy_of_y, p, base)


@public
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
    return _of_table(joint.mutual_information, pxy, base)


def _of_table(measure: Measure, pxy: ArrayLike, base: ArrayLike | None) -> jax.Array:
    p = check_joint("pxy", pxy, 2)
    return evaluate(measure, (p,), None, arrays.log_base(base), axes=(-2, -1))
