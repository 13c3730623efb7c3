"""The keywords of the losses other than `reduction`, which decides the type of a result: for the overloads."""

from typing import Any, Literal, TypedDict

from jaxent._mesh.class_axis import VocabAxis
from jaxent._typing import ArrayLike, DTypeLike

Precision = Any  # what `jax.lax.dot_general` takes as `precision`
Divergence = Literal["forward", "reverse", "jensen_shannon"]


class RowOptions(TypedDict, total=False):
    """Of all losses."""

    where: ArrayLike | None
    weights: ArrayLike | None
    denominator: ArrayLike | None


class ClassOptions(RowOptions, total=False):
    """Of the losses with labels."""

    class_weights: ArrayLike | None
    ignore_index: int | None


class CrossEntropyOptions(ClassOptions, total=False):
    """Of the cross-entropies of logits and of hidden states."""

    label_smoothing: ArrayLike
    z_loss: ArrayLike
    vocab_axis: VocabAxis


class LabelOptions(ClassOptions, total=False):
    """Of `nll_loss`."""

    axis: int


class SoftmaxOptions(CrossEntropyOptions, total=False):
    """Of `softmax_cross_entropy`."""

    axis: int | tuple[int, ...]


class ScoreOptions(TypedDict, total=False):
    """Of `brier_score`."""

    axis: int | tuple[int, ...]
    where: ArrayLike | None
    weights: ArrayLike | None
    ignore_index: int | None


class BinaryOptions(RowOptions, total=False):
    """Of `sigmoid_cross_entropy`."""

    pos_weight: ArrayLike | None


class LinearOptions(CrossEntropyOptions, total=False):
    """Of `linear_softmax_cross_entropy`."""

    bias: ArrayLike | None
    soft_cap: ArrayLike | None
    temperature: ArrayLike
    chunk_rows: int | None
    dtype: DTypeLike | None
    precision: Precision


class DivergenceOptions(RowOptions, total=False):
    """Of `linear_kl_divergence`."""

    bias_p: ArrayLike | None
    bias_q: ArrayLike | None
    divergence: Divergence
    mixture: ArrayLike
    soft_cap_p: ArrayLike | None
    soft_cap_q: ArrayLike | None
    temperature: ArrayLike
    chunk_rows: int | None
    dtype: DTypeLike | None
    precision: Precision
    vocab_axis: VocabAxis


class TopDivergenceOptions(RowOptions, total=False):
    """Of `linear_kl_divergence_from_top`."""

    tail: Literal["bucket", "renormalize", "drop"]
    divergence: Literal["forward", "reverse"]
    bias: ArrayLike | None
    soft_cap: ArrayLike | None
    temperature: ArrayLike
    ignore_index: int | None
    chunk_rows: int | None
    dtype: DTypeLike | None
    precision: Precision
    vocab_axis: VocabAxis
