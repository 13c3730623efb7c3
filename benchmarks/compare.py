"""Two records as a list of what changed."""

from typing import Any

from benchmarks.harness import Summary
from benchmarks.report import number

# A change counts if it exceeds 5% and three standard errors of the medians' difference. The 5% are a heuristic: what a
# quiet machine drifts between two runs; compiling, of which there are few samples, drifts by more.
LEAST_CHANGE, LEAST_COMPILE_CHANGE, LEAST_MEMORY_CHANGE = 0.05, 0.25, 0.01
STANDARD_ERRORS = 3.0


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What changed from one record to the next beyond the noise: times, then compile times, then temporaries."""
    lines = []
    for key in ("machine", "versions", "threads"):
        changed = {k: (v, after[key].get(k)) for k, v in before[key].items() if after[key].get(k) != v}
        lines += [f"{key}: {name} {old} -> {new}" for name, (old, new) in changed.items()]
    lines += _limits(before["limits"], after["limits"])
    old_rows, new_rows = _by_key(before), _by_key(after)
    shared = {key: (old_rows[key], new_rows[key]) for key in old_rows if key in new_rows}
    for what, unit, change_of in (
        ("median_ms", "ms", lambda a, b: _change(a["samples_ms"], b["samples_ms"], LEAST_CHANGE)),
        ("compile_s", "s to compile", lambda a, b: _change(a["compiles_s"], b["compiles_s"], LEAST_COMPILE_CHANGE)),
        ("temp_mib", "MiB of temporaries", _memory_change),
    ):
        found = [(change, key) for key, rows in shared.items() if (change := change_of(*rows)) is not None]
        for change, key in sorted(found, reverse=True):
            old, new = (number(row[what]) for row in shared[key])
            lines.append(f"{change:+7.0%}  {key[0]}: {key[1]}, {old} -> {new} {unit}")
        if what == "median_ms":
            lines.append(f"{len(found)} of {len(shared)} rows changed beyond the noise")
    lines += [f"only before: {c}: {name}" for c, name in sorted(old_rows.keys() - new_rows.keys())]
    lines += [f"only after: {c}: {name}" for c, name in sorted(new_rows.keys() - old_rows.keys())]
    return "\n".join(lines)


def _limits(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    copies = [x["copy_bytes_per_second"] for x in (before, after)]
    lines = [f"copy: {1e-9 * copies[0]:.1f} -> {1e-9 * copies[1]:.1f} GB/s ({copies[1] / copies[0] - 1:+.0%})"]
    for dtype, old in before["product_flops_per_second"].items():
        if new := after["product_flops_per_second"].get(dtype):
            lines.append(f"products {dtype}: {1e-9 * old:,.0f} -> {1e-9 * new:,.0f} GFLOP/s ({new / old - 1:+.0%})")
    return lines


def _by_key(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(case["name"], row["contender"]): row for case in record["cases"] for row in case["rows"]}


def _change(before: list[float], after: list[float], least: float) -> float | None:
    """The relative change of the median, or None if it is within the noise."""
    if not before or not after:
        return None
    old, new = Summary.of(before), Summary.of(after)
    # For normal samples: the interquartile range is 1.35 standard deviations, a median's error 1.25 of a mean's.
    errors = [1.25 * (2 * s.spread / 1.35) / len(x) ** 0.5 for s, x in ((old, before), (new, after))]
    noise = max(STANDARD_ERRORS * (errors[0] ** 2 + errors[1] ** 2) ** 0.5, least * old.median)
    return None if abs(new.median - old.median) <= noise else new.median / old.median - 1


def _memory_change(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """The compiler says how much: there is no noise, only what is too little to tell."""
    old, new = before["temp_mib"], after["temp_mib"]
    if old is None or new is None or abs(new - old) <= max(LEAST_MEMORY_CHANGE * old, 1.0):
        return None
    return new / old - 1 if old else float("inf")
