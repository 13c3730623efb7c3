"""Sums that know their weight: the empirical risk of a batch, of many batches, of many devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxent._arguments import arrays
from jaxent._arguments.reduction import WeightedSum
from jaxent._errors import public
from jaxent._math.two_float import TwoFloat, two_float_sum
from jaxent._serialization import exportable
from jaxent._typing import ArrayLike


def _count(n: int = 0) -> TwoFloat:
    hi = np.float32(n)
    return TwoFloat(jnp.asarray(hi), jnp.asarray(np.float32(n - int(hi))))


def _two_float(argument: str, value: ArrayLike) -> TwoFloat:
    """A scalar; an integer that comes from the host, such as a number of bytes, keeps 48 bits."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return _count(int(value))
    (x,) = arrays.accumulated(arrays.real(argument, value))
    arrays.check_shape(argument, x, (), "a scalar")
    return TwoFloat(x, jnp.zeros_like(x))


@exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EmpiricalRisk:
    r"""The mean loss over a data set that comes in batches, in nats, exact however many there are.

    $$R = \frac{\sum_n w_n \ell_n}{\sum_n w_n}$$

    Both sums are kept in two float32 each, so that 1e9 tokens lose nothing; one float32 stops growing at 2e7 additions
    of 1. Adding is compensated inside a batch too (Ogita, Rump and Oishi, 2005, algorithm 4.4). A pytree: it can be a
    scan's carry, crosses `jit` and `shard_map`, and the gradient flows through the mean. Inside `shard_map` a scan's
    carry must vary over the devices from the start: begin with the first batch, or with
    `jax.lax.pcast(EmpiricalRisk(), axis_name, to="varying")`.

    >>> risk = EmpiricalRisk().update(jnp.array([1.0, 3.0])).update(jnp.array([5.0, jnp.nan]), jnp.array([2.0, 0.0]))
    >>> float(risk.mean()), float(risk.weight)
    (3.5, 4.0)
    """

    _total: TwoFloat = dataclasses.field(default_factory=_count)
    _weight: TwoFloat = dataclasses.field(default_factory=_count)

    @property
    def total(self) -> jax.Array:
        """The weighted sum of the losses, rounded to float32."""
        return self._total.hi + self._total.lo

    @property
    def weight(self) -> jax.Array:
        """The sum of the weights, rounded to float32."""
        return self._weight.hi + self._weight.lo

    @public
    def update(self, losses: ArrayLike, weights: ArrayLike | None = None) -> "EmpiricalRisk":
        """The risk with the losses of one batch added.

        **Arguments:** `losses`: any shape, floating, not yet weighted. `weights`: the same shape, of either sign, or
        bool. A weight of 0 silences its loss, even nan or inf; the derivative with respect to such a weight is that of
        any other, or 0 where the loss is not finite.
        """
        x = arrays.floating("losses", losses)
        if weights is None:
            (x,) = arrays.accumulated(x)
            return self._plus(two_float_sum(x), _count(x.size))
        w = arrays.real("weights", weights)
        arrays.check_shape("weights", w, x.shape, "one for each loss")
        x, w = arrays.accumulated(x, w)
        # Only a loss that is not finite is taken out: with 0 in place of every silenced loss, the derivative with
        # respect to a weight of 0 would lose its term.
        silenced = (w == 0) & ~jnp.isfinite(x)
        x, w = jnp.where(silenced, 0, x), jnp.where(silenced, 0, w)
        return self._plus(two_float_sum(x * w), two_float_sum(w))

    @public
    def merge(self, other: "EmpiricalRisk | WeightedSum") -> "EmpiricalRisk":
        """The risk with another part's sums added; the order of the parts does not matter."""
        if isinstance(other, WeightedSum):
            return self._plus(_two_float("total", other.total), _two_float("weight", other.weight))
        if not isinstance(other, EmpiricalRisk):
            raise arrays.dtype_error("other", "be an EmpiricalRisk or a WeightedSum", other)
        return self._plus(other._total, other._weight)

    def _plus(self, total: TwoFloat, weight: TwoFloat) -> "EmpiricalRisk":
        return EmpiricalRisk(
            self._total.plus(total.astype(self._total.hi.dtype)),
            self._weight.plus(weight.astype(self._weight.hi.dtype)),
        )

    def psum(self, axis_name: str | tuple[str, ...]) -> "EmpiricalRisk":
        """Summed over a mesh axis, inside `jax.shard_map` or `vmap(axis_name=...)`, as exactly as `merge` does it."""

        def over_devices(part: TwoFloat) -> TwoFloat:
            # psum of `hi` would round. Each device fills its own slot; adding zeros to it is exact.
            slot = jnp.arange(lax.axis_size(axis_name)) == lax.axis_index(axis_name)
            hi, lo = (lax.psum(jnp.where(slot, x, 0), axis_name) for x in part)
            return two_float_sum(hi).plus(two_float_sum(lo))

        return EmpiricalRisk(over_devices(self._total), over_devices(self._weight))

    @public
    def mean(self, base: ArrayLike | None = None) -> jax.Array:
        """The empirical risk, in nats or in units of log `base` (2 = bits).

        It is 0, with derivative 0, when the weights sum to 0.
        """
        log_base = arrays.log_base(base)
        nats = self._total.over(self._weight)
        return nats if log_base is None else nats / log_base.astype(nats.dtype)

    def perplexity(self) -> jax.Array:
        """`exp` of the mean: how many equally likely outcomes would be as hard to predict."""
        return jnp.exp(self.mean())

    @public
    def bits_per(self, count: ArrayLike) -> jax.Array:
        """The total in bits, divided by how many bytes or words it encodes; 0 for a count of 0."""
        in_range = jnp.asarray(arrays.scalar("count", count, low=0.0))
        units = _two_float("count", in_range if isinstance(count, jax.Array) else count).astype(self._total.hi.dtype)
        return self._total.over(units) / float(np.log(2))
