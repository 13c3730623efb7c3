"""Errors in arguments: raised without the name of the public function, which adds it where it is called."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class ShardingWarning(UserWarning):
    """A call that moves more between devices than it has to, and what to write instead.

    Issued while a program is traced, once for each place in the library; `warnings.filterwarnings("ignore",
    category=jaxent.ShardingWarning)` turns it off.
    """


class ArgumentTypeError(TypeError):
    """A wrong dtype or type; users see a `TypeError`."""


class ArgumentValueError(ValueError):
    """A wrong shape, option or value; users see a `ValueError`."""


def public(function: Function) -> Function:
    """The function as users call it, which names itself in the errors about its arguments."""
    wing = "torch_compat." if function.__module__.startswith("jaxent.torch_compat") else ""
    return named(wing + function.__qualname__.removesuffix(".__post_init__"))(function)


def named(name: str) -> Callable[[Function], Function]:
    """A function whose errors about arguments begin with `jaxent.NAME`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            try:
                return function(*args, **options)
            except ArgumentTypeError as error:
                raise TypeError(f"jaxent.{name}: {error}") from error.__cause__
            except ArgumentValueError as error:
                raise ValueError(f"jaxent.{name}: {error}") from error.__cause__

        wrapped: Any = call
        return wrapped

    return decorate
