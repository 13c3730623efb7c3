"""`python -m benchmarks.device [--quick]`: what is due where an accelerator is at hand, in a quarter of an hour.

`jaxent check` in float32, in float32 at the device's own default precision (TF32 on NVIDIA's devices) and in bfloat16;
the suite `chunks`: the head of Llama-3 8B at 8192 and 32768 rows, in chunks of several sizes, alongside dense code,
tokamax and torch; tests of the losses. The record lies in benchmarks/results. `--quick` is a rehearsal on any machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LOSSES = ("softmax_cross_entropy", "linear_softmax_cross_entropy")


class Step(NamedTuple):
    name: str
    arguments: tuple[str, ...]
    """Of `python -m`."""
    seconds: int
    """After which it is given up."""
    environment: tuple[tuple[str, str], ...] = ()


def steps(quick: bool) -> list[Step]:
    check = ("jaxent", "check", *(LOSSES if quick else ()), "--dtype")
    record = str(Path(tempfile.gettempdir()) / "jaxent-rehearsal.json")  # not among the results
    rehearsal = ("--quick", "--json", record) if quick else ()
    tests = ("tests/test_same_bits.py",) if quick else ("tests/test_losses.py", "tests/test_linear_losses.py")
    selected = ("-q", "-n", "0", "-m", "not (slow or grid)")
    return [
        Step("check float32", (*check, "float32"), 120),
        Step("check default precision", (*check, "float32"), 120, (("JAX_DEFAULT_MATMUL_PRECISION", "default"),)),
        Step("check bfloat16", (*check, "bfloat16"), 120),
        Step("suite chunks", ("benchmarks", "--suite", "chunks", *rehearsal), 360),
        Step("tests", ("pytest", *tests, *selected), 180),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few losses, small shapes: does it run?")
    quick = parser.parse_args(arguments).quick
    outcomes = []
    for step in steps(quick):
        print(f"== {step.name}", flush=True)
        start = time.perf_counter()
        try:
            code: int | str = subprocess.run(
                [sys.executable, "-m", *step.arguments],
                cwd=Path(__file__).parents[1],
                env=os.environ | dict(step.environment),
                timeout=None if quick else step.seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"not done after {step.seconds} s"
        outcomes.append((step.name, code, time.perf_counter() - start))
    for name, code, seconds in outcomes:
        print(f"{name}: {code or 'passed'}, {seconds:.0f} s")
    return int(any(code for _, code, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
