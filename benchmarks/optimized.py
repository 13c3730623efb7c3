"""What an accelerator's compiler makes of a program, with its memory assigned: read before the machine code is there.

That takes some seconds, and the machine code, which nothing here reads, up to minutes on a machine with few cores. No
option stops a compiler in between, so that it runs in a process of its own, which is ended.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxent._engine.devices import DEVICES

MOST_SECONDS = 900
TEXT, ALLOCATIONS = "after_optimizations.txt", "after_optimizations-buffer-assignment.txt"
LAST = "after_optimizations-memory-usage-report.txt"


class RefusedError(Exception):
    """What the compiler says of a program that it does not compile."""


class Optimized(NamedTuple):
    text: str
    temp_bytes: int
    seconds: float
    """Until both were there."""


def optimized(target: str, module: str, fields: Mapping[str, Any]) -> Optimized:
    """What `python -m benchmarks.MODULE FIELDS` compiles for a target."""
    # XLA for CPUs writes files of the same names, of what JAX computes while it traces.
    compiler = "." if DEVICES[target].is_tpu else "_gpu_"
    with tempfile.TemporaryDirectory() as name:
        folder, said = Path(name), Path(name) / "stderr"

        def found(name: str) -> list[Path]:
            return list(folder.glob(f"*{compiler}{name}"))

        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        start = time.perf_counter()
        with said.open("w") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}", json.dumps(fields)],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
                stdout=errors,
                stderr=errors,
            )
            try:
                while not found(LAST) and child.poll() is None and time.perf_counter() - start < MOST_SECONDS:
                    time.sleep(0.2)
                seconds = time.perf_counter() - start
                time.sleep(0.2)  # until the last files are whole
            finally:
                child.kill()
                child.wait()
        if not found(LAST):
            raise RefusedError(said.read_text(errors="replace") or f"nothing after {MOST_SECONDS} s")
        text, allocations = (found(name)[0].read_text() for name in (TEXT, ALLOCATIONS))
        needed, there = main_memory(allocations), DEVICES[target].memory_bytes
        if needed > there:  # the compiler finds out at the end
            raise RefusedError(f"Used {needed / 2**30:.2f}G of {there / 2**30:.2f}G hbm")
        return Optimized(text, main_memory(allocations, "preallocated-temp"), seconds)


def main_memory(allocations: str, kind: str = "") -> int:
    """Bytes of one kind or of all; an allocation in another memory names its color, a result lies in a parameter's."""
    found = re.findall(rf"^allocation \d+: size (\d+), (?!color|thread-local).*{kind}", allocations, re.MULTILINE)
    return sum(map(int, found))
