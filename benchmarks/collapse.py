"""Softmax collapse: `python -m benchmarks.collapse` trains modular addition with several losses and draws what happens.

Prieto et al. (2025), "Grokking at the edge of numerical stability": in float32 the gradient of the usual cross-entropy
of a row becomes exactly 0 once its label leads by 17 nats, and learning stops before the network generalises. Here an
MLP of two hidden layers of 200 units learns (a + b) mod 113 from 40% of the pairs, full batch, without weight decay.

Four contenders differ in their loss alone: optax's in float32 and in float64, StableMax (equation 7 of the paper) in
float32, and jaxent's in float32, whose gradient keeps its relative accuracy down to the smallest normal number. Adam
squares the gradient, and squares below 1e-38 are lost in float32: their gradient is divided by its norm first (by its
largest entry before that, or the norm would underflow too). The fifth is jaxent's loss with Adam at its defaults, whose
second moment remembers larger gradients for a thousand steps, and whose epsilon is 1e-8.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.report import machine, one_line_lists
from jaxent import softmax_cross_entropy

MODULUS, SHARE, WIDTH = 113, 0.4, 200
LEARNING_RATE = 3e-3
RESULTS = Path(__file__).with_name("results")


class Data(NamedTuple):
    """Pairs of numbers and their sum modulo `MODULUS`."""

    pairs: jax.Array
    sums: jax.Array


def split_data(seed: int) -> tuple[Data, Data]:
    """The pairs to train on, and the others."""
    pairs = np.stack(np.meshgrid(np.arange(MODULUS), np.arange(MODULUS)), axis=-1).reshape(-1, 2)
    np.random.default_rng(seed).shuffle(pairs)
    sums = pairs.sum(-1) % MODULUS
    count = round(SHARE * len(pairs))
    pairs, sums = (jnp.asarray(x, jnp.int32) for x in (pairs, sums))
    return Data(pairs[:count], sums[:count]), Data(pairs[count:], sums[count:])


def init(seed: int, dtype: Any) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    zeros = jnp.zeros(WIDTH, dtype)
    return {
        "first": normal(2 * MODULUS, WIDTH),
        "first_bias": zeros,
        "second": normal(WIDTH, WIDTH),
        "second_bias": zeros,
        "head": normal(WIDTH, MODULUS),
    }


def logits_of(params: dict[str, jax.Array], pairs: jax.Array) -> jax.Array:
    # The product of the first layer with two one-hot rows.
    hidden = params["first"][pairs[:, 0]] + params["first"][MODULUS + pairs[:, 1]]
    hidden = jax.nn.relu(hidden + params["first_bias"])
    hidden = jax.nn.relu(hidden @ params["second"] + params["second_bias"])
    return hidden @ params["head"]


def optax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def jaxent_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return softmax_cross_entropy(logits, labels, reduction="none")


def stablemax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """`-log(s(z_y) / sum_k s(z_k))` with `s(z) = z + 1` for z >= 0 and `1 / (1 - z)` below."""
    scores = jnp.where(logits >= 0, jnp.maximum(logits, 0) + 1, 1 / (1 - jnp.minimum(logits, 0)))
    shares = jnp.log(scores) - jnp.log(jnp.sum(scores, axis=-1, keepdims=True))
    return -jnp.take_along_axis(shares, labels[:, None], axis=-1)[:, 0]


class Contender(NamedTuple):
    """A loss of rows, the dtype of everything, and whether the gradient is divided by its norm."""

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    dtype: str
    scaled: bool = True


CONTENDERS = {
    "optax float32": Contender(optax_loss, "float32"),
    "jaxent float32": Contender(jaxent_loss, "float32"),
    "StableMax float32": Contender(stablemax_loss, "float32"),
    "optax float64": Contender(optax_loss, "float64"),
    "jaxent float32, Adam alone": Contender(jaxent_loss, "float32", scaled=False),
}


def unit(gradient: Any) -> Any:
    """The gradient divided by its norm; the squares in the norm are taken in units of the largest entry."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(gradient)]))
    scaled = jax.tree.map(lambda x: jnp.where(largest > 0, x / largest, 0), gradient)
    norm = optax.global_norm(scaled)
    return jax.tree.map(lambda x: jnp.where(norm > 0, x / norm, 0), scaled)


