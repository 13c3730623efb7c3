"""The types of arguments, by names that stay short where `help` prints a signature."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.typing import ArrayLike as ArrayLike
    from jax.typing import DTypeLike as DTypeLike
else:

    class _Alias(type):
        """JAX's names stand for unions, which fill several lines each; a class prints as its name."""

        def __instancecheck__(cls, instance: object) -> bool:
            """Leaves the check to the functions themselves, where a run-time type checker asks."""
            return True

    ArrayLike = _Alias("ArrayLike", (), {"__module__": "jax.typing"})
    DTypeLike = _Alias("DTypeLike", (), {"__module__": "jax.typing"})
