"""The record of the suite `compiled`, and its tables in benchmarks/README.md."""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import compilers
from benchmarks.report import commit, number
from jaxent._engine.devices import DEVICES

SECTION = re.compile(r"<!-- compiled: (\S+) -->\n.*?<!-- compiled ends -->", flags=re.DOTALL)
Row = dict[str, Any]


def new_record(targets: Sequence[str], absent: dict[str, str]) -> dict[str, Any]:
    there = sorted({compilers.platform_of(t) for t in targets} - set(absent))
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("jaxent", "jax", "jaxlib", "optax")},
        "compilers": [compilers.compiler(platform) for platform in there],
        "absent": absent,
        "devices": {name: _figures(name) for name in targets},
        "programs": [],
        "scale": [],
    }


def key(row: Row) -> tuple[str, ...]:
    """What tells a program from the others of a record."""
    return tuple(row[name] for name in ("target", "head", "mode", "precision", "author"))


def continued(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The record `old`, to which a run that would have begun `new` adds; each program keeps the commit it is of."""
    before, now = (record["versions"] | dict(name.split() for name in record["compilers"]) for record in (old, new))
    if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
        raise ValueError(f"the record is of other versions of {', '.join(changed)}: name another file by --json")
    devices = old["devices"] | new["devices"]
    return new | {
        "compilers": sorted({*old["compilers"], *new["compilers"]}),
        "devices": {name: devices[name] for name in DEVICES if name in devices},
        "programs": [{"commit": old["commit"]} | row for row in old["programs"]],
        "scale": old["scale"],
    }


def _figures(name: str) -> dict[str, Any]:
    device = DEVICES[name]
    return {
        "bf16_tflops": device.flops_per_second["bfloat16"] / 1e12,
        "gb_per_second": device.bytes_per_second / 1e9,
        "memory_gib": device.memory_bytes / 2**30,
        "source": device.source,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def described_products(row: Row) -> str:
    return " + ".join(f"{count:g} {kind}" for kind, count in sorted(row["products"].items())) or "none"


def described_passes(row: Row) -> str:
    """Writes and reads of the blocks of logits, float32 first."""
    dtypes = sorted(row["passes"], key=lambda dtype: {"f32": 0, "bf16": 1}.get(dtype, 2))
    parts = [f"{row['passes'][d]['written']:g}w {row['passes'][d]['read']:g}r {d}" for d in dtypes]
    return ", ".join(parts) or "none"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "products": described_products,
    "passes over the logits": described_passes,
    "temp MiB": lambda row: number(row["temp_mib"]),
    "`plan`": lambda row: "" if row.get("plan_mib") is None else number(row["plan_mib"]),
    "moved GB": lambda row: number(row["moved_gb"]),
    "of N x V": lambda row: f"{row['largest_by_logits']:.2f}",
    "products' share": lambda row: f"{row['products_share']:.1%}",
    "compile s": lambda row: number(row["compile_s"], 2),
}


def line(row: Row) -> str:
    """One program, as it is printed while the suite runs."""
    label = f"{row['target']} {row['head']}, {row['mode']}, {row['precision']}, {row['author']}:"
    if "failed" in row:
        return f"{label} {row['failed']}"
    return f"{label} " + ", ".join(f"{name} {cell(row)}" for name, cell in COLUMNS.items())


def scale_line(row: Row) -> str:
    sent, due = (" ".join(f"{what} {count:,}" for what, count in row[key].items()) for key in ("sent", "formula"))
    return (
        f"1,024 v5p, {row['data']} x {row['vocab']}: {row['collectives']} collectives of {sent} (formula: {due}), "
        f"temp MiB {number(row['temp_mib'])} (plan: {number(row['plan_mib'])}), compile s {number(row['compile_s'])}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# benchmarks/README.md


def section(repository: Path, path: Path) -> str:
    """What benchmarks/README.md says between its two marks, with the marks."""
    record = json.loads(path.read_text())
    name = path.resolve().relative_to(repository.resolve()).as_posix()
    parts = [_introduction(record), _devices(record), _functions(record), _heads(record), _scale(record)]
    return "\n".join([f"<!-- compiled: {name} -->", "\n\n".join(filter(None, parts)), "<!-- compiled ends -->"])


def _introduction(record: dict[str, Any]) -> str:
    rows = record["programs"][0]["rows"]
    return (
        f"Compiled on {record['date'][:10]} with jax {record['versions']['jax']} and {', '.join(record['compilers'])}; "
        f"N = {rows}. Nothing was run or timed."
    )


def _devices(record: dict[str, Any]) -> str:
    lines = ["| device | bf16 TFLOP/s | GB/s | GiB | from |", "|---|--:|--:|--:|---|"]
    for name, d in record["devices"].items():
        rates = f"{d['bf16_tflops']:g} | {d['gb_per_second']:g} | {d['memory_gib']:g}"
        lines.append(f"| {name} | {rates} | {d['source']} |")
    return "\n".join(lines)


HEAD = (
    "| {} | products | passes over the logits | temp MiB | `plan` | dense "
    "| moved GB | dense | products' share | dense |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def _functions(record: dict[str, Any]) -> str:
    head = "Llama-3 8B"
    rows = [row for row in record["programs"] if row["head"] == head]
    lines = (_pair(f"{t} {m}, {p}", ours, dense) for (t, _, m, p), ours, dense in _pairs(rows))
    return "\n".join([f"Every function, head of {head}:", "", HEAD.format("device, function, operands"), *lines])


def _heads(record: dict[str, Any]) -> str:
    rows = [row for row in record["programs"] if row["mode"] == "value and gradient" and row["head"] != "Llama-3 8B"]
    if not rows:
        return ""
    lines = (_pair(f"{t} {h}, {p}", ours, dense) for (t, h, _, p), ours, dense in _pairs(rows))
    return "\n".join(["Value and gradient, the other heads:", "", HEAD.format("device, head, operands"), *lines])


def _pairs(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str, str, str], Row, Row | None]]:
    """Ours and dense code's, where that was compiled."""
    found: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["target"], row["head"], row["mode"], row["precision"]), {})[row["author"]] = row
    for key, authors in found.items():
        if "jaxent" in authors:
            yield key, authors["jaxent"], authors.get("dense")


