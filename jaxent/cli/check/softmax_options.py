"""The arguments of a softmax loss: every option alone, and all of them together. The tests draw on this table too.

Logits lie on a grid of 1/16, so that their differences are exact in every dtype; option values are binary fractions for
the same reason. Labels and targets have the classes last.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Arguments = dict[str, Any]


def draw_logits(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (np.round(rng.normal(size=shape) * 3 * 16).clip(-127, 127) / 16).astype(dtype)


def draw_labels(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    return rng.integers(0, count, size=shape, dtype=np.int32)


def draw_fractions(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """0, 1/4, ... 2, with the first entry 0."""
    x = (rng.integers(0, 9, size=shape) / 4).astype(np.float32)
    x.flat[:1] = 0
    return x


def draw_probabilities(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of multiples of 1/64 that sum to one, with zeros among them."""
    counts = rng.multinomial(64, np.full(shape[-1], 1 / shape[-1]), size=shape[:-1])
    return (counts / 64).astype(np.float32)


def _some(rng: np.random.Generator, labels: np.ndarray, value: int) -> np.ndarray:
    """The labels, with about a third of them, and always the last, replaced by `value`."""
    chosen = rng.random(labels.shape) < 1 / 3
    chosen.flat[-1:] = True
    return np.where(chosen, value, labels).astype(labels.dtype)


def _everything(rng: np.random.Generator, shape: tuple[int, ...]) -> Arguments:
    batch, count = shape[:-1], shape[-1]
    return {
        "where": rng.random(batch) < 0.7,
        "weights": draw_fractions(rng, batch),
        "class_weights": draw_fractions(rng, (count,)),
        "label_smoothing": 0.125,
        "z_loss": 0.25,
    }


def _labels(**options: Any) -> Callable[[np.random.Generator, tuple[int, ...]], Arguments]:
    return lambda rng, shape: {"targets": draw_labels(rng, shape[:-1], shape[-1]), **options}


# name -> arguments in addition to the logits, for logits of a shape with the classes last
OPTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Arguments]] = {
    "plain": _labels(),
    "where": lambda rng, s: _labels(where=rng.random(s[:-1]) < 0.6)(rng, s),
    "weights": lambda rng, s: _labels(weights=draw_fractions(rng, s[:-1]))(rng, s),
    "class_weights": lambda rng, s: _labels(class_weights=draw_fractions(rng, s[-1:]))(rng, s),
    "ignore_-100": lambda rng, s: {"targets": _some(rng, draw_labels(rng, s[:-1], s[-1]), -100)},
    "ignore_a_class": _labels(ignore_index=1),
    "ignore_none": _labels(ignore_index=None),
    "smoothing": _labels(label_smoothing=0.125),
    "smoothing_1": _labels(label_smoothing=1.0),
    "z_loss": _labels(z_loss=0.25),
    "denominator": _labels(denominator=4.0),
    "smoothing_class_weights": lambda rng, s: _labels(label_smoothing=0.25, class_weights=draw_fractions(rng, s[-1:]))(
        rng, s
    ),
    "everything": lambda rng, s: {
        "targets": _some(rng, draw_labels(rng, s[:-1], s[-1]), -100),
        **_everything(rng, s),
    },
    "probabilities": lambda rng, s: {"targets": draw_probabilities(rng, s)},
    "one_hot": lambda rng, s: {"targets": np.eye(s[-1], dtype=np.float32)[draw_labels(rng, s[:-1], s[-1])]},
    "probabilities_not_normalised": lambda rng, s: {"targets": draw_fractions(rng, s)},
    "probabilities_class_weights": lambda rng, s: {
        "targets": draw_probabilities(rng, s),
        "class_weights": draw_fractions(rng, s[-1:]),
    },
    "probabilities_everything": lambda rng, s: {"targets": draw_probabilities(rng, s), **_everything(rng, s)},
}
