"""The table of speed in the documentation, and the chart that the README shows too, generated from a record."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import pictures, report
from benchmarks.report import mib, number, sweep

PAGE, CHART = Path("docs/speed.md"), Path("docs/images/speed.png")
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
    found = {row["peer"] for case in record["cases"] for row in case["rows"]}
    peers = {name: label for name, label in PEERS.items() if name in found}
    head = [
        "| N, D, V | jaxent, ms | of limit | " + " | ".join(peers.values()) + " | jaxent, MiB | optax, MiB |",
        "|---" + "|--:" * (4 + len(peers)) + "|",
    ]
    lines = [
        f"Value and gradient on {where['device']}, {where['cores']} cores, float32, {record['date'][:10]}, jax "
        f"{versions['jax']}: milliseconds; percent of what the device's matrix products or memory allow; the time of "
        "others by ours (above 1 jaxent is faster); temporaries. Without D the loss is of logits, with D of hidden "
        "states; kept is the share of the rows that count, and the limit is that of these.",
        "",
        *head,
        *_rows(record, "value and gradient", peers),
    ]
    values = list(_rows(record, "value", peers))
    lines += ["", "The value alone:", "", *head, *values] if values else []
    planned = report.planned(record)
    return "\n".join([*lines, *(["", f"{planned}."] if planned else [])])


def _rows(record: dict[str, Any], mode: str, names: Iterable[str]) -> Iterator[str]:
    for case in record["cases"]:
        what = case["case"]
        plain = what["suite"] in ("dense", "linear") and not what["sweep"] and not what["donated"]
        if not plain or what["mode"] != mode or what["dtype"] != "float32":
            continue
        rows = {row["peer"]: row for row in case["rows"]}
        ours = rows["jaxent"]
        kept = f", {what['kept']:.0%} kept" if what.get("use") else ""
        shape = f"{what['rows']}, {what['hidden'] or '-'}, {what['classes']}{kept}"
        peers = [f"{1 / rows[name]['ratio']:.2f}" if name in rows else "-" for name in names]
        memory = [mib(rows[name]["temp_mib"]) if name in rows else "-" for name in ("jaxent", "optax")]
        percent = f"{ours['percent_of_limit']:.0f}%"
        name = f"{what['head'] or what.get('use', '')} {shape}".strip()
        cells = (name, number(ours["median_ms"]), percent, *peers, *memory)
        yield "| " + " | ".join(cells) + " |"


def section(repository: Path, record: Path) -> str:
    """What the page says between its two marks, with the marks."""
    read = json.loads(record.read_text())
    path = record.resolve().relative_to(repository.resolve()).as_posix()
    text = f"Memory and time against the vocabulary on {read['machine']['device']}"
    chart = [f"![{text}]({CHART.relative_to(PAGE.parent).as_posix()})", ""] if sweep(read, "classes") else []
    return "\n".join([f"<!-- speed: {path} -->", *chart, table(read), "<!-- speed ends -->"])


def update(repository: Path, record: Path) -> None:
    """Redraws the record's pictures, and writes the page's section and its chart."""
    if not pictures.draw(json.loads(record.read_text()), record):
        raise SystemExit("the page shows a chart: nothing was written")
    page = repository / PAGE
    text, count = SECTION.subn(lambda _: section(repository, record), page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page}: expected one section between `<!-- speed: ... -->` and `<!-- speed ends -->`")
    page.write_text(text, encoding="utf-8")
    chart = pictures.path_of("classes", record)
    if chart.exists():
        shutil.copyfile(chart, repository / CHART)