def _pair(label: str, ours: Row, dense: Row | None) -> str:
    def of(row: Row | None, name: str) -> str:
        return "" if row is None else "too large" if "failed" in row else COLUMNS[name](row)

    cells = [of(ours, name) for name in ("products", "passes over the logits", "temp MiB", "`plan`")]
    cells.append(of(dense, "temp MiB"))
    for name in ("moved GB", "products' share"):
        cells += [of(ours, name), of(dense, name)]
    return f"| {label} | " + " | ".join(cells) + " |"


def _scale(record: dict[str, Any]) -> str:
    if not record["scale"]:
        return ""
    lines = [
        "One step over 1,024 v5p, D = 8192, V = 262144, 4,096 tokens a chip:",
        "",
        "| data x vocab | numbers per chip: rows, hidden, kernel | by the formula | collectives | temp MiB | `plan` |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in record["scale"]:
        sent, due = (
            ", ".join(f"{row[k].get(w, 0):,}" for w in ("rows", "hidden", "kernel")) for k in ("sent", "formula")
        )
        lines.append(
            f"| {row['data']} x {row['vocab']} | {sent} | {due} | {row['collectives']} | {number(row['temp_mib'])} | "
            f"{number(row['plan_mib'])} |"
        )
    return "\n".join(lines)


def update(repository: Path, record: Path) -> None:
    """Writes the section of benchmarks/README.md."""
    readme = repository / "benchmarks" / "README.md"
    text, count = SECTION.subn(lambda _: section(repository, record), readme.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(
            f"{readme}: expected one section between `<!-- compiled: ... -->` and `<!-- compiled ends -->`"
        )
    readme.write_text(text, encoding="utf-8")
