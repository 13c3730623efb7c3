"""The scoreboard of accuracy in the documentation: a table and a picture, generated from a record."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.accuracy_cases import QUANTITIES, SIZES
from benchmarks.pictures import STYLES, source

PAGE, CHART = Path("docs/exactness.md"), Path("docs/images/accuracy.png")
SECTION = re.compile(r"<!-- accuracy: (\S+) -->\n.*?<!-- accuracy ends -->", flags=re.DOTALL)
SHOWN = {
    **{name: STYLES[name] for name in ("jaxent", "optax", "jax.nn.log_softmax", "torch dense", "torch fused")},
    "tokamax xla": STYLES["tokamax xla"],
}
LEAST = 2.0**-4  # ulp, of an error of 0 in the picture


def table(record: dict[str, Any]) -> str:
    where, versions = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "jaxent")
    lines = [
        f"Largest and median error in ulp of float32 ({packages}, {where['device']}): of the cases of `jaxent check` "
        "that everyone can state, and of edges as in the table above. A result is the value, the gradient, or the "
        "Hessian times a vector, of one case; losses from hidden states are asked only what they take. Results are nan "
        "where something else is due, wrong by more than half of what is due (or another number than the nan, infinity "
        "or 0 that is due), or an exception. The last column is the size of a loss down to which value, gradient and "
        f"curvature have three digits, of {SIZES[0]:.0e} to {SIZES[-1]:.0e}.",
        "",
        "| | " + " | ".join(QUANTITIES) + " | results | nan | wrong | raises | three digits down to |",
        "|---" + "|--:" * (len(QUANTITIES) + 5) + "|",
    ]
    for name, found in record["scores"].items():
        errors = [_errors(found[q]) for q in QUANTITIES]
        counts = [str(found[key]) for key in ("results", "nan", "wrong", "raises")]
        sizes = ", ".join("-" if size is None else f"{size:.0e}" for size in found["down_to"].values())
        lines.append(f"| {name} | " + " | ".join([*errors, *counts, sizes]) + " |")
    if record["absent"]:
        lines += ["", f"Not installed: {', '.join(record['absent'])}."]
    return "\n".join(lines)


def _errors(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{_ulp(found['largest'])}, {_ulp(found['median'])}"


def _ulp(x: float) -> str:
    return f"{x:.2g}" if x < 1e4 else f"{x:.0e}".replace("e+0", "e").replace("e+", "e")


def section(repository: Path, record: Path) -> str:
    """What the page says between its two marks, with the marks."""
    path = record.resolve().relative_to(repository.resolve()).as_posix()
    chart = f"![Error of each loss against the size of the loss]({CHART.relative_to(PAGE.parent).as_posix()})"
    text = table(json.loads(record.read_text(encoding="utf-8")))
    return "\n".join([f"<!-- accuracy: {path} -->", text, "", chart, "<!-- accuracy ends -->"])


def update(repository: Path, record: Path) -> None:
    """Draws the chart and writes the page's section."""
    if find_spec("matplotlib") is None:
        raise SystemExit("the page shows a chart, and matplotlib is not installed: nothing was written")
    page = repository / PAGE
    text, count = SECTION.subn(lambda _: section(repository, record), page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page}: expected one section between `<!-- accuracy: ... -->` and `<!-- accuracy ends -->`")
    draw(json.loads(record.read_text(encoding="utf-8")), record, repository / CHART)
    page.write_text(text, encoding="utf-8")


def draw(record: dict[str, Any], path: Path, chart: Path) -> None:
    """Error against the size of the loss, for each quantity; what is not a number has no point."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", dpi=120, facecolor="white", figsize=(11, 3.8))
    panels = figure.subplots(1, len(QUANTITIES), sharey=True)
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        for name, (colour, marker) in SHOWN.items():
            errors = record["sizes"].get(name, {}).get(quantity, [])
            points = [(x, max(y, LEAST)) for x, y in zip(SIZES, errors, strict=False) if y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, lw=1, label=name)
        axes.set(xscale="log", yscale="log", xlabel="loss", title=quantity)
        axes.axhline(2.0**23, color="k", ls=":", lw=1)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("error, ulp (dotted: all of it)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN), fontsize=9)
    figure.savefig(chart, metadata={"Source": source(path)})
