"""Text for the tests of the command line."""

from pathlib import Path

import numpy as np

WORDS = [b"alpha", b"beta", b"gamma", b" = ", b"(", b")\n", b"if ", b"return ", b"x1", b" + ", b"\n    ", b"_d"]


def write_text(folder: Path) -> Path:
    """Six files, each with phrases of its own that come again."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        phrases = [b"".join(rng.choice(np.array(WORDS, object), 6)) for _ in range(8)]
        (folder / f"f{i}.txt").write_bytes(b"".join(rng.choice(np.array(phrases, object), 60)))
    return folder
