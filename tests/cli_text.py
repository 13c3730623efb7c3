"""Text, a small run and its errors, for the tests of the command line."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxent.cli import main

PATIENCE = 240  # seconds
CACHE = tempfile.TemporaryDirectory(prefix="jaxent-tests-")  # of compiled programs, for as long as the tests run
SMALL = ["--vocab-size", "272", "--width", "8", "--steps", "10", "--batch-rows", "32", "--checkpoint-every", "5"]
WORDS = [b"alpha", b"beta", b"gamma", b" = ", b"(", b")\n", b"if ", b"return ", b"x1", b" + ", b"\n    ", b"_d"]


def write_text(folder: Path) -> Path:
    """Six files, each with phrases of its own that come again."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        phrases = [b"".join(rng.choice(np.array(WORDS, object), 6)) for _ in range(8)]
        (folder / f"f{i}.txt").write_bytes(b"".join(rng.choice(np.array(phrases, object), 60)))
    return folder


def fails(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> None:
    """The command ends with the exit code and one line on stderr, and prints nothing else."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    *stages, last = err.splitlines()
    assert last.startswith("jaxent: ")
    assert message in last
    assert not any(line.startswith(("Traceback", "jaxent:")) for line in stages)
    assert out == ""


def environment(**more: str) -> dict[str, str]:
    """Of a process of its own: one CPU device, with a cache of programs and no other settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "MPL", "NO_"))}
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", CACHE.name)
    kept |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # Processes that share the cache may read an entry while another one writes it.
    quiet = {"PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry:UserWarning"}
    return kept | quiet | {"JAX_PLATFORMS": "cpu"} | more


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`jaxent` with the arguments, as a user would start it."""
    command = [Path(sys.executable).with_name("jaxent"), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, **{"text": True, "env": environment(), **streams, **options})


def run(*arguments: object, **options: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `jaxent` with the arguments."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err
