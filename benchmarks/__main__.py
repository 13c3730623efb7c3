"""`python -m benchmarks [--suite dense|linear] [--quick] [--json FILE]`, or `... compare A.json B.json`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks import report
from benchmarks.cases import Case, cases
from benchmarks.harness import FULL, QUICK, Effort, check_agreement, measure
from benchmarks.limits import Limits, measure_limits
from benchmarks.peers import present, products, torch_threads

SUITES = ("dense", "linear")


def run_case(case: Case, limits: Limits, effort: Effort) -> dict[str, Any]:
    data = tuple(jnp.asarray(x) for x in case.data())
    peers, _ = present(case.suite)
    contenders = [c for p in peers if (c := p.contender(case, data, effort)) is not None]
    check_agreement(contenders, case.tolerance())
    if case.suite == "linear":
        contenders.append(products(data, effort))
    return report.case_record(case, contenders, measure(contenders, effort), limits)


def run(suites: Sequence[str], quick: bool, path: Path | None = None) -> dict[str, Any]:
    """All cases of the suites; the record is written after each, so that a run that is cut off leaves what it has."""
    todo = [case for suite in suites for case in cases(suite, quick)]
    effort = QUICK if quick else FULL
    limits = measure_limits({case.dtype for case in todo}, effort)
    absent = sorted({name for suite in suites for name in present(suite)[1]})
    record = report.new_record(limits, absent, {"XLA": len(os.sched_getaffinity(0)), **torch_threads()})
    print(report.header(record))
    for case in todo:
        record["cases"].append(run_case(case, limits, effort))
        print(f"\n{report.table(record['cases'][-1])}", flush=True)
        if path is not None:
            path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, help="one suite; all of them if left out")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the record")
    commands = parser.add_subparsers(dest="command")
    comparison = commands.add_parser("compare", help="what changed between two records beyond the noise")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "compare":
        print(report.compare(*(json.loads(p.read_text()) for p in (options.before, options.after))))
        return
    suites = [options.suite] if options.suite else list(SUITES)
    run(suites, options.quick, options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
