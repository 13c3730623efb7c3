"""The pictures of the page on the ideas: `python docs/_hooks/pictures.py`."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

from jaxent import cross_entropy, entropy, self_information

matplotlib.use("svg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parents[1] / "images"
P = np.linspace(0, 1, 401, dtype=np.float32)[1:-1]


def coin(p: np.ndarray) -> jnp.ndarray:
    return jnp.stack([jnp.asarray(p), 1 - jnp.asarray(p)], axis=-1)


def draw(name: str, xlabel: str, curves: dict[str, jnp.ndarray]) -> None:
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    for label, values in curves.items():
        axis.plot(P, values, label=label)
    axis.set(xlabel=xlabel, ylabel="bits", xlim=(0, 1), ylim=(0, None))
    if len(curves) > 1:
        axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "jaxent"  # the same file every time
    q = coin(np.full_like(P, 0.25))
    draw("self_information", "probability of the outcome", {"self-information": self_information(P, base=2)})
    draw("entropy", "probability of heads", {"entropy": entropy(coin(P), base=2)})
    curves = {"H(P, Q), Q = (1/4, 3/4)": cross_entropy(coin(P), q, base=2), "H(P)": entropy(coin(P), base=2)}
    draw("cross_entropy", "probability of heads under P", curves)


if __name__ == "__main__":
    main()
