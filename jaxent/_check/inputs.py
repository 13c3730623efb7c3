"""What is wrong with the inputs of a loss or a measure: on the host, or inside a program under `checkify`.

The rules know what can be wrong; here their matches become findings or the errors of a program.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jaxent._arguments import arrays
from jaxent._arguments.targets import SparseTargets
from jaxent._check.call_inputs import read_inputs
from jaxent._check.loss_calls import LossSignature, read_signature
from jaxent._check.rule_match import RuleMatch
from jaxent._errors import ArgumentTypeError, ArgumentValueError, named, public
from jaxent._typing import ArrayLike
from jaxent.losses import sigmoid_cross_entropy, softmax_cross_entropy


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in how many rows, where first, and what to do about it; `str` says it in a line."""

    kind: str
    """A name to test for, like `"labels_out_of_range"`."""
    what: str
    """What is wrong, in words."""
    count: int
    """How many rows."""
    total: int
    """Of how many: all of them for `"ignored_rows"`, else those that are counted."""
    first: tuple[int, ...]
    """The index of the first one in the batch; `()` for a single row."""
    example: str
    """What the first one holds."""
    advice: str
    """What to do about it."""

    def __str__(self) -> str:
        return _sentence(self.what, self.count, self.total, self.first, self.example, self.advice)


def _sentence(what: str, count: Any, total: Any, first: tuple[Any, ...], example: str, advice: str) -> str:
    where = f"the first at [{', '.join(map(str, first))}]" if first else "the only one"
    return f"{what}: {count} of {total} rows, {where} ({example}). {advice}"


@public
def diagnose(
    logits: ArrayLike,
    targets: ArrayLike | SparseTargets | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
) -> list[Finding]:
    r"""What looks wrong in the inputs of a loss or a measure, the worst first; empty for clean ones.

    For `softmax_cross_entropy`:

    - `"probabilities_as_logits"`: every row holds probabilities, so the softmax is taken twice. Reported only if
      uniform random logits would look like this with a chance below 1e-4, $(2 \delta / (C-1)!)^N$ for N rows of C
      classes whose sums miss one by at most $\delta$ (the density of Irwin and Hall's sum of uniforms at one).
      Log-probabilities are logits.
    - `"labels_out_of_range"`, `"labels_one_based"`: the second if they run from 1 to C.
    - `"not_finite"`: nan or +inf in the logits. `"fully_masked"`: every class is -inf, or one number below -1e8.
    - `"infinite_loss"`: a class that the target counts on has the logit -inf.
    - `"not_normalized"`: target probabilities that miss the sum of one by more than 1e-3. `"negative_targets"`.
    - `"bad_weights"`: nan or negative; negative row weights are allowed, and only mentioned. `"zero_class_weights"`: a
      class in use weighs nothing.
    - `"float16_overflow"`: the logits exceed 65504 where it decides the loss. `"ignored_rows"`: 90% or more.
    - `"collapsed_loss"`: the usual `logsumexp(z) - z[y]` is 0 in every row through rounding, and so is its gradient.

    For `nll_loss` also `"not_log_probabilities"`. For binary losses `"targets_out_of_range"` (outside [0, 1]),
    `"not_probabilities"`, `"not_finite"`, `"bad_weights"`. For measures, of each operand, `"labels_as_probabilities"`
    (whole numbers: labels or counts), `"negative_probabilities"`, `"not_normalized"`, `"infinite_measure"`, or those of
    logits. For `brier_score` the first three of the forecasts, and those of targets and weights.

    **Arguments:** those of the loss, as values: it runs on the host. Rows that the loss does not count are not looked
    at. `loss`: the function that they are meant for, one of this library or of `torch_compat`, or one like them (see
    `checked`); None is `softmax_cross_entropy`, or `sigmoid_cross_entropy` for flags or integers of the logits' shape.
    Options that have no keyword here go into a `functools.partial` of it.

    **Returns:** a list of `Finding`.

    **Raises:** `TypeError` for traced arguments (see `checked`), a wrong dtype or a loss of hidden states, `ValueError`
    for a wrong shape.

    >>> for finding in diagnose(jnp.array([[0.3, 0.3, 0.4]]), jnp.array([3])):
    ...     print(finding.kind, finding.count, finding.first, finding.example)
    probabilities_as_logits 1 (0,) they sum to 1
    labels_one_based 1 (0,) label 3 of classes 0 to 2
    >>> diagnose(jnp.log(jnp.array([[0.3, 0.3, 0.4]])), jnp.array([2]))
    []
    >>> [finding.kind for finding in diagnose(jnp.array([3.0, 5.0, 2.0]), loss=entropy)]
    ['labels_as_probabilities']
    """
    options = {"where": where, "weights": weights, "class_weights": class_weights, "ignore_index": ignore_index}
    options |= {"label_smoothing": label_smoothing, "z_loss": z_loss, "axis": axis}
    for argument, value in {"logits": logits, "targets": targets, **options}.items():
        _check_concrete(argument, value)
    if loss is None:
        loss = sigmoid_cross_entropy if _are_flags(logits, targets) else softmax_cross_entropy
    signature = read_signature(loss)
    if signature.kind == "hidden":
        raise arrays.dtype_error("loss", "be one of logits or distributions (see jaxent.checked)", loss)
    given = {k: v for k, v in options.items() if not _is_default(k, v)}
    for option in given:
        if not signature.takes(option):
            raise ArgumentTypeError(f"`{option}` must be an option of `loss`, and {signature.name} has none")
    arguments = signature.bind(logits, *([] if targets is None else [targets]), **given)
    with np.errstate(all="ignore"):
        return [
            finding
            for batch, matches in read_inputs(np, signature, arguments)
            for match in matches
            if (finding := _finding(match, batch)) is not None
        ]


