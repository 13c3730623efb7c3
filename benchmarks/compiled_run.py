"""Runs the suite `compiled` and writes its record."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxent
from benchmarks import compiled_report, compiled_scale, compilers, optimized
from benchmarks.cases import HEADS
from benchmarks.collectives import collectives
from benchmarks.compiled import measure
from benchmarks.compiled_programs import MODES, Author, Mode, Precision, Program

MAIN_HEAD = "Llama-3 8B"
STEP: Mode = "value and gradient"
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "mixed")


def programs(targets: Sequence[str], quick: bool) -> Iterator[Program]:
    """Every function of every head for every target, the most telling first: some compilers take minutes for each."""
    heads = [MAIN_HEAD, *(head for head in HEADS if head != MAIN_HEAD)]
    kinds = sorted(itertools.product(heads, MODES), key=lambda kind: (kind[0] != MAIN_HEAD) + (kind[1] != STEP))
    by_compiler = sorted(targets, key=lambda target: compilers.platform_of(target) == "tpu")
    for head, mode in kinds[: 1 if quick else None]:
        for target in by_compiler:
            for precision in PRECISIONS[: 1 if quick else None]:
                authors: list[Author] = ["jaxent", "dense"]
                if (head, mode, precision) == (MAIN_HEAD, STEP, "bfloat16"):
                    authors.append("dense in float32")
                yield from (Program(head, mode, precision, author, target=target) for author in authors)


def run(targets: Sequence[str], quick: bool, path: Path) -> dict[str, Any]:
    """The record, written after each program: a run that is cut off leaves what it has, and the next one adds to it."""
    absent = {p: how for p in sorted({*map(compilers.platform_of, targets)}) if (how := compilers.absent(p))}
    for platform, how in absent.items():
        print(f"no compiler for {platform}: {how}")
    there = [target for target in targets if compilers.platform_of(target) not in absent]
    record = compiled_report.new_record(there, absent)
    if path.exists():
        record = compiled_report.continued(json.loads(path.read_text()), record)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(record, path)
    if there:
        print(f"jax {jax.__version__}, {', '.join(record['compilers'])}; compiled, not run", flush=True)
    if "v5p" in there and not record["scale"]:
        for data, vocab in compiled_scale.MESHES:
            record["scale"].append(_step(data, vocab))
            print(compiled_report.scale_line(record["scale"][-1]), flush=True)
        _write(record, path)
    done = {compiled_report.key(row) for row in record["programs"]}
    order = {compiled_report.key(p.record): i for i, p in enumerate(programs(tuple(record["devices"]), False))}
    for program in programs(there, quick):
        if compiled_report.key(program.record) not in done:
            row = measure(program) | {"commit": record["commit"]}
            record["programs"].append(row)
            record["programs"].sort(key=lambda row: order.get(compiled_report.key(row), len(order)))
            print(compiled_report.line(row), flush=True)
            _write(record, path)
    return record


def _step(data: int, vocab: int) -> dict[str, Any]:
    step = compiled_scale.Step(data, vocab)
    reading = optimized.optimized("v5p", "compiled_scale", step._asdict())
    found = [c for c in collectives(reading.text) if c.extent]
    own = step.rows // data, step.features, step.classes // vocab
    split: dict[str, Any] = {"vocab_axis": "vocab"} if vocab > 1 else {}
    planned = jaxent.plan(*own, dtype="bfloat16", device="v5p", **split)
    return step._asdict() | {
        "compile_s": round(reading.seconds, 1),
        "temp_mib": round(reading.temp_bytes / 2**20, 1),
        "plan_mib": round(planned.temp_bytes / 2**20, 1),
        "collectives": len(found),
        "dtypes": sorted({c.dtype for c in found}),
        "sent": compiled_scale.numbers_sent(found, step),
        "formula": step.numbers_sent,
        "sent_gb": round(sum(c.sent * step.times(c) for c in found) / 1e9, 2),
    }


def _write(record: dict[str, Any], path: Path) -> None:
    """A program a line."""
    rows = {key: record[key] for key in ("programs", "scale")}
    head = json.dumps({key: value for key, value in record.items() if key not in rows}, indent=1)[:-2]
    lists = (
        f' "{key}": [' + ",".join(f"\n  {json.dumps(row)}" for row in found) + "\n ]" for key, found in rows.items()
    )
    path.write_text(head + ",\n" + ",\n".join(lists) + "\n}\n")
