"""What the commands print: text that no terminal obeys, JSON that every reader takes, and streams that may be gone."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from jaxent.cli.errors import visible


def say(line: str) -> None:
    """A line on stderr. Nobody has to read it: a full disk or a closed pipe there stops no run."""
    try:
        print(visible(line), file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Nobody takes the stream; without this Python would complain about it once more at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def has_colours() -> bool:
    """What https://no-color.org and terminals without escape sequences ask for."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def to_json(value: Any) -> str:
    """Indented JSON. It has no infinity and no nan: those are null."""
    return json.dumps(_without_infinities(value), indent=2, allow_nan=False)


def print_json(value: Any) -> None:
    print(to_json(value))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_infinities(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_columns(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each mapping, under the names of the first one's entries."""
    cells = [[name.replace("_", " ") for name in rows[0]]]
    cells += [
        [f"{v:,.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else visible(v) for v in row.values()]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())
