"""The scoreboard of accuracy in the documentation: a table and a picture, generated from a record.

The README has the picture too, and of the table what tells the losses apart.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.accuracy_cases import QUANTITIES, SIZES
from benchmarks.pictures import STYLES, source

PAGE, README, CHART = Path("docs/exactness.md"), Path("README.md"), Path("docs/images/accuracy.png")
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


def summary(record: dict[str, Any]) -> str:
    where, lines = record["machine"], []
    for name, found in record["scores"].items():
        medians = ["-" if found[q] is None else _ulp(found[q]["median"]) for q in QUANTITIES]
        amiss = sum(found[key] for key in ("nan", "wrong", "raises"))
        sizes = ["-" if size is None else f"{size:.0e}" for size in found["down_to"].values()]
        lines.append(f"| {name} | {amiss} of {found['results']} | {', '.join(medians)} | {', '.join(sizes)} |")
    return "\n".join(
        [
            f"How exact every loss is in float32 on {where['device']}: results that are nan, wrong by more than half, "
            f"or an exception; median error in ulp of {', '.join(QUANTITIES)}; and the loss down to which these have "
            f"three digits, of {SIZES[0]:.0e} to {SIZES[-1]:.0e}.",
            "",
            "| | amiss | median error, ulp | three digits down to |",
            "|---|--:|--:|--:|",
            *lines,
        ]
    )


def _errors(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{_ulp(found['largest'])}, {_ulp(found['median'])}"


def _ulp(x: float) -> str:
    return f"{x:.2g}" if x < 1e4 else f"{x:.0e}".replace("e+0", "e").replace("e+", "e")


PAGES = {PAGE: table, README: summary}


def section(repository: Path, record: Path, page: Path) -> str:
    """What a page says between its two marks, with the marks."""
    path = record.resolve().relative_to(repository.resolve()).as_posix()
    chart = CHART.relative_to(page.parent).as_posix()
    text = PAGES[page](json.loads(record.read_text(encoding="utf-8")))
    picture = f"![Error of each loss against the size of the loss]({chart})"
    return "\n".join([f"<!-- accuracy: {path} -->", text, "", picture, "<!-- accuracy ends -->"])


def update(repository: Path, record: Path) -> None:
    """Draws the chart and writes the pages' sections."""
    if find_spec("matplotlib") is None:
        raise SystemExit("the pages show a chart, and matplotlib is not installed: nothing was written")
    texts = {}
    for page in PAGES:
        found = section(repository, record, page)
        text, count = SECTION.subn(lambda _, found=found: found, (repository / page).read_text(encoding="utf-8"))
        if count != 1:
            marks = "`<!-- accuracy: ... -->` and `<!-- accuracy ends -->`"
            raise ValueError(f"{page}: expected one section between {marks}")
        texts[page] = text
    draw(json.loads(record.read_text(encoding="utf-8")), record, repository / CHART)
    for page, text in texts.items():
        (repository / page).write_text(text, encoding="utf-8")


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
