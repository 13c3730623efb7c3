"""A record as pictures: memory against vocabulary, time against rows, percent of the limit."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import sweep

# Told apart also without colour (Okabe and Ito, 2008), the same in every picture.
STYLES = {
    "jaxent": ("#0072B2", "o"),
    "optax": ("#D55E00", "s"),
    "jax.nn.log_softmax": ("#E69F00", "D"),
    "torch dense": ("#009E73", "^"),
    "torch fused": ("#CC79A7", "v"),
    "tokamax xla": ("#56B4E9", "P"),
    "tokamax chunked_xla": ("#7F7F7F", "X"),
    "tokamax mosaic_tpu": ("#000000", "*"),
}


def draw(record: dict[str, Any], path: Path) -> list[Path]:
    """Next to the record; a picture that the record has no data for is left out, all of them without matplotlib."""
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (pip install 'jaxent[cli]')")
        return []
    from matplotlib.figure import Figure

    drawn = []
    pictures: dict[str, Callable[[Figure, dict[str, Any]], bool]] = {
        "memory": _memory_against_vocabulary,
        "time": _time_against_rows,
        "limit": _percent_of_limit,
    }
    for name, fill in pictures.items():
        figure = Figure(layout="constrained", dpi=150)
        if fill(figure, record):
            drawn.append(path.with_name(f"{path.stem}-{name}.png"))
            figure.savefig(drawn[-1])
    return drawn


def _curves(axes: Any, points: list[dict[str, Any]], over: str, key: str) -> None:
    from matplotlib.ticker import LogLocator

    for peer, (colour, marker) in STYLES.items():
        found = [(case["case"][over], row[key]) for case in points for row in case["rows"] if row["peer"] == peer]
        if found and all(y is not None for _, y in found):
            axes.plot(*zip(*found, strict=True), color=colour, marker=marker, label=peer)
    sizes = [case["case"][over] for case in points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.4g}")
    axes.grid(alpha=0.3)


def _title(record: dict[str, Any], shape: dict[str, Any], what: str, fixed: str) -> str:
    size = shape["classes" if fixed == "V" else "rows"]
    what = f"{what} of value and gradient, {fixed}={size}, D={shape['hidden']}, {shape['dtype']}"
    return f"{what}\n{record['machine']['device']}, {record['date'][:10]}"


def _memory_against_vocabulary(figure: Any, record: dict[str, Any]) -> bool:
    points = sweep(record, "classes")
    if not points:
        return False
    axes = figure.subplots()
    _curves(axes, points, "classes", "temp_mib")
    rows = points[0]["case"]["rows"]
    sizes = [case["case"]["classes"] for case in points]
    axes.plot(sizes, [4 * rows * v / 2**20 for v in sizes], "k:", label="float32 logits")
    axes.set(xlabel="vocabulary V", ylabel="temporaries, MiB")
    axes.set_title(_title(record, points[0]["case"], "Memory", "N"), fontsize=10)
    axes.legend()
    return True


def _time_against_rows(figure: Any, record: dict[str, Any]) -> bool:
    points = sweep(record, "rows")
    if not points:
        return False
    axes = figure.subplots()
    _curves(axes, points, "rows", "median_ms")
    axes.plot([case["case"]["rows"] for case in points], [case["limit_ms"] for case in points], "k:", label="limit")
    axes.set(xlabel="rows N", ylabel="milliseconds")
    axes.set_title(_title(record, points[0]["case"], "Time", "V"), fontsize=10)
    axes.legend()
    return True


def _percent_of_limit(figure: Any, record: dict[str, Any]) -> bool:
    shown = [c for c in record["cases"] if not c["case"]["sweep"] and c["case"]["suite"] != "sharded"]
    if not shown:
        return False
    figure.set_size_inches(9, 1.4 + 0.3 * len(shown))
    axes = figure.subplots()
    for peer, (colour, marker) in STYLES.items():
        found = [(row["percent_of_limit"], i) for i, c in enumerate(shown) for row in c["rows"] if row["peer"] == peer]
        if found:
            size = 70 if peer == "jaxent" else 30
            axes.scatter(*zip(*found, strict=True), s=size, color=colour, marker=marker, label=peer, zorder=3)
    axes.axvline(100, color="black", linestyle=":")
    axes.set_yticks(range(len(shown)), [c["name"] for c in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set(xlabel="percent of the limit: matrix products or bytes moved, whichever binds")
    axes.set_title(f"{record['machine']['device']}, {record['date'][:10]}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return True
