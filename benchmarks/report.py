"""A run as a record (JSON) and as tables; two records as a list of what changed."""

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from benchmarks.cases import Case
from benchmarks.harness import Contender, Summary, ratio
from benchmarks.limits import Limits

# A change counts if it exceeds 5% and three standard errors of the medians' difference. The 5% are a heuristic: what a
# quiet machine drifts between two runs.
LEAST_CHANGE = 0.05
STANDARD_ERRORS = 3.0


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
    vectors = next((f" ({f})" for f in ("avx512f", "avx2") if f in flags), "")
    return (names[0] if names else platform.processor() or "cpu") + vectors


def new_record(limits: Limits, absent: Sequence[str], threads: dict[str, int]) -> dict[str, Any]:
    packages = ("jaxent", "jax", "jaxlib", "numpy", "optax")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": threads,
        "versions": {name: version(name) for name in packages},
        "absent": list(absent),
        "limits": asdict(limits),
        "cases": [],
    }


def case_record(
    case: Case, contenders: Sequence[Contender], samples: dict[str, list[float]], limits: Limits
) -> dict[str, Any]:
    """The rows of one case. `ratio` is our time by theirs: below 1 is faster than the peer."""
    ours = samples[contenders[0].name]
    limit = 1e3 * limits.seconds(case)
    rows = []
    for contender in contenders:
        taken = samples[contender.name]
        summary = Summary.of(taken)
        rows.append(
            {
                "contender": contender.name,
                "median_ms": summary.median,
                "spread_ms": summary.spread,
                "smallest_ms": summary.smallest,
                "ratio": ratio(ours, taken),
                "ratio_of_smallest": min(ours) / summary.smallest,
                "percent_of_limit": 100 * limit / summary.median,
                "temp_mib": None if contender.temp_bytes is None else contender.temp_bytes / 2**20,
                "compile_s": contender.compile_seconds,
                "samples_ms": taken,
            }
        )
    return {"name": case.name, **case.record(), "limit_ms": limit, "limit": limits.binding(case), "rows": rows}


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


HEADER = ("", "ms", "+-", "least", "ours/this", "by least", "% of limit", "temp MiB", "compile s")


def header(record: dict[str, Any]) -> str:
    where, limits = record["machine"], record["limits"]
    rates = ", ".join(f"{1e-9 * r:,.0f} GFLOP/s {d}" for d, r in limits["product_flops_per_second"].items())
    lines = [
        f"{where['device']}, {where['cores']} cores, {where['backend']} x {where['devices']}, Python {where['python']}",
        ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        f"copy {1e-9 * limits['copy_bytes_per_second']:,.1f} GB/s (read + written), products {rates}",
        "threads: " + ", ".join(f"{name} {count}" for name, count in record["threads"].items()),
    ]
    if record["absent"]:
        lines.append("not installed: " + ", ".join(record["absent"]))
    return "\n".join(lines)


def table(case: dict[str, Any]) -> str:
    rows = [
        (
            row["contender"],
            _number(row["median_ms"]),
            _number(row["spread_ms"], 2),
            _number(row["smallest_ms"]),
            f"{row['ratio']:.2f}",
            f"{row['ratio_of_smallest']:.2f}",
            f"{row['percent_of_limit']:.0f}",
            _number(row["temp_mib"]),
            _number(row["compile_s"], 2),
        )
        for row in case["rows"]
    ]
    widths = [max(len(line[i]) for line in (HEADER, *rows)) for i in range(len(HEADER))]
    lines = []
    for name, *numbers in (HEADER, *rows):
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join([f"{case['name']} (limit {_number(case['limit_ms'])} ms: {case['limit']})", *lines])


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What changed from one record to the next beyond the noise, slowest change first."""
    lines = []
    for key in ("machine", "versions", "threads"):
        changed = {k: (v, after[key].get(k)) for k, v in before[key].items() if after[key].get(k) != v}
        lines += [f"{key}: {name} {old} -> {new}" for name, (old, new) in changed.items()]
    copies = [r["limits"]["copy_bytes_per_second"] for r in (before, after)]
    lines.append(f"copy: {1e-9 * copies[0]:.1f} -> {1e-9 * copies[1]:.1f} GB/s ({copies[1] / copies[0] - 1:+.0%})")
    old_rows, new_rows = _by_key(before), _by_key(after)
    shared = [key for key in old_rows if key in new_rows]
    changes = []
    for key in shared:
        change = _change(old_rows[key]["samples_ms"], new_rows[key]["samples_ms"])
        if change is not None:
            changes.append((change, key, old_rows[key]["median_ms"], new_rows[key]["median_ms"]))
    for change, (case, contender), old, new in sorted(changes, reverse=True):
        lines.append(f"{change:+7.0%}  {case}: {contender}, {_number(old)} -> {_number(new)} ms")
    lines.append(f"{len(changes)} of {len(shared)} rows changed beyond the noise")
    lines += [f"only before: {c}: {name}" for c, name in old_rows.keys() - new_rows.keys()]
    lines += [f"only after: {c}: {name}" for c, name in new_rows.keys() - old_rows.keys()]
    return "\n".join(lines)


def _by_key(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(case["name"], row["contender"]): row for case in record["cases"] for row in case["rows"]}


def _change(before: list[float], after: list[float]) -> float | None:
    """The relative change of the median, or None if it is within the noise."""
    old, new = Summary.of(before), Summary.of(after)
    # For normal samples: the interquartile range is 1.35 standard deviations, a median's error 1.25 of a mean's.
    errors = [1.25 * (2 * s.spread / 1.35) / len(x) ** 0.5 for s, x in ((old, before), (new, after))]
    noise = max(STANDARD_ERRORS * (errors[0] ** 2 + errors[1] ** 2) ** 0.5, LEAST_CHANGE * old.median)
    return None if abs(new.median - old.median) <= noise else new.median / old.median - 1
