"""What can be wrong with the inputs of a binary cross-entropy, each entry a row of its own."""

from collections.abc import Iterator
from typing import Any

from jaxent._arguments import arrays
from jaxent._check.rule_match import Counted, RuleMatch, row_weights


class BinaryRows(Counted):
    """The arguments of one call, flat; `inputs` are logits or probabilities."""

    def __init__(self, xp: Any, inputs: Any, targets: Any, where: Any, weights: Any):
        def flat(x: Any) -> Any:
            return xp.broadcast_to(xp.asarray(x), inputs.shape).reshape(-1)

        self.inputs, self.targets = (flat(x).astype(arrays.accumulation_dtype(inputs)) for x in (inputs, targets))
        self.weights = None if weights is None else flat(weights)
        counted = xp.ones(self.inputs.shape, bool) if where is None else flat(where)
        super().__init__(xp, counted if self.weights is None else counted & (self.weights != 0))


def binary_rule_matches(r: BinaryRows, probabilities: bool) -> Iterator[RuleMatch]:
    """Everything that `diagnose` names, in its order."""
    xp, x, t = r.xp, r.inputs, r.targets
    if probabilities:
        yield r.match(
            "not_probabilities",
            "probabilities outside [0, 1]",
            r.counted & ~((x >= 0) & (x <= 1)),
            "{value:.4g}",
            "This loss takes no sigmoid: pass sigmoid(logits), or call the loss that takes logits.",
            {"value": x},
        )
    else:
        yield r.match(
            "not_finite",
            "logits of nan",
            r.counted & xp.isnan(x),
            "{value}",
            "Loss and gradient are nan there: look for where it starts (jax.debug_nans), or leave it out with `where`.",
            {"value": x},
        )
    yield r.match(
        "targets_out_of_range",
        "binary targets outside [0, 1]",
        r.counted & ~((t >= 0) & (t <= 1)),
        "target {value:.6g}",
        "The loss is nan there: divide a mask of 0 and 255 by 255, and drop what is missing, such as -1, with `where`.",
        {"value": t},
    )
    if r.weights is not None:
        yield from row_weights(r, r.weights)
    yield r.match(
        "ignored_rows",
        "entries that do not count",
        ~r.counted & ~xp.any(r.counted),
        "by `where` or weight 0",
        "Nothing is learnt: look at `where` and `weights`.",
    )._replace(total=r.counted.shape[0])
