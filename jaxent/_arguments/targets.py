"""The arguments of a softmax loss: checked on the way in, then brought into the form of the row losses."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxent._arguments import arrays
from jaxent._arguments.reduction import Reduction, check_reduction
from jaxent._errors import ArgumentValueError
from jaxent._math.label_loss import INVALID, encode_labels, has_label
from jaxent._math.row_losses import LossOptions, RowTargets
from jaxent._math.sparse_targets import SparseRow
from jaxent._mesh.check import check_class_axis, check_vocab_axis
from jaxent._mesh.class_axis import ClassAxis, VocabAxis
from jaxent._serialization import exportable
from jaxent._typing import ArrayLike


@exportable
class SparseTargets(NamedTuple):
    """A few classes per row with their probabilities, all other classes having 0; never spread over the vocabulary.

    Mixup has two classes per row, a stored teacher its top k. A class listed twice in a row counts twice, one of
    `ignore_index` adds 0, and one outside the vocabulary makes its row nan.

    >>> targets = SparseTargets(jnp.array([[0, 2]]), jnp.array([[0.75, 0.25]]))
    >>> softmax_cross_entropy(jnp.zeros((1, 4)), targets)
    Array(1.3862944, dtype=float32)
    """

    classes: ArrayLike
    """`(*batch, k)`, any integer dtype."""
    probabilities: ArrayLike
    """`(*batch, k)`, floating."""


class SoftmaxArguments(NamedTuple):
    """The options of a softmax loss, as the caller passed them or as checked arrays; None is an option left out."""

    targets: Any = None  # None where only the logits count
    where: Any = None
    weights: Any = None
    class_weights: Any = None
    smoothing: Any = None  # 0.0 before the check
    z_loss: Any = None  # 0.0 before the check

    def without_classes(self, targets: str) -> dict[str, Any]:
        """The arguments with rows and no classes, by their names; `targets` is how the function calls the first."""
        rows = {"where": self.where, "weights": self.weights}
        if isinstance(self.targets, SparseTargets):
            return rows | {f"{targets}.{name}": x for name, x in self.targets._asdict().items()}
        if isinstance(self.targets, jax.Array) and jnp.issubdtype(self.targets.dtype, jnp.floating):
            return rows
        return rows | {targets: self.targets}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxCall:
    """The checked arguments of a softmax loss of logits; what is static in them is part of the type."""

    logits: jax.Array
    arguments: SoftmaxArguments
    divisor: jax.Array | None
    classes: ClassAxis = dataclasses.field(metadata={"static": True})
    ignore_index: int | None = dataclasses.field(metadata={"static": True})
    reduction: Reduction = dataclasses.field(metadata={"static": True})


def check_softmax_call(
    logits: ArrayLike,
    given: SoftmaxArguments,
    *,
    axis: int,
    ignore_index: int | None,
    reduction: Reduction = "none",
    denominator: ArrayLike | None = None,
    vocab_axis: VocabAxis = None,
    logits_name: str = "logits",
    targets_name: str = "targets",
    targets_required: bool = True,
) -> SoftmaxCall:
    """A softmax loss of logits, or what is made of one. Targets that are called labels are no probabilities."""
    z, axis = check_logits(logits_name, logits, axis)
    if vocab_axis is not None:
        check_vocab_axis(vocab_axis, given.without_classes(targets_name))
    arguments = check_softmax_arguments(given, z.shape, axis, targets_name, targets_required)
    divisor = check_reduction(reduction, denominator)
    check_class_axis(
        vocab_axis, {logits_name: (z, axis)}, arguments.without_classes(targets_name), arguments.class_weights
    )
    ignore_index = check_ignore_index(ignore_index)
    return SoftmaxCall(z, arguments, divisor, ClassAxis(axis, vocab_axis), ignore_index, reduction)


def check_softmax_arguments(
    given: SoftmaxArguments, shape: tuple[int, ...], axis: int, targets: str = "targets", targets_required: bool = True
) -> SoftmaxArguments:
    """`shape` is that of the logits, with the classes at `axis` (negative)."""
    rows = rows_shape(shape, axis)
    where, weights = check_row_arguments(rows, given.where, given.weights)
    checked = class_weights = None
    if given.targets is not None or targets_required:
        checked = check_targets(targets, given.targets, shape, axis, rows)
    elif given.class_weights is not None:
        raise ArgumentValueError(f"`class_weights` goes with `{targets}`, got no {targets}")
    if given.class_weights is not None:
        class_weights = arrays.real("class_weights", given.class_weights)
        arrays.check_shape("class_weights", class_weights, (shape[axis],), "one weight for each class")
    smoothing = arrays.scalar("label_smoothing", given.smoothing, low=0.0, high=1.0, neutral=0.0)
    z_loss = arrays.scalar("z_loss", given.z_loss, low=0.0, neutral=0.0)
    return SoftmaxArguments(checked, where, weights, class_weights, smoothing, z_loss)


def rows_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The shape without its class axis."""
    at = len(shape) + axis
    return shape[:at] + shape[at + 1 :]


