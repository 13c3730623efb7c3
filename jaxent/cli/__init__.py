"""The command `jaxent`: `train`, `evaluate`, `tokens` and `check`."""

from jaxent.cli.main import main as main
