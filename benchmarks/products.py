"""`python -m benchmarks.products [--dtype bfloat16] [--cpu-time]`: the products of a linear layer in every orientation.

In GFLOP/s. With `--cpu-time` it is the rate per second of processor time, which other load disturbs less; on one core
(`taskset -c 0`) that is the rate of the kernels.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import jax

from benchmarks.cases import GRADIENT, Case
from benchmarks.inputs import Inputs
from benchmarks.limits import PRODUCTS_ALONE
from benchmarks.torch_peers import products

# Rows, features, classes: chunks of the heads that the suite `linear` has, and few rows.
SHAPES = (
    (1024, 512, 32768),
    (512, 256, 32768),
    (256, 768, 50257),
    (512, 128, 8192),
    (256, 128, 65536),
    (512, 128, 1000),
    (128, 64, 32768),
    (128, 768, 16384),
    (64, 768, 16384),
    (32, 768, 16384),
    (32, 4096, 16384),
)
ROUNDS = 5


def rates(shape: Sequence[int], dtype: str, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """By product and form; the least of several turns."""
    rows, features, classes = shape
    inputs = Inputs(Case("linear", rows, classes, GRADIENT, features, dtype))
    hidden, kernel, _ = inputs.arrays
    logits = (hidden @ kernel).astype(dtype)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for product, forms in PRODUCTS_ALONE.items():
        for form, function in forms.items():
            run = jax.jit(function).lower(hidden, kernel, logits).compile()
            calls[product, form] = lambda run=run: jax.block_until_ready(run(hidden, kernel, logits))
    calls |= {(product, "torch"): call for product, call in products(inputs, logits, rows).items()}
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(1 + ROUNDS):
        for key, call in calls.items():
            start = clock()
            call()
            if turn:  # the first is to warm up
                best[key] = min(best[key], clock() - start)
    found: dict[str, dict[str, float]] = {product: {} for product in PRODUCTS_ALONE}
    for (product, form), seconds in best.items():
        found[product][form] = 2e-9 * rows * features * classes / seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    for shape in SHAPES:
        found = rates(shape, options.dtype, time.process_time if options.cpu_time else time.perf_counter)
        cells = [", ".join(f"{form} {rate:.0f}" for form, rate in forms.items()) for forms in found.values()]
        names = (f"{product}: {cell}" for product, cell in zip(found, cells, strict=True))
        print(f"N={shape[0]} D={shape[1]} V={shape[2]} {options.dtype}; " + "; ".join(names), flush=True)


if __name__ == "__main__":
    main()
