"""Inputs of losses that are clean, and what `diagnose` finds in others, in short."""

from typing import Any

import numpy as np

from jaxent import Finding

INF, NAN = np.inf, np.nan
CLEAN = np.array([[1.5, 0.0, -2.0], [0.5, 0.25, 0.75], [0.0, -1.0, 3.0], [2.0, 2.5, -1.0]], np.float32)
LABELS = np.array([0, 2, 1, 1], np.int32)
SOFT = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.25, 0.25, 0.5]], np.float32)
SOFTMAX = np.exp(CLEAN) / np.exp(CLEAN).sum(-1, keepdims=True)
SURE = np.array([[0.0, -20.0, -25.0], [-30.0, -21.0, 0.0], [-18.0, 0.0, -INF], [-40.0, 0.0, -50.0]], np.float32)


def changed(x: np.ndarray, changes: dict[Any, Any]) -> np.ndarray:
    x = x.copy()
    for at, value in changes.items():
        x[at] = value
    return x


Options = dict[str, Any]


def summary(findings: list[Finding]) -> list[tuple[str, int, int, tuple[int, ...]]]:
    return [(f.kind, f.count, f.total, f.first) for f in findings]
