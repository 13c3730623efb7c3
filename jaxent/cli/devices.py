"""The devices of this machine, or one line that says why there are none."""

import os
from typing import Any

import jax

from jaxent.cli.errors import CommandError, first_line


def available() -> list[Any]:
    """`jax.devices()`; JAX_PLATFORMS may name a platform that this machine does not have."""
    try:
        return jax.devices()
    except Exception as error:  # which one depends on the platform and on what is missing of it
        asked = os.environ.get("JAX_PLATFORMS")
        told = f" with JAX_PLATFORMS={asked}" if asked else ""
        raise CommandError(f"JAX finds no device{told}: {first_line(error)}") from error
