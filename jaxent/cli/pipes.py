"""Files of the caller's that may turn out to be pipes."""

import os
from io import BufferedReader
from pathlib import Path


def open_without_waiting(path: Path) -> BufferedReader:
    """The file, for reading. A plain `open` of a pipe that has no writer would wait for one."""
    return open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