class Setting(NamedTuple):
    steps: int
    every: int
    """Steps between two points of the curves."""
    learning_rate: float
    decay: float
    """Of Adam's second moment."""
    seed: int


def train(contender: Contender, setting: Setting) -> dict[str, list[float]]:
    """The curves of one contender."""
    loss, dtype, scaled = contender
    steps, every, rate, decay, seed = setting
    train_data, test_data = split_data(seed)
    params = init(seed, dtype)
    # Epsilon is small enough to be lost next to gradients of norm 1.
    optimizer = optax.adam(rate, b2=decay, eps=1e-30) if scaled else optax.adam(rate)

    def mean_loss(params: Any) -> jax.Array:
        return jnp.mean(loss(logits_of(params, train_data.pairs), train_data.sums))

    def step(state: Any, _: None) -> tuple[Any, None]:
        params, moments = state
        gradient = jax.grad(mean_loss)(params)
        updates, moments = optimizer.update(unit(gradient) if scaled else gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    def measure(params: Any) -> dict[str, jax.Array]:
        z, test_z = logits_of(params, train_data.pairs), logits_of(params, test_data.pairs)
        by_logits = jax.grad(lambda z: jnp.sum(loss(z, train_data.sums)))(z)
        by_label = jnp.take_along_axis(by_logits, train_data.sums[:, None], axis=-1)
        return {
            "loss": jnp.mean(loss(z, train_data.sums)),
            "train accuracy": jnp.mean(jnp.argmax(z, -1) == train_data.sums),
            "test accuracy": jnp.mean(jnp.argmax(test_z, -1) == test_data.sums),
            "labels without a gradient": jnp.mean(by_label == 0),
        }

    @jax.jit
    def advance(state: Any) -> tuple[Any, dict[str, jax.Array]]:
        state, _ = jax.lax.scan(step, state, length=every)
        return state, measure(state[0])

    state = params, optimizer.init(params)
    points = [{name: float(x) for name, x in jax.jit(measure)(params).items()}]
    for _ in range(steps // every):
        state, point = advance(state)
        points.append({name: float(x) for name, x in point.items()})
    return {"step": [every * i for i in range(len(points))], **{name: [p[name] for p in points] for name in points[0]}}


def run(names: list[str], setting: Setting, path: Path) -> None:
    """The contenders; the record and its picture are written after each."""
    curves: dict[str, dict[str, list[float]]] = {}
    record = {"machine": machine(), "jax": jax.__version__, **setting._asdict(), "seconds": {}, "curves": curves}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        contender, start = CONTENDERS[name], time.perf_counter()
        with jax.enable_x64(contender.dtype == "float64"), jax.default_matmul_precision("highest"):
            curves[name] = train(contender, setting)
        record["seconds"][name] = round(time.perf_counter() - start)
        last = {key: values[-1] for key, values in curves[name].items()}
        print(name, ", ".join(f"{key} {value:.4g}" for key, value in last.items()), sep=": ", flush=True)
        path.with_suffix(".json").write_text(one_line_lists(json.dumps(record, indent=1)) + "\n", encoding="utf-8")
        draw(curves, path.with_suffix(".png"))


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels = ("loss", "labels without a gradient", "train accuracy", "test accuracy")
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.2), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for name, curve in curves.items():
            # 0 has no place on a log scale.
            points = [np.nan if panel == "loss" and y == 0 else y for y in curve[panel]]
            axis.plot(curve["step"], points, label=name, linewidth=1.2)
        axis.set(title=panel, xlabel="step", yscale="log" if panel == "loss" else "linear")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(curves), fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.collapse", description="Train modular addition, the losses apart."
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=25, help="steps between two points of the curves")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--decay", type=float, default=0.999, help="of Adam's second moment; the paper has 0.99")
    parser.add_argument("--only", choices=CONTENDERS, action="append", help="may be repeated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "softmax-collapse", help="without an ending")
    options = parser.parse_args()
    setting = Setting(options.steps, options.every, options.learning_rate, options.decay, options.seed)
    run(options.only or list(CONTENDERS), setting, options.out)


if __name__ == "__main__":
    main()
