"""A run as a record (JSON) and as tables."""

import datetime
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.cases import Case
from benchmarks.harness import Contender, Summary, ratio
from benchmarks.limits import Limits

# Targets for compile time against the same loss by optax.
COMPILE_TARGETS = {"dense": 2.0, "linear": 3.0}
SLOWER = 1.05  # heuristic: what repeated runs of the same program differ by on a quiet machine


def machine() -> dict[str, Any]:
    """Where a record was taken."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [next((f for f in ("avx512f", "avx2") if f in flags), ""), "amx" if "amx_tile" in flags else ""]
    known = ", ".join(filter(None, units))
    return (names[0] if names else platform.processor() or "cpu") + (f" ({known})" if known else "")


def commit() -> str | None:
    """What was measured; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def new_record(limits: Limits, absent: Sequence[str], threads: dict[str, int]) -> dict[str, Any]:
    packages = ("jaxent", "jax", "jaxlib", "numpy", "optax")
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": threads,
        "versions": {name: version(name) for name in packages},
        "absent": list(absent),
        "limits": asdict(limits),
        "cases": [],
    }


def case_record(
    case: Case,
    contenders: Sequence[Contender],
    samples: dict[str, list[float]],
    limits: Limits,
    planned_ms: float | None,
    left_out: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """The rows of one case, which took `seconds` in all; `planned_ms` is what `plan` says of ours.

    `ratio` is the first contender's time by this one's: below 1 ours is faster.
    """
    ours = samples[contenders[0].name]
    limit = 1e3 * limits.seconds(case)
    rows = []
    for contender in contenders:
        taken = samples[contender.name]
        summary = Summary.of(taken)
        percent = 100 * limit / contender.devices / summary.median
        rows.append(
            {
                "contender": contender.name,
                "peer": contender.peer,
                "median_ms": summary.median,
                "spread_ms": summary.spread,
                "smallest_ms": summary.smallest,
                "ratio": ratio(ours, taken),
                "ratio_of_smallest": min(ours) / summary.smallest,
                "percent_of_limit": None if contender.results is None else percent,
                "temp_mib": _mib(contender.temp_bytes),
                "result_mib": _mib(contender.result_bytes),
                "sent_mib": _mib(contender.sent_bytes),
                "compile_s": statistics.median(contender.compile_seconds) if contender.compile_seconds else None,
                "compiles_s": list(contender.compile_seconds),
                "samples_ms": taken,
            }
        )
    return {
        "name": case.name,
        "case": asdict(case),
        "limit_ms": limit,
        "limit": limits.binding(case),
        "limits": asdict(limits),
        "planned_ms": planned_ms,
        "seconds": seconds,
        "left_out": left_out,
        "rows": rows,
    }


def _mib(count: float | None) -> float | None:
    return None if count is None else count / 2**20


def place_and_date() -> str:
    """The name of a record: date and device."""
    device = re.sub(r"[^a-z0-9]+", "-", machine()["device"].lower()).strip("-")
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{device}"


def one_line_lists(text: str) -> str:
    """Indented JSON with each list of plain values, such as the samples of a row, on one line."""
    return re.sub(r"\[\s+([^][{}]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def mib(value: float | None) -> str:
    return "<0.01" if value is not None and 0 < value < 0.01 else number(value)


HEADER = ("", "ms", "+-", "least", "ours/this", "by least", "% of limit", "temp MiB", "new MiB", "compile s")


def header(record: dict[str, Any]) -> str:
    where, limits = record["machine"], record["limits"]
    rates = ", ".join(f"{1e-9 * r:,.0f} GFLOP/s {d}" for d, r in limits["product_flops_per_second"].items())
    lines = [
        f"{where['device']}, {where['cores']} cores, {where['backend']} x {where['devices']}, Python {where['python']}",
        ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        f"copy {1e-9 * limits['copy_bytes_per_second']:,.1f} GB/s (read + written), in place "
        f"{1e-9 * limits['pass_bytes_per_second']:,.1f}, products {rates}",
        "threads: " + ", ".join(f"{name} {count}" for name, count in record["threads"].items()),
    ]
    if record["absent"]:
        lines.append("not installed: " + ", ".join(record["absent"]))
    return "\n".join(lines)


def table(case: dict[str, Any]) -> str:
    sharded = case["case"]["suite"] == "sharded"
    head = (*HEADER, "sent MiB") if sharded else HEADER
    rows = [
        (
            row["contender"],
            number(row["median_ms"]),
            number(row["spread_ms"], 2),
            number(row["smallest_ms"]),
            f"{row['ratio']:.2f}",
            f"{row['ratio_of_smallest']:.2f}",
            number(row["percent_of_limit"], 2),
            mib(row["temp_mib"]),
            mib(row["result_mib"]),
            number(row["compile_s"], 2),
            *([mib(row["sent_mib"])] if sharded else []),
        )
        for row in case["rows"]
    ]
    planned = case.get("planned_ms")
    said = "" if planned is None else f"; `plan` says {number(planned)} ms"
    lines = [f"{case['name']} (limit {number(case['limit_ms'])} ms: {case['limit']}{said})", *aligned([head, *rows])]
    return "\n".join([*lines, *(f"not timed: {name}, {reason}" for name, reason in case["left_out"].items())])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


def sweep(record: dict[str, Any], over: str) -> list[dict[str, Any]]:
    return [case for case in record["cases"] if case["case"]["sweep"] == over]


def growth(record: dict[str, Any]) -> str:
    """Exponents of time and of temporaries in the rows and in the classes, fitted to the sweeps."""
    rows = [("growth", "time", "temporaries")]
    for over, letter in (("rows", "N"), ("classes", "V")):
        points = sweep(record, over)
        for peer in [row["peer"] for row in points[0]["rows"] if row["peer"] != "bound"] if points else []:
            found = [(case["case"][over], row) for case in points for row in case["rows"] if row["peer"] == peer]
            cells = []
            for key in ("median_ms", "temp_mib"):
                exponent = _exponent([(size, row[key]) for size, row in found])
                cells.append("-" if exponent is None else f"{letter}^{round(exponent, 2) + 0.0:.2f}")  # no -0.00
            sizes = " ".join(str(size) for size, _ in found)
            rows.append((f"{peer}, {letter} = {sizes}", *cells))
    return "\n".join(aligned(rows)) if len(rows) > 1 else ""


def _exponent(points: list[tuple[int, float | None]]) -> float | None:
    """The slope of a line through the logarithms, by least squares."""
    positive = [(size, y) for size, y in points if y]
    if len(positive) < 2:
        return None
    sizes, values = (np.log(np.array(x, float)) for x in zip(*positive, strict=True))
    return float(np.polyfit(sizes, values, 1)[0])


def planned(record: dict[str, Any]) -> str:
    """How the times that `plan` predicts compare with those that were measured."""
    ratios = [(c["planned_ms"] / c["rows"][0]["median_ms"], c["name"]) for c in record["cases"] if c.get("planned_ms")]
    if not ratios:
        return ""
    (least, first), (most, last) = min(ratios), max(ratios)
    middle = statistics.median(ratio for ratio, _ in ratios)
    return f"`plan` by measured time: median {middle:.2f}, least {least:.2f} ({first}), most {most:.2f} ({last})"


def findings(record: dict[str, Any]) -> str:
    """Where a peer is faster, beyond the noise, and how long compiling takes next to optax."""
    slower, compiles = [], {suite: [] for suite in COMPILE_TARGETS}
    for case in record["cases"]:
        ours, *others = case["rows"]
        # Over a mesh a peer competes with ours over the mesh.
        rival = next((row for row in others if row["peer"] == "jaxent, automatic"), ours)
        for row in others:
            competes = row["percent_of_limit"] is not None and not row["peer"].startswith("jaxent")
            by_median, by_least = (row[key] / rival[key] for key in ("ratio", "ratio_of_smallest"))
            if competes and min(by_median, by_least) > SLOWER:
                slower.append((by_median, f"{by_median:.2f} x {row['contender']}: {case['name']}"))
            if row["peer"] == "optax" and case["case"]["suite"] in compiles:
                compiles[case["case"]["suite"]].append((ours["compile_s"] / row["compile_s"], case["name"]))
    lines = ["slower than a peer:" + ("" if slower else " nowhere")]
    lines += [f"  {text}" for _, text in sorted(slower, reverse=True)]
    for suite, found in compiles.items():
        if found:
            middle, (worst, name) = statistics.median(x for x, _ in found), max(found)
            lines.append(
                f"compile time by optax's, {suite}: median {middle:.1f}, most {worst:.1f} ({name}); "
                f"aim {COMPILE_TARGETS[suite]:.0f}"
            )
    return "\n".join(lines)
