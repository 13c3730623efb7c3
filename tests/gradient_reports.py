"""Losses with planted derivatives, and what a report of `check_gradient` says of one way."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxent import GradientReport
from jaxent._check.gradient import Comparison

LATE = np.array([0.0, -20.0, -25.0], np.float32)


def of(report: GradientReport, way: str) -> list[Comparison]:
    return [c for c in report.comparisons if c.way == way]


def with_gradient(loss: Callable[[Any], Any], gradient: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The loss with another derivative, in both modes."""
    wrong = jax.custom_jvp(loss)
    wrong.defjvp(lambda primals, tangents: (loss(*primals), jnp.sum(gradient(*primals) * tangents[0])))
    return wrong


def cubes(x: Any) -> jax.Array:
    return jnp.sum(x**3)