def check_classes(argument: str, shape: tuple[int, ...], axis: int) -> None:
    if shape[axis] == 0:
        raise ArgumentValueError(f"`{argument}` must have at least one class, got shape {shape}")


def check_logits(argument: str, logits: ArrayLike, axis: int) -> tuple[jax.Array, int]:
    z = arrays.floating(argument, logits)
    if z.ndim == 0:
        raise arrays.shape_error(argument, "have a class axis", z)
    axis = arrays.canonical_axis(axis, z.ndim)
    if z.shape[axis] == 0:
        check_classes(argument, z.shape, axis)
    return z, axis


def check_row_arguments(
    rows: tuple[int, ...], where: ArrayLike | None, weights: ArrayLike | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """`where` as bool, `weights` as a floating array."""
    if where is not None:
        where = arrays.boolean("where", where)
        arrays.check_shape("where", where, rows, "one entry for each row")
    if weights is not None:
        weights = arrays.real("weights", weights)
        arrays.check_shape("weights", weights, rows, "one entry for each row")
    return where, weights


def nan_if_negative(weights: jax.Array | None) -> jax.Array | None:
    """Weights where a negative one has no meaning."""
    return None if weights is None else jnp.where(weights < 0, jnp.nan, weights)


def check_targets(
    argument: str, targets: Any, shape: tuple[int, ...], axis: int, rows: tuple[int, ...]
) -> jax.Array | SparseTargets:
    """Class indices of any integer dtype; where `argument` is not labels, class probabilities, or a few of both."""
    if argument == "labels":
        return check_labels(argument, targets, rows)
    if isinstance(targets, SparseTargets):
        return check_sparse_targets(targets, rows)
    expected = "be integer class indices or floating class probabilities"
    targets = arrays.as_array(argument, targets, expected)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        note = "one class index for each row; one-hot targets and probabilities are floating"
        return check_labels(argument, targets, rows, note)
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise arrays.dtype_error(argument, expected, targets)
    probabilities = arrays.floating(argument, targets)
    note = "class probabilities are shaped like the logits; class indices are integers"
    arrays.check_shape(argument, probabilities, shape, note)
    return probabilities


def check_sparse_targets(targets: SparseTargets, rows: tuple[int, ...]) -> SparseTargets:
    chosen = arrays.integer("targets.classes", targets.classes)
    shares = arrays.floating("targets.probabilities", targets.probabilities)
    if chosen.ndim != len(rows) + 1 or chosen.shape[:-1] != rows:
        raise arrays.shape_error("targets.classes", f"have shape {(*rows, 'k')}, k classes for each row", chosen)
    arrays.check_shape("targets.probabilities", shares, chosen.shape, "one for each class of `targets.classes`")
    return SparseTargets(chosen, shares)


def check_labels(
    argument: str, labels: ArrayLike, rows: tuple[int, ...], note: str = "one class index for each row"
) -> jax.Array:
    labels = arrays.integer(argument, labels)
    arrays.check_shape(argument, labels, rows, note)
    return labels


def check_ignore_index(ignore_index: Any) -> int | None:
    if ignore_index is None or type(ignore_index) is int:
        return ignore_index
    return arrays.as_int("ignore_index", ignore_index, "be an int or None")


def check_top_k(top_k: int, count: int) -> int:
    top_k = arrays.as_int("top_k", top_k)
    if not 0 <= top_k <= count:
        raise ArgumentValueError(f"`top_k` must lie in [0, {count}], the number of classes, got {top_k}")
    return top_k


# ----------------------------------------------------------------------------------------------------------------------
# In the form of the row losses


def row_targets(
    arguments: SoftmaxArguments, z: jax.Array | jax.ShapeDtypeStruct, classes: ClassAxis, ignore_index: int | None
) -> tuple[RowTargets, LossOptions]:
    """The arguments in the logits' dtype, with the class axis in place; `z` gives dtype and number of classes."""
    class_weights = None if arguments.class_weights is None else arguments.class_weights.astype(z.dtype)
    smoothing, z_loss = (None if x is None else x.astype(z.dtype) for x in (arguments.smoothing, arguments.z_loss))
    per_row = arguments.where, None if arguments.weights is None else arguments.weights.astype(z.dtype)
    where, weights = (None if x is None else jnp.expand_dims(x, classes.axis) for x in per_row)
    targets = arguments.targets
    labels = probabilities = sparse = label_weights = None
    if targets is None:
        ignored = jnp.zeros((*z.shape[: z.ndim + classes.axis], 1, *z.shape[z.ndim + classes.axis + 1 :]), bool)
    elif isinstance(targets, SparseTargets):
        sparse, ignored = sparse_row(targets, classes, classes.size(z), z.dtype, class_weights, ignore_index)
    elif jnp.issubdtype(targets.dtype, jnp.integer):
        kept = encode_labels(targets, classes.size(z)), has_label(targets, ignore_index)
        labels, ignored = (jnp.expand_dims(x, classes.axis) for x in kept)
    else:
        probabilities = targets.astype(z.dtype)
        ignored = classes.zeros(probabilities) != 0
    if where is not None:
        ignored |= ~where
    if labels is not None:
        if weights is not None:
            ignored |= (weights == 0) & (labels == INVALID)
        if class_weights is not None:
            label_weights = jnp.where((labels == INVALID) & ~ignored, jnp.nan, classes.lookup(class_weights, labels))
    if class_weights is not None:
        class_weights = class_weights.reshape([-1 if i - z.ndim == classes.axis else 1 for i in range(z.ndim)])
    rows = RowTargets(labels, ignored, probabilities, weights, label_weights, sparse)
    return rows, LossOptions(class_weights, smoothing, z_loss)


def sparse_row(
    targets: SparseTargets,
    classes: ClassAxis,
    count: int,
    dtype: np.dtype,
    class_weights: jax.Array | None,
    ignore_index: int | None,
) -> tuple[SparseRow, jax.Array]:
    """The entries along the class axis, weighted by their classes, and the rows that have none."""
    chosen, shares = (jnp.moveaxis(jnp.asarray(x), -1, classes.axis) for x in targets)
    labels, ignored = encode_labels(chosen, count), has_label(chosen, ignore_index)
    shares = jnp.where(ignored, 0, jnp.where(labels == INVALID, jnp.nan, shares.astype(dtype)))
    if class_weights is not None:
        shares *= classes.lookup(class_weights, jnp.where(ignored, INVALID, labels))
    return SparseRow(labels, shares), jnp.all(ignored, axis=classes.axis, keepdims=True)
