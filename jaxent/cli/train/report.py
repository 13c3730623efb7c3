"""What a run found out, as a table, as JSON and as a picture."""

import json
import logging
import math
import os
import stat
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jaxent.cli.atomic_files import write_atomic
from jaxent.cli.output import to_json

NAME, PICTURE = "report.json", "loss.png"

# Which counts and which code each line is about, for a reader who has not read the papers.
LEGEND = """\
H(P-hat), the entropy of the held-out text's own token counts, is the least that a code without context could cost,
if it knew those counts in advance. The next line is what such a code costs with the counts of the training text.
H(P-hat, Q), the cross-entropy, is what the model's code costs, which sees the text before each token."""


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The summary of a run, from `report.json`'s content."""
    held, unigram, loss = result["held_out"], result["unigram"], result["loss"]
    lines = [f"{'held-out text':44}{'bits/token':>12}{'bits/byte':>12}{'perplexity':>12}"]
    costs = [
        ("unigram entropy H(P-hat) of its own counts", unigram["entropy"]),
        ("unigram code from counts of training text", unigram["code"]),
        ("the model H(P-hat, Q)", held),
    ]
    for name, cost in costs:
        cells = _number(cost["bits_per_token"]), _number(cost["bits_per_byte"]), _number(cost["perplexity"], ",.1f")
        lines.append(f"{name:44}{cells[0]:>12}{cells[1]:>12}{cells[2]:>12}")
    for name, bits in result["compressors"].items():
        lines.append(f"{name:44}{'':12}{_number(bits):>12}")
    lines += ["", *LEGEND.splitlines(), ""]
    lines.append(f"{'memory of the loss and its gradient':44}{loss['temporary_bytes'] / 2**20:12.1f} MiB")
    lines.append(f"{'what the dense logits alone would take':44}{loss['dense_logits_bytes'] / 2**20:12.1f} MiB")
    difference = _number(loss["gradient_difference"], ".1e")
    lines.append(f"{'closed-form gradient against jax.grad':44}{difference:>12} of the largest entry")
    return lines


def _number(x: float | None, form: str = ".3f") -> str:
    """JSON has no infinity: null stands for what is no finite number."""
    if x is None or not math.isfinite(x):
        return "not finite"
    return format(x, form if abs(x) < 1e8 else ".2e")


def draw(folder: Path, result: Mapping[str, Any], history: Mapping[str, Sequence[float]], sample: int) -> None:
    """`loss.png`: the cross-entropy of the batches and of a held-out sample, falling below what others need."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the first figure on a machine builds a cache of fonts
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    held, steps = result["held_out"], history["step"]
    axes.plot(steps, history["byte"], color="0.6", linewidth=1, label="training batches")
    told = f"a sample of {sample:,} held-out tokens" if sample < held["tokens"] else "held-out text"
    axes.plot(history["held_step"], history["held_byte"], color="C0", marker="o", markersize=4, label=told)
    levels = {
        "unigram entropy": result["unigram"]["entropy"]["bits_per_byte"],
        "unigram code": result["unigram"]["code"]["bits_per_byte"],
        **result["compressors"],
    }
    curves = [x for x in (*history["byte"], *history["held_byte"]) if math.isfinite(x)]
    # A run that diverged would flatten all other curves.
    top = min(1.05 * max([*curves, *levels.values()]), 2 * max(8.0, *levels.values()))
    if held["bits_per_byte"] <= top:
        end = f"all {held['tokens']:,} held-out tokens: {held['bits_per_byte']:.3f}"
        axes.plot(steps[-1], held["bits_per_byte"], "*", color="C3", markersize=12, label=end, clip_on=False, zorder=3)
    for i, group in enumerate(_together(levels, 0.045 * top)):
        for name in group:
            axes.axhline(levels[name], color="0.3", linestyle=("--", ":", "-.")[i % 3], linewidth=0.8)
        text = ", ".join(f"{name} {levels[name]:.3f}" for name in group)
        axes.text(0.995 * steps[-1], max(levels[n] for n in group), text, ha="right", va="bottom", fontsize="small")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cross-entropy, bits per byte")
    axes.set_ylim(0, top)
    axes.set_xlim(0, steps[-1])
    axes.grid(alpha=0.2)
    axes.legend(fontsize="small", loc="lower left", framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomic(folder / PICTURE, content.getbuffer())


def _together(levels: Mapping[str, float], distance: float) -> list[list[str]]:
    """The names, from the highest level to the lowest; those whose labels would lie on each other share one."""
    groups: list[list[str]] = []
    for name in sorted(levels, key=lambda n: -levels[n]):
        if groups and levels[groups[-1][0]] - levels[name] < distance:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def save(folder: Path, result: Mapping[str, Any]) -> None:
    write_atomic(folder / NAME, (to_json(result) + "\n").encode())


def load(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save`, the last act of a run, has written; None where no run of these settings has come so far."""
    try:
        if not all(stat.S_ISREG(os.stat(folder / name).st_mode) for name in (NAME, PICTURE)):
            return None
        result = json.loads((folder / NAME).read_bytes())
        if result["settings"] != settings:
            return None
        summary_lines(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not what `save` writes
        return None
    return result


def remove(folder: Path) -> None:
    """The report and the picture of an earlier run."""
    for name in (NAME, PICTURE):
        (folder / name).unlink(missing_ok=True)
