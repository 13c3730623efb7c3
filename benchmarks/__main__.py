"""`python -m benchmarks [--suite SUITE] [--quick] [--json FILE]`, `... compare A.json B.json`, `... readme A.json`.

`--suite compiled [--device NAME]` runs nothing: it compiles for accelerators that need not be there, and adds to the
record what it lacks. `--suite accuracy` times nothing: it asks how exact every installed loss is.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import (
    accuracy,
    accuracy_report,
    compiled_report,
    compiled_run,
    compilers,
    pictures,
    readme,
    report,
    sharded,
    torch_peers,
)
from benchmarks.cases import SUITES, Case, Resources, Suite, cases
from benchmarks.compare import compare
from benchmarks.harness import FULL, QUICK, Effort, agreeing, measure
from benchmarks.inputs import Inputs
from benchmarks.limits import Limits, bound, measure_limits
from benchmarks.peers import prepared, present
from jaxent import plan

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"


def run_case(case: Case, limits: Limits, effort: Effort) -> dict[str, Any]:
    start = time.perf_counter()
    inputs = Inputs(case)
    # What is called float32 is multiplied as that by everyone: JAX's default is narrower on GPUs and TPUs.
    with jax.default_matmul_precision("highest" if case.dtype == "float32" else "default"):
        contenders, left_out = prepared(case, inputs, effort, Resources.here())
        contenders, refused = agreeing(contenders, case.tolerance())
        alone = bound(case, inputs, effort)
        contenders += alone.contenders
        samples = measure(contenders, effort)
    best = {c.name: min(samples[c.name]) / 1e3 * c.devices for c in contenders}
    own = limits.at_own_shapes(case.dtype, alone, alone.seconds(best))
    planned = planned_ms(case, own)
    own = own.reached(case, min(best[c.name] for c in contenders if c.peer != "bound"))
    left_out |= refused
    return report.case_record(case, contenders, samples, own, planned, left_out, time.perf_counter() - start)


def planned_ms(case: Case, own: Limits) -> float | None:
    """What `plan` says of a linear loss at the rates of the products alone and of a pass over memory."""
    if case.suite != "linear":
        return None
    product_rate, byte_rate = own.product_flops_per_second[case.dtype], own.pass_bytes_per_second
    shape = case.rows_kept, case.hidden, case.classes
    return plan(*shape, dtype=case.dtype, flops_per_second=product_rate, bytes_per_second=byte_rate).milliseconds


def run(suites: Sequence[Suite], quick: bool, path: Path) -> dict[str, Any]:
    """All cases of the suites; the record is written after each, so that a run that is cut off leaves what it has."""
    at_hand = Resources.here()
    todo = [case for suite in suites for case in cases(suite, quick, at_hand)]
    effort = QUICK if quick or "chunks" in suites else FULL  # of which a device that is lent leaves time
    limits = measure_limits({case.dtype for case in todo} or {"float32"}, effort)
    absent = sorted({name for suite in suites for name in present(suite)[1]})
    torch = {"torch": torch_peers.threads()} if present("dense")[1].count("torch dense") == 0 else {}
    record = report.new_record(limits, absent, {"XLA": at_hand.cores, **torch})
    path.parent.mkdir(parents=True, exist_ok=True)
    print(report.header(record))
    for case in todo:
        record["cases"].append(run_case(case, limits, effort))
        print(f"\n{report.table(record['cases'][-1])}", flush=True)
        _write(record, path)
    if "sharded" in suites and at_hand.devices == 1 and at_hand.platform == "cpu":
        record["cases"] += _on_fake_devices(quick)
        _write(record, path)
    return record


def conclude(record: dict[str, Any], path: Path) -> None:
    for text in filter(None, (report.growth(record), report.planned(record), report.findings(record))):
        print(f"\n{text}")
    print("\nwritten: " + " ".join(str(p) for p in (path, *pictures.draw(record, path))))


def _write(record: dict[str, Any], path: Path) -> None:
    path.write_text(report.one_line_lists(json.dumps(record, indent=1)) + "\n")


def _on_fake_devices(quick: bool) -> list[dict[str, Any]]:
    """The sharded suite in a process of its own: how many devices a CPU is has to be said before JAX starts."""
    print(f"\nsharded, over {sharded.FAKE_DEVICES} fake devices:", flush=True)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_NUM_CPU_DEVICES": str(sharded.FAKE_DEVICES),
        "JAX_PLATFORMS": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sharded.json"
        program = "import sys, pathlib, benchmarks.__main__ as b; b.run(['sharded'], {}, pathlib.Path(sys.argv[1]))"
        command = [sys.executable, "-c", program.format(quick), str(path)]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        return json.loads(path.read_text())["cases"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--suite", choices=(*SUITES, "chunks", "compiled", "accuracy"), help="one suite; all that are timed if left out"
    )
    parser.add_argument(
        "--device", choices=compilers.TARGETS, action="append", help="what `compiled` compiles for; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run?")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="the record; else benchmarks/results/DATE-DEVICE.json"
    )
    commands = parser.add_subparsers(dest="command")
    comparison = commands.add_parser("compare", help="what changed between two records beyond the noise")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    table = commands.add_parser("readme", help="write the documentation's table of speed from a record")
    table.add_argument("record", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        print(compare(*(json.loads(p.read_text()) for p in (options.before, options.after))))
    elif options.command == "readme":
        read = json.loads(options.record.read_text())
        pages = {"programs": compiled_report, "scores": accuracy_report}
        next((page for key, page in pages.items() if key in read), readme).update(REPOSITORY, options.record)
    elif options.suite == "compiled":
        jax.config.update("jax_platforms", "cpu")  # no accelerator is used, nor looked for
        targets = options.device or compilers.DEFAULT_TARGETS
        name = "-".join([f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-compiled", *["quick"] * options.quick])
        path = options.json or RESULTS / f"{name}.json"
        compiled_run.run(targets, options.quick, path)
        print(f"\nwritten: {path}")
    elif options.suite == "accuracy":
        path = options.json or RESULTS / f"{report.place_and_date()}-accuracy.json"
        print(accuracy_report.table(accuracy.run(path)) + f"\n\nwritten: {path}")
    else:
        name = "-".join(
            [report.place_and_date(), *([options.suite] if options.suite else []), *["quick"] * options.quick]
        )
        path = options.json or RESULTS / f"{name}.json"
        conclude(run([options.suite] if options.suite else SUITES, options.quick, path), path)


if __name__ == "__main__":
    # A compilation that is read back from a cache on disk would count as a fast one.
    jax.config.update("jax_compilation_cache_dir", None)
    # JAX would take three quarters of a GPU's memory at once, and PyTorch needs some of the same.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main(sys.argv[1:])