DEFAULTS: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(diagnose).parameters.items()
}


def _is_default(option: str, value: Any) -> bool:
    return value is DEFAULTS[option] or (isinstance(value, (int, float)) and value == DEFAULTS[option])


def _are_flags(logits: ArrayLike, targets: ArrayLike | SparseTargets | None) -> bool:
    """Integers or bools shaped like the logits are no labels, of which there is one for each row."""
    if targets is None or isinstance(targets, (bool, int, SparseTargets)):
        return False
    kind = arrays.as_array("targets", targets).dtype.kind
    return kind in "biu" and np.ndim(targets) > 0 and np.shape(targets) == np.shape(logits)


def _finding(match: RuleMatch, batch: tuple[int, ...]) -> Finding | None:
    count = int(np.sum(match.rows))
    if not count:
        return None
    at = int(np.argmax(match.rows))
    first = tuple(map(int, np.unravel_index(at, batch))) if batch else ()
    example = match.example.format(**{k: v[at].item() for k, v in match.values.items()})
    return Finding(match.kind, match.what, count, int(match.total), first, example, match.advice)


@public
def checked(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss, with the findings of `diagnose` as errors of `jax.experimental.checkify`.

    Value and gradient are those of `loss`. Each finding is a `checkify.check`, the worst first, whose error says what
    and where; negative row weights, which are allowed, are not reported. Use it under `checkify.checkify`, with or
    without `jit`, `grad` and `scan`; without `checkify`, `jit` refuses it, as it does any check.

    **Arguments:** `loss`: a loss or a measure of this library, a function or class of `torch_compat`, a
    `functools.partial` of one, or a function whose parameters are called like theirs: `logits` `(*batch, classes)`,
    `log_probs` or `input` and targets; `hidden`, `kernel` and targets, where the findings are those that need no
    logits; or distributions `p` and `q`. Among its keyword arguments, the options of `diagnose` mean what they mean
    there. With `input` and `target` the classes lie where PyTorch has them, on axis 1.

    **Returns:** a function with the arguments of `loss`.

    **Raises:** `TypeError` for another function; the returned function raises `ValueError` if the classes are split
    over devices (`vocab_axis`).

    >>> from jax.experimental import checkify
    >>> loss = jax.jit(checkify.checkify(jax.value_and_grad(checked(softmax_cross_entropy))))
    >>> error, (value, gradient) = loss(jnp.zeros((2, 3)), jnp.array([2, 7]))
    >>> print(error.get().split(".")[0])
    labels out of range: 1 of 2 rows, the first at [1] (label 7 of classes 0 to 2)
    """
    signature = read_signature(loss)

    def checked_loss(*args: Any, **options: Any) -> Any:
        _check_values(signature, signature.bind(*args, **options))
        return loss(*args, **options)

    return functools.update_wrapper(checked_loss, loss, updated=())


@named("checked")
def _check_values(signature: LossSignature, arguments: dict[str, Any]) -> None:
    """One `checkify.check` for each rule."""
    if arguments.get("vocab_axis") is not None:
        raise ArgumentValueError("`vocab_axis` must be None: the findings need whole rows of classes")
    for batch, matches in read_inputs(jnp, signature, arguments):
        if 0 in batch:
            continue
        for match in matches:
            if match.allowed:
                continue
            at = jnp.argmax(match.rows)
            places = {f"place_{i}": x for i, x in enumerate(jnp.unravel_index(at, batch))} if batch else {}
            first = tuple(f"{{{place}}}" for place in places)
            message = _sentence(match.what, "{count}", "{total}", first, match.example, match.advice)
            checkify.check(
                ~jnp.any(match.rows),
                message,
                count=jnp.sum(match.rows),
                total=jnp.asarray(match.total),
                **places,
                **{k: v[at] for k, v in match.values.items()},
            )


def _check_concrete(argument: str, value: Any) -> None:
    try:
        np.asarray(value)
    except jax.errors.TracerArrayConversionError as error:
        expected = "be a concrete array (inside jit, grad or vmap use jaxent.checked)"
        raise arrays.dtype_error(argument, expected, value) from error
    except (TypeError, ValueError, RuntimeError):
        pass  # no array at all: the loss's own checks say so
