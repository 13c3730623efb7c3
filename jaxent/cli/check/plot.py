"""The picture of `jaxent check --plot`: a loss that falls with the gap between logits, and what is left of it."""

from io import BytesIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxent.cli.atomic_files import write_atomic
from jaxent.cli.errors import CommandError
from jaxent.losses import softmax_cross_entropy

LARGEST_GAP = 87.0  # exp(-87) = 1.6e-38 is the last normal float32
EPSILON = 2.0**-23


def curves() -> dict[str, np.ndarray]:
    """The gaps, the exact loss of logits (0, -gap) with label 0, and the loss by each library in float32."""
    gaps = np.arange(0.5, LARGEST_GAP + 0.5, 0.5)
    logits = jnp.asarray(np.stack([np.zeros_like(gaps), -gaps], axis=-1), dtype=jnp.float32)
    labels = jnp.zeros(len(gaps), jnp.int32)

    def ours(z: jax.Array) -> jax.Array:
        return jnp.asarray(softmax_cross_entropy(z, labels, reduction="none"))

    def theirs(z: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(z, labels)

    found = {"gap": gaps, "exact": np.log1p(np.exp(-gaps))}
    for name, loss in (("jaxent", ours), ("optax", theirs)):
        found[name] = np.asarray(jax.jit(loss)(logits), np.float64)
    return found


def draw(path: Path) -> None:
    """Two panels over the gap: the losses, and their relative errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = curves()
    gaps, exact = found["gap"], found["exact"]
    figure = Figure(figsize=(8, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    figure.suptitle("Cross-entropy of logits (0, -gap) with label 0, in float32")
    above.plot(gaps, exact, color="black", linewidth=1.2, label="exact: log(1 + exp(-gap))", zorder=3)
    styles = {"jaxent": ("C0", "o", 26), "optax": ("C3", "x", 18)}
    floor = exact.min() / 100
    for name, (colour, marker, size) in styles.items():
        loss, error = found[name], np.abs(found[name] - exact) / exact
        positive = loss > 0
        above.scatter(gaps[positive], loss[positive], s=size, color=colour, marker=marker, label=name, linewidth=1)
        if not positive.all():
            zero = gaps[~positive]
            above.scatter(zero, np.full(len(zero), floor), s=size, color=colour, marker=marker, linewidth=1)
            above.annotate(
                f"{name} returns 0 from a gap of {zero[0]:g} on (loss {exact[~positive][0]:.0e})",
                (zero[0], floor),
                (zero[0] - 12, floor * 1e7),
                color=colour,
                arrowprops={"arrowstyle": "->", "color": colour},
            )
        below.scatter(gaps, np.maximum(error, EPSILON / 64), s=size, color=colour, marker=marker, linewidth=1)
    below.axhline(EPSILON, color="0.5", linestyle="--", linewidth=1)
    below.text(gaps[-1], EPSILON * 1.5, "float32 epsilon", color="0.4", ha="right")
    above.set_yscale("log")
    above.set_ylabel("loss in nats, log scale (zeros at the lower edge)")
    above.legend(loc="upper right")
    below.set_yscale("log")
    below.set_ylabel("relative error, log scale")
    below.set_xlabel("gap between the label's logit and the other, in nats")
    for axes in (above, below):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, LARGEST_GAP + 1)
    content, kind = BytesIO(), path.suffix.removeprefix(".").lower() or "png"
    if kind not in (known := figure.canvas.get_supported_filetypes()):
        raise CommandError(f"cannot draw a .{kind} file; there are {', '.join(sorted(known))}")
    figure.savefig(content, format=kind)
    write_atomic(path, content.getbuffer())
