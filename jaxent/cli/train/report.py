"""What a run found out, as a table, as JSON and as a picture."""

import json
import logging
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jaxent.cli.atomic_files import write_atomic
from jaxent.cli.errors import visible

NAME, PICTURE = "report.json", "loss.png"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def print_columns(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each mapping, under the names of the first one's entries."""
    cells = [[name.replace("_", " ") for name in rows[0]]]
    cells += [
        [f"{v:,.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else visible(v) for v in row.values()]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())


def _shown(token: bytes) -> str:
    return token.decode("utf-8", "backslashreplace")


def print_surprisal(pairs: Sequence[tuple[bytes, float]]) -> None:
    """One line a token: its text, its bits, and a bar of one block a bit."""
    names = [repr(_shown(token)) for token, _ in pairs]
    width = min(40, max(map(len, names)))
    for name, (_, bits) in zip(names, pairs, strict=True):
        print(f"{name:{width}}  {bits:6.2f}  {'█' * round(bits)}".rstrip())


# The 256-colour palette from calm to alarming, for up to 1, 2, 4, 8, 12 bits and more.
COLOURS = ((1, 22), (2, 28), (4, 100), (8, 130), (12, 124), (float("inf"), 53))


def print_coloured(pairs: Sequence[tuple[bytes, float]]) -> None:
    """The text itself; the background tells how surprising each token is."""
    parts = []
    for token, bits in pairs:
        colour = next(c for limit, c in COLOURS if bits <= limit)
        # A line end would paint the rest of the line.
        lines = visible(_shown(token), "\n\t").split("\n")
        parts.append("\n".join(f"\x1b[48;5;{colour}m\x1b[97m{line}\x1b[0m" if line else "" for line in lines))
    print("".join(parts))
    legend = [
        f"\x1b[48;5;{c}m\x1b[97m {'more' if limit == float('inf') else f'<= {limit}'} \x1b[0m" for limit, c in COLOURS
    ]
    print("bits: " + "".join(legend))


def print_summary(result: Mapping[str, Any]) -> None:
    """The account of a run, from `report.json`'s content."""
    held, unigram, loss = result["held_out"], result["unigram"], result["loss"]
    print()
    print(f"{'held-out text':44}{'bits/token':>12}{'bits/byte':>12}{'perplexity':>12}")
    lines = [
        ("unigram entropy H(P-hat)", unigram["entropy"]),
        ("unigram code of the training text", unigram["code"]),
        ("bigram entropy H(P-hat | token before)", result["bigram"]["entropy"]),
        ("the model H(P-hat, Q)", held),
    ]
    for name, line in lines:
        print(f"{name:44}{line['bits_per_token']:12.3f}{line['bits_per_byte']:12.3f}{line['perplexity']:12,.1f}")
    for name, bits in result["compressors"].items():
        print(f"{name:44}{'':12}{bits:12.3f}")
    print()
    print(f"{'memory of the loss and its gradient':44}{loss['temporary_bytes'] / 2**20:12.1f} MiB")
    print(f"{'what the dense logits alone would take':44}{loss['dense_logits_bytes'] / 2**20:12.1f} MiB")
    print(f"{'closed-form gradient against jax.grad':44}{loss['gradient_difference']:12.1e} of the largest entry")


def draw(folder: Path, result: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> None:
    """`loss.png`: the cross-entropy of the batches and of a held-out sample, falling towards the entropy floors."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the first figure on a machine builds a cache of fonts
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(history["step"], history["byte"], color="0.6", linewidth=1, label="training batches")
    axes.plot(history["held_step"], history["held_byte"], color="C0", marker="o", markersize=4, label="held-out sample")
    lines = [
        ("unigram entropy H(P-hat)", result["unigram"]["entropy"]["bits_per_byte"], "black", "-."),
        *((name, bits, f"C{i + 1}", ":") for i, (name, bits) in enumerate(result["compressors"].items())),
        ("model, all held-out text", result["held_out"]["bits_per_byte"], "C0", "--"),
        ("bigram entropy H(P-hat | token before)", result["bigram"]["entropy"]["bits_per_byte"], "black", "--"),
    ]
    for name, bits, colour, style in sorted(lines, key=lambda line: -line[1]):
        axes.axhline(bits, color=colour, linestyle=style, linewidth=1, label=f"{name}: {bits:.3f}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cross-entropy, bits per byte")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, history["step"][-1])
    axes.grid(alpha=0.2)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomic(folder / PICTURE, content.getbuffer())


def save(folder: Path, result: Mapping[str, Any]) -> None:
    write_atomic(folder / NAME, (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def load(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save`, the last act of a run, has written; None where no run of these settings has come so far."""
    if not (folder / PICTURE).exists():
        return None
    try:
        result = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("settings") == settings else None


def remove(folder: Path) -> None:
    """The report and the picture of an earlier run."""
    for name in (NAME, PICTURE):
        (folder / name).unlink(missing_ok=True)
