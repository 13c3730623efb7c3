"""The keywords of the losses beside `reduction`, on which the type of a result depends: for the overloads."""

from typing import Any, Literal, TypedDict

from jax.typing import ArrayLike

Precision = Any  # what `jax.lax.dot_general` takes as `precision`
Divergence = Literal["forward", "reverse", "jensen_shannon"]


class LabelOptions(TypedDict, total=False):
    """Of `nll_loss`."""

    axis: int
    where: ArrayLike | None
    weights: ArrayLike | None
    class_weights: ArrayLike | None
    ignore_index: int | None
    denominator: ArrayLike | None


class SoftmaxOptions(LabelOptions, total=False):
    """Of `softmax_cross_entropy`."""

    label_smoothing: ArrayLike
    z_loss: ArrayLike
    vocab_axis: str | None


class BinaryOptions(TypedDict, total=False):
    """Of `sigmoid_cross_entropy`."""

    where: ArrayLike | None
    weights: ArrayLike | None
    pos_weight: ArrayLike | None
    denominator: ArrayLike | None


class LinearOptions(TypedDict, total=False):
    """Of `linear_softmax_cross_entropy`."""

    bias: ArrayLike | None
    where: ArrayLike | None
    weights: ArrayLike | None
    class_weights: ArrayLike | None
    ignore_index: int | None
    label_smoothing: ArrayLike
    z_loss: ArrayLike
    soft_cap: ArrayLike | None
    temperature: ArrayLike
    denominator: ArrayLike | None
    chunk_rows: int | None
    precision: Precision
    vocab_axis: str | None


class DivergenceOptions(TypedDict, total=False):
    """Of `linear_kl_divergence`."""

    bias_p: ArrayLike | None
    bias_q: ArrayLike | None
    divergence: Divergence
    mixture: ArrayLike
    soft_cap_p: ArrayLike | None
    soft_cap_q: ArrayLike | None
    temperature: ArrayLike
    where: ArrayLike | None
    weights: ArrayLike | None
    denominator: ArrayLike | None
    chunk_rows: int | None
    precision: Precision
    vocab_axis: str | None
