"""What the commands report in one line."""

import importlib
import importlib.util

LONGEST_REASON = 240  # characters


class CommandError(Exception):
    """The user can mend this: one line on stderr, exit code 2."""


class Stopped(Exception):
    """A signal asked the run to stop, and everything worth keeping has been written."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def visible(text: str, kept: str = "") -> str:
    r"""The text with its control characters, save those that are `kept`, spelt out: a terminal obeys none of them.

    >>> print(visible("red \x1b[31m\n"))
    red \x1b[31m\n
    """
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def reason(error: OSError) -> str:
    """`No space left on device` rather than `[Errno 28] ...`."""
    return error.strerror or str(error)


def first_line(error: Exception) -> str:
    """What an exception says, without the advice and the traces that follow."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


def require(*packages: str) -> None:
    """Says at the start, not at the end of a run, which package of the extra `cli` is missing or cannot be used."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"{package} is not installed; it comes with the extra: pip install 'jaxent[cli]'")
        try:
            importlib.import_module(package)
        except Exception as error:  # MPLBACKEND and files of settings are read here
            raise CommandError(f"cannot import {package}: {first_line(error)}") from error
