"""A record as pictures: cost against vocabulary, cost against rows, percent of the limit.

On white, whatever the page behind them is: they are read in light and in dark themes.
"""

import hashlib
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
AXES = {"classes": "vocabulary V", "rows": "rows N"}
NAMES = {"classes": "vocabulary", "rows": "rows", "limit": "limit"}


def path_of(picture: str, record: Path) -> Path:
    return record.with_name(f"{record.stem}-{NAMES[picture]}.png")


def source(record: Path) -> str:
    """What a picture says in its file about the record that it was drawn from."""
    return f"{record.name} sha256 {hashlib.sha256(record.read_bytes()).hexdigest()}"


def draw(record: dict[str, Any], path: Path) -> list[Path]:
    """Next to the record; a picture that the record has no data for is left out, all of them without matplotlib."""
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (pip install 'jaxent[cli]')")
        return []
    from matplotlib.figure import Figure

    drawn = []
    for name in NAMES:
        figure = Figure(layout="constrained", dpi=120, facecolor="white")
        if _percent_of_limit(figure, record) if name == "limit" else _cost(figure, record, name):
            drawn.append(path_of(name, path))
            figure.savefig(drawn[-1], metadata={"Source": source(path)})
    return drawn


def _cost(figure: Any, record: dict[str, Any], over: str) -> bool:
    """Memory and time of a sweep, side by side."""
    points = sweep(record, over)
    if not points:
        return False
    shape, sizes = points[0]["case"], [case["case"][over] for case in points]
    memory, time = figure.subplots(1, 2)
    figure.set_size_inches(9, 3.9)
    memory.plot(sizes, [_logits_mib(case["case"]) for case in points], "k:", label="the logits, in float32")
    time.plot(sizes, [case["limit_ms"] for case in points], "k--", label="limit of the device")
    for axes, key, unit in ((memory, "temp_mib", "temporaries, MiB"), (time, "median_ms", "milliseconds")):
        _curves(axes, points, over, key)
        axes.set(xlabel=AXES[over], ylabel=unit)
        axes.legend(fontsize=9)
    memory.set_title("memory", fontsize=10)
    time.set_title("time", fontsize=10)
    fixed = f"V = {shape['classes']:,}" if over == "rows" else f"N = {shape['rows']:,}"
    where = f"{record['machine']['device']}, {record['machine']['cores']} cores, {record['date'][:10]}"
    what = f"Value and gradient of the loss from hidden states, {fixed}, D = {shape['hidden']:,}, {shape['dtype']}"
    figure.suptitle(f"{what}\n{where}", fontsize=10)
    return True


def _logits_mib(shape: dict[str, Any]) -> float:
    return 4 * shape["rows"] * shape["classes"] / 2**20


def _curves(axes: Any, points: list[dict[str, Any]], over: str, key: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
    axes.grid(alpha=0.3)


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
    axes.set_yticks(range(len(shown)), [c["name"] for c in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    axes.set(xlabel="percent of the limit, of matrix products or of bytes moved")
    axes.set_title(f"{record['machine']['device']}, {record['date'][:10]}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return True
