"""What is wrong with the inputs of a loss over classes: on the host, or inside a program under `checkify`.

`_suspicions` knows what can be wrong; here its rows become findings or the errors of a program.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jax.typing import ArrayLike

from jaxent._arguments import arrays
from jaxent._arguments.targets import check_ignore_index, check_softmax_arguments, check_softmax_call, rows_shape
from jaxent._check.input_rules import Rows, suspicions


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


def diagnose(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = -100,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
) -> list[Finding]:
    r"""What looks wrong in the inputs of `softmax_cross_entropy`, the worst first; empty for clean ones.

    - `"probabilities_as_logits"`: every row is one of probabilities, so that the softmax is taken twice. Said only if
      uniform logits would look like it with a chance below 1e-4, $(2 \delta / (C-1)!)^N$ for N rows of C classes whose
      sums miss one by at most $\delta$ (the density of Irwin and Hall's sum of uniforms at one). Log-probabilities are
      logits.
    - `"labels_out_of_range"`, `"labels_one_based"`: the second if they run from 1 to C.
    - `"not_finite"`: nan or +inf in the logits. `"fully_masked"`: every class is -inf, or one number below -1e8.
    - `"infinite_loss"`: a class that the target counts on has the logit -inf.
    - `"not_normalized"`: target probabilities that miss the sum of one by more than 1e-3. `"negative_targets"`.
    - `"bad_weights"`: negative or nan. `"zero_class_weights"`: a class in use weighs nothing.
    - `"float16_overflow"`: the logits exceed 65504 where it decides the loss. `"ignored_rows"`: 90% or more.
    - `"collapsed_loss"`: the usual `logsumexp(z) - z[y]` is 0 in every row through rounding, and so is its gradient.

    **Arguments:** those of `softmax_cross_entropy`, as values: it runs on the host. Rows that the loss does not count
    are not looked at.

    **Returns:** a list of `Finding`.

    **Raises:** `TypeError` for traced arguments (see `checked`) and for a wrong dtype, `ValueError` for a wrong shape.

    >>> for finding in diagnose(jnp.array([[0.3, 0.3, 0.4]]), jnp.array([3])):
    ...     print(finding.kind, finding.count, finding.first, finding.example)
    probabilities_as_logits 1 (0,) they sum to 1
    labels_one_based 1 (0,) label 3 of classes 0 to 2
    >>> diagnose(jnp.log(jnp.array([[0.3, 0.3, 0.4]])), jnp.array([2]))
    []
    """
    name = "diagnose"
    options = {"where": where, "weights": weights, "class_weights": class_weights}
    options |= {"label_smoothing": label_smoothing, "z_loss": z_loss}
    for argument, value in {"logits": logits, "targets": targets, **options}.items():
        _check_concrete(name, argument, value)
    (z, arguments, _), static = check_softmax_call(
        name,
        logits,
        targets,
        axis=axis,
        ignore_index=ignore_index,
        reduction="none",
        denominator=None,
        vocab_axis=None,
        **options,
    )
    axis = static["classes"].axis
    batch = rows_shape(z.shape, axis)
    findings = []
    with np.errstate(all="ignore"):
        rows = Rows(np, z, axis, z.shape[axis], arguments, static["ignore_index"])
        for suspicion in suspicions(rows, linear=False):
            if count := int(np.sum(suspicion.rows)):
                at = int(np.argmax(suspicion.rows))
                first = tuple(map(int, np.unravel_index(at, batch))) if batch else ()
                example = suspicion.example.format(**{k: v[at].item() for k, v in suspicion.values.items()})
                kind, what, total, advice = suspicion.kind, suspicion.what, int(suspicion.total), suspicion.advice
                findings.append(Finding(kind, what, count, total, first, example, advice))
    return findings


def checked(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss, with the findings of `diagnose` as errors of `jax.experimental.checkify`.

    Value and gradient are those of `loss`. Each finding is a `checkify.check`, the worst first, whose error says what
    and where. Use it under `checkify.checkify`, with or without `jit`, `grad` and `scan`; without `checkify` a `jit`
    refuses it, as it does any check.

    **Arguments:** `loss`: called with logits `(*batch, classes)` and targets first, like `softmax_cross_entropy` and
    `nll_loss`, or with hidden states, kernel and targets, like `linear_softmax_cross_entropy`; then the findings are
    those that need no logits. Among its keyword arguments, the options of `diagnose` mean what they mean there.

    **Returns:** a function with the arguments of `loss`.

    **Raises:** `TypeError` for a loss without classes; the function `ValueError` if the classes are split over devices
    (`vocab_axis`).

    >>> from jax.experimental import checkify
    >>> loss = jax.jit(checkify.checkify(jax.value_and_grad(checked(softmax_cross_entropy))))
    >>> error, (value, gradient) = loss(jnp.zeros((2, 3)), jnp.array([2, 7]))
    >>> print(error.get().split(".")[0])
    labels out of range: 1 of 2 rows, the first at [1] (label 7 of classes 0 to 2)
    """
    signature = inspect.signature(loss)
    if "pos_weight" in signature.parameters or len(signature.parameters) < 2:
        raise TypeError(f"jaxent.checked: `loss` must be a loss of logits (or hidden states) and targets, got {loss!r}")
    linear = "kernel" in signature.parameters

    @functools.wraps(loss)
    def checked_loss(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        _check_values(bound.arguments, linear)
        return loss(*args, **options)

    return checked_loss


def _check_values(arguments: dict[str, Any], linear: bool) -> None:
    """One `checkify.check` for each suspicion."""
    name = "checked"
    arguments = {k: v for k, v in arguments.items() if k != "options"} | arguments.get("options", {})
    if arguments.get("vocab_axis") is not None:
        raise ValueError(f"jaxent.{name}: `vocab_axis` must be None: the findings need whole rows of classes")
    inputs, *rest = arguments.values()
    kernel, targets = rest[:2] if linear else (None, rest[0])
    inputs = lax.stop_gradient(arrays.floating(name, "hidden" if linear else "logits", inputs))
    axis = arrays.canonical_axis(name, arguments.get("axis", -1), inputs.ndim)
    count = inputs.shape[axis] if kernel is None else kernel.shape[1]
    given = check_softmax_arguments(
        name,
        (*inputs.shape[:axis], count, *inputs.shape[len(inputs.shape) + axis + 1 :]),
        axis,
        targets,
        where=arguments.get("where"),
        weights=arguments.get("weights"),
        class_weights=arguments.get("class_weights"),
        label_smoothing=arguments.get("label_smoothing", 0.0),
        z_loss=arguments.get("z_loss", 0.0),
    )
    given = jax.tree.map(lax.stop_gradient, given)
    ignore_index = check_ignore_index(name, arguments.get("ignore_index", -100))
    batch = rows_shape(inputs.shape, axis)
    if 0 in batch:
        return
    for suspicion in suspicions(Rows(jnp, inputs, axis, count, given, ignore_index), linear):
        at = jnp.argmax(suspicion.rows)
        places = {f"place_{i}": x for i, x in enumerate(jnp.unravel_index(at, batch))} if batch else {}
        first = tuple(f"{{{place}}}" for place in places)
        message = _sentence(suspicion.what, "{count}", "{total}", first, suspicion.example, suspicion.advice)
        checkify.check(
            ~jnp.any(suspicion.rows),
            message,
            count=jnp.sum(suspicion.rows),
            total=jnp.asarray(suspicion.total),
            **places,
            **{k: v[at] for k, v in suspicion.values.items()},
        )


def _check_concrete(function: str, argument: str, value: Any) -> None:
    try:
        np.asarray(value)
    except jax.errors.TracerArrayConversionError as error:
        expected = "be a concrete array (inside jit, grad or vmap use jaxent.checked)"
        raise arrays.dtype_error(function, argument, expected, value) from error
    except (TypeError, ValueError):
        pass  # no array at all: the loss's own checks say so
