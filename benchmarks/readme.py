"""The README's chart and table of speed, generated from a record."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.report import mib, number, sweep

SECTION = re.compile(r"<!-- speed: (\S+) -->\n.*?<!-- speed ends -->", flags=re.DOTALL)
PEERS = {
    "optax": "optax",
    "jax.nn.log_softmax": "`log_softmax`",
    "torch dense": "torch",
    "torch fused": "torch fused",
    "tokamax xla": "tokamax",
}


def table(record: dict[str, Any]) -> str:
    """Every plain case, with its gradient and alone: our time and share of the limit, and each peer's time by ours."""
    where, versions = record["machine"], record["versions"]
    head = [
        "| N, D, V | jaxent, ms | of limit | " + " | ".join(PEERS.values()) + " | jaxent, MiB | optax, MiB |",
        "|---" + "|--:" * (4 + len(PEERS)) + "|",
    ]
    lines = [
        f"Value and gradient on {where['device']}, {where['cores']} cores, float32, {record['date'][:10]}, jax "
        f"{versions['jax']}: milliseconds; percent of what the device's matrix products or memory allow; the time of "
        "others by ours (above 1 jaxent is faster); temporaries. Without D the loss is of logits, with D of hidden "
        "states.",
        "",
        *head,
        *_rows(record, "value and gradient"),
    ]
    values = list(_rows(record, "value"))
    return "\n".join([*lines, "", "The value alone:", "", *head, *values] if values else lines)


def _rows(record: dict[str, Any], mode: str) -> Iterator[str]:
    for case in record["cases"]:
        what = case["case"]
        plain = what["suite"] in ("dense", "linear") and not what["sweep"] and not what["donated"]
        if not plain or what["mode"] != mode or what["dtype"] != "float32":
            continue
        rows = {row["peer"]: row for row in case["rows"]}
        ours = rows["jaxent"]
        shape = f"{what['rows']}, {what['hidden'] or '-'}, {what['classes']}"
        peers = [f"{1 / rows[name]['ratio']:.2f}" if name in rows else "-" for name in PEERS]
        memory = [mib(rows[name]["temp_mib"]) if name in rows else "-" for name in ("jaxent", "optax")]
        percent = f"{ours['percent_of_limit']:.0f}%"
        cells = (f"{what['head']} {shape}".strip(), number(ours["median_ms"]), percent, *peers, *memory)
        yield "| " + " | ".join(cells) + " |"


def section(repository: Path, record: Path) -> str:
    """What the README says between its two marks, with the marks."""
    read = json.loads(record.read_text())
    path, picture = (
        p.resolve().relative_to(repository.resolve()).as_posix() for p in (record, pictures.path_of("classes", record))
    )
    text = f"Memory and time against the vocabulary on {read['machine']['device']}"
    chart = [f"![{text}]({picture})", ""] if sweep(read, "classes") else []
    return "\n".join([f"<!-- speed: {path} -->", *chart, table(read), "<!-- speed ends -->"])


def update(repository: Path, record: Path) -> None:
    """Draws the record's pictures anew and writes the README's section."""
    if not pictures.draw(json.loads(record.read_text()), record):
        raise SystemExit("the README shows a chart: nothing was written")
    readme = repository / "README.md"
    text, count = SECTION.subn(lambda _: section(repository, record), readme.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{readme}: expected one section between `<!-- speed: ... -->` and `<!-- speed ends -->`")
    readme.write_text(text, encoding="utf-8")
