"""What a rule finds, and the rules that several kinds of inputs share.

The same lines run with NumPy and with `jax.numpy`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple


class RuleMatch(NamedTuple):
    """Rows in which something is wrong; `example` is a format for the `values` of the first of them."""

    kind: str
    what: str
    rows: Any
    total: Any
    example: str
    values: dict[str, Any]
    advice: str
    allowed: bool = False
    """Whether it is only worth a word: `checked` does not stop a program for it."""


class Counted:
    """Rows of arrays of `xp`, which is `numpy` or `jax.numpy`, of which `counted` are looked at."""

    def __init__(self, xp: Any, counted: Any):
        self.xp, self.counted = xp, counted

    def match(
        self,
        kind: str,
        what: str,
        rows: Any,
        example: str,
        advice: str,
        values: dict[str, Any] | None = None,
        allowed: bool = False,
    ) -> RuleMatch:
        return RuleMatch(kind, what, rows, self.xp.sum(self.counted), example, values or {}, advice, allowed)

    def at(self, x: Any, index: Any) -> Any:
        """One entry of each row."""
        return self.xp.take_along_axis(x, index[:, None], axis=-1)[:, 0]

    def first(self, bad: Any, x: Any) -> dict[str, Any]:
        """The first bad entry of each row, and where it is."""
        index = self.xp.argmax(bad, axis=-1)
        return {"value": self.at(x, index), "at": index}


def not_finite(r: Counted, x: Any, bad: Any, what: str) -> RuleMatch:
    return r.match(
        "not_finite",
        f"{what} with nan or inf",
        r.counted & r.xp.any(bad, axis=-1),
        "{value} at {at}",
        "Loss and gradient are nan there: look for where it starts (jax.debug_nans), or drop padding with `where`.",
        r.first(bad, x),
    )


def row_weights(r: Counted, weights: Any) -> Iterator[RuleMatch]:
    """Of either sign, as advantages and unlikelihood are, but the mean of the loss divides by their sum."""
    value = {"value": weights}
    yield r.match(
        "bad_weights",
        "row weights of nan",
        r.counted & r.xp.isnan(weights),
        "weight {value}",
        "The loss is nan there: drop the row with `where`, or give it a weight of 0.",
        value,
    )
    yield r.match(
        "bad_weights",
        "row weights that are negative",
        r.counted & (weights < 0),
        "weight {value:.4g}",
        'They reward mistakes. If that is meant, as for advantages, pass a `denominator`: "mean" divides by the sum.',
        value,
        allowed=True,
    )
