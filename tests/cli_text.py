"""Text, a small run and its errors, for the tests of the command line."""

from pathlib import Path

import numpy as np
import pytest

from jaxent.cli import main

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
