"""The types of arguments, by names that stay short where `help` prints a signature."""

from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from jax.typing import ArrayLike as ArrayLike
    from jax.typing import DTypeLike as DTypeLike
else:
    # The unions that JAX's names stand for fill several lines each.
    ArrayLike, DTypeLike = NewType("ArrayLike", object), NewType("DTypeLike", object)
    ArrayLike.__module__ = DTypeLike.__module__ = "jax.typing"
