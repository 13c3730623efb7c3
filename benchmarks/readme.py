"""The README's table of speed, generated from a record."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import number

SECTION = re.compile(r"<!-- speed: (\S+) -->\n.*?<!-- speed ends -->", flags=re.DOTALL)
PEERS = {"optax": "optax", "jax.nn.log_softmax": "`log_softmax`", "torch dense": "torch", "torch fused": "torch fused"}


def table(record: dict[str, Any]) -> str:
    """Value and gradient of every plain case: our time and share of the limit, and each peer's time by ours."""
    where, versions = record["machine"], record["versions"]
    date = record["date"][:10]
    lines = [
        f"Value and gradient on {where['device']}, {where['cores']} cores, float32, {date}, jax {versions['jax']}: "
        "milliseconds, percent of what the device's matrix products or memory allow, the peers' time by ours (above 1 "
        "jaxent is faster), and temporaries.",
        "",
        "| N, D, V | jaxent | of limit | " + " | ".join(PEERS.values()) + " | MiB | optax MiB |",
        "|---" * (5 + len(PEERS)) + "|",
    ]
    return "\n".join([*lines, *_rows(record)])


def _rows(record: dict[str, Any]) -> Iterator[str]:
    for case in record["cases"]:
        what = case["case"]
        plain = what["suite"] in ("dense", "linear") and not what["sweep"] and not what["donated"]
        if not plain or what["mode"] != "value and gradient" or what["dtype"] != "float32":
            continue
        rows = {row["peer"]: row for row in case["rows"]}
        ours = rows["jaxent"]
        shape = f"{what['rows']}, {what['hidden'] or '-'}, {what['classes']}"
        peers = [f"{1 / rows[name]['ratio']:.2f}" if name in rows else "-" for name in PEERS]
        memory = [number(rows[name]["temp_mib"]) if name in rows else "-" for name in ("jaxent", "optax")]
        percent = f"{ours['percent_of_limit']:.0f}%"
        cells = (f"{what['head']} {shape}".strip(), number(ours["median_ms"]), percent, *peers, *memory)
        yield "| " + " | ".join(cells) + " |"


def section(repository: Path, record: Path) -> str:
    """What the README says between its two marks, with the marks."""
    path = record.resolve().relative_to(repository.resolve()).as_posix()
    return f"<!-- speed: {path} -->\n{table(json.loads(record.read_text()))}\n<!-- speed ends -->"


def update(repository: Path, record: Path) -> None:
    readme = repository / "README.md"
    text, count = SECTION.subn(lambda _: section(repository, record), readme.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{readme}: expected one section between `<!-- speed: ... -->` and `<!-- speed ends -->`")
    readme.write_text(text, encoding="utf-8")
