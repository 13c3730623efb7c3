"""What can be wrong with the operands of an information measure."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from jaxent._arguments import arrays
from jaxent._check.input_rules import NORMALIZED, probabilities_as_logits
from jaxent._check.rule_match import Counted, RuleMatch, not_finite


class Distribution(Counted):
    """One operand: `values` are `(rows, classes)`, the classes of several axes flat, without those that are masked."""

    def __init__(self, xp: Any, name: str, x: Any, axes: tuple[int, ...], where: Any):
        self.name, self.axes = name, axes
        self.epsilon = float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
        self.whole = not self.epsilon
        wide = xp.asarray(x).astype(arrays.accumulation_dtype(x))
        mask = xp.ones(wide.shape, bool) if where is None else xp.broadcast_to(xp.asarray(where), wide.shape)
        self.values, self.mask = self._rows(xp, wide), self._rows(xp, mask)
        self.batch = tuple(n for i, n in enumerate(wide.shape) if i - wide.ndim not in axes)
        super().__init__(xp, xp.any(self.mask, axis=-1))

    def _rows(self, xp: Any, x: Any) -> Any:
        last = tuple(range(-len(self.axes), 0))
        x = xp.moveaxis(x, self.axes, last)
        batch = x.shape[: x.ndim - len(self.axes)]
        return x.reshape(math.prod(batch), math.prod(x.shape[len(batch) :]))


def probability_rule_matches(r: Distribution, normalized: bool) -> Iterator[RuleMatch]:
    """For probabilities: those of events if not `normalized`, else distributions."""
    xp = r.xp
    p = xp.where(r.mask, r.values, 0)
    total = xp.sum(p, axis=-1)
    whole = xp.all((p == xp.round(p)) & xp.isfinite(p), axis=-1) & (xp.max(p, axis=-1, initial=0) > 1)
    if r.whole:
        whole = xp.ones_like(whole)
    yield r.match(
        "labels_as_probabilities",
        f"whole numbers as `{r.name}`, where probabilities are expected",
        r.counted & whole,
        "they sum to {mass:.6g}",
        "For labels, pass empirical_distribution(labels, num_classes); for counts, counts / counts.sum().",
        {"mass": total},
    )
    bad = r.mask & ~((r.values >= 0) & (r.values < xp.inf))
    yield r.match(
        "negative_probabilities",
        f"probabilities `{r.name}` that are negative, infinite or nan",
        r.counted & ~whole & xp.any(bad, axis=-1),
        "{value:.4g} at {at}",
        "The measure is nan there: pass probabilities, not logits (softmax(logits), or the form `_with_logits`).",
        r.first(bad, r.values),
    )
    off = xp.abs(total - 1) > max(NORMALIZED, 4 * r.epsilon)
    what = f"`{r.name}` that do not sum to one" if normalized else f"`{r.name}` above one"
    yield r.match(
        "not_normalized",
        what,
        r.counted & ~whole & ~xp.any(bad, axis=-1) & (off if normalized else xp.any(p > 1 + NORMALIZED, axis=-1)),
        "they sum to {mass:.4g}" if normalized else "{mass:.4g}",
        "The measure does not divide by the sum, and says nothing unless it gets a distribution: normalise first."
        if normalized
        else "Self-information is that of probabilities.",
        {"mass": total},
    )


def logit_rule_matches(r: Distribution) -> Iterator[RuleMatch]:
    xp, z = r.xp, r.values
    yield probabilities_as_logits(r, xp.where(r.mask, z, 0), r.epsilon)
    yield not_finite(r, z, r.mask & (xp.isnan(z) | xp.isposinf(z)), f"`{r.name}`")
    top = xp.max(xp.where(r.mask, z, -xp.inf), axis=-1, initial=-xp.inf)
    yield r.match(
        "fully_masked",
        f"rows of `{r.name}` in which every class is masked",
        r.counted & xp.isneginf(top),
        "all {top}",
        "Such a row has no softmax: leave it out.",
        {"top": top},
    )


def infinite_rule_match(p: Distribution, q: Distribution) -> RuleMatch:
    """Where `q` gives no probability to what `p` holds possible."""
    bad = p.mask & q.mask & (p.values > 0) & (q.values == 0)
    return p.match(
        "infinite_measure",
        f"`{q.name}` of 0 where `{p.name}` is positive",
        p.counted & p.xp.any(bad, axis=-1),
        "class {at}",
        "The measure is +inf there: it needs a model that gives every class some probability.",
        {"at": p.xp.argmax(bad, axis=-1)},
    )
