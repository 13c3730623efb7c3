"""Timing: everything is warm, every call is waited for, and contenders take turns.

A shared or throttled machine drifts by more than what is to be shown, so no contender is timed on its own: each round
times all of them, the order turns by one place a round, and a ratio is the median over rounds of the ratio within a
round.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.collectives import collectives


@dataclass(frozen=True)
class Effort:
    """How long to look: rounds until `rounds` and `seconds` are both reached, or 3 rounds and `most_seconds`."""

    rounds: int
    seconds: float
    most_seconds: float
    sample_seconds: float  # a sample is repeated calls until this much has passed
    compiles: int


FULL = Effort(rounds=15, seconds=2.0, most_seconds=8.0, sample_seconds=0.01, compiles=3)
QUICK = Effort(rounds=3, seconds=0.0, most_seconds=10.0, sample_seconds=0.01, compiles=1)
LEAST_ROUNDS, MOST_ROUNDS = 3, 100
SLAB_ROWS = 64
RELAX_BELOW_SECONDS = 0.1  # shorter calls get an untimed one first: threads of the previous contender may still spin


@dataclass(frozen=True)
class Contender:
    """Something that computes the case once, ready to be timed."""

    name: str
    call: Callable[[], Any]
    """Runs once and waits for the result."""
    results: Callable[[], list[np.ndarray]] | None = None
    """The value and then the gradients, to compare with the others; None for a bare limit."""
    peer: str = ""
    """The name without versions and settings, the same in every record."""
    compile_seconds: tuple[float, ...] = ()
    temp_bytes: int | None = None
    result_bytes: int | None = None
    """Of results in new memory, not in that of a donated input."""
    sent_bytes: float | None = None
    """What collectives make each device send."""
    devices: int = 1
    """That share the work; fake devices share the cores of one CPU and count as one."""


def compiled(
    name: str, function: Callable[..., Any], *args: jax.Array, effort: Effort, donate: bool = False
) -> Contender:
    """`jit(function)` as a contender. Tracing, lowering and compiling count as compile time, from empty caches.

    With `donate` the first argument is given up, and the last result, of the same shape, takes its place in the next
    call.
    """
    seconds, executable = [], None
    for _ in range(effort.compiles):
        jax.clear_caches()
        start = time.perf_counter()
        executable = jax.jit(lambda *a: function(*a), donate_argnums=(0,) if donate else ()).lower(*args).compile()
        seconds.append(time.perf_counter() - start)
    assert executable is not None
    run, memory = executable, executable.memory_analysis()
    first = [jnp.array(args[0], copy=True)] if donate else [args[0]]

    def call() -> None:
        out = jax.block_until_ready(run(first[0], *args[1:]))
        if donate:
            first[0] = jax.tree.leaves(out)[-1]

    def results() -> list[np.ndarray]:
        given = jnp.array(args[0], copy=True) if donate else args[0]
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(run(given, *args[1:]))]

    devices = max((x.sharding.device_set for x in args), key=len)
    sent = sum(c.sent for c in collectives(run.as_text() or "")) if len(devices) > 1 else None
    return Contender(
        name,
        call,
        results,
        compile_seconds=tuple(seconds),
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
        result_bytes=None if memory is None else memory.output_size_in_bytes - memory.alias_size_in_bytes,
        sent_bytes=sent,
        devices=1 if all(device.platform == "cpu" for device in devices) else len(devices),
    )


def estimate(call: Callable[[], Any]) -> float:
    """Seconds of a call, roughly: the first if that is long, else the least of three that follow."""
    first = seconds_of(call)
    return first if first > RELAX_BELOW_SECONDS else min(seconds_of(call) for _ in range(3))


def seconds_of(call: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(contenders: list[Contender], effort: Effort) -> dict[str, list[float]]:
    """Milliseconds a call of each contender, one sample a round."""
    start = time.perf_counter()
    calls = {c.name: estimate(c.call) for c in contenders}
    # Calls that are long enough to be told from one were estimated by one: that was the first round.
    first_round = min(calls.values()) > RELAX_BELOW_SECONDS
    samples = {name: [1e3 * seconds] if first_round else [] for name, seconds in calls.items()}
    for i in range(first_round, MOST_ROUNDS):
        elapsed = time.perf_counter() - start
        if (i >= effort.rounds and elapsed > effort.seconds) or (i >= LEAST_ROUNDS and elapsed > effort.most_seconds):
            break
        first = i % len(contenders)
        for c in contenders[first:] + contenders[:first]:
            if calls[c.name] < RELAX_BELOW_SECONDS:
                c.call()
            samples[c.name].append(1e3 * seconds_of(c.call, math.ceil(effort.sample_seconds / calls[c.name])))
    return samples


@dataclass(frozen=True)
class Summary:
    """Samples in three numbers; `spread` is half the interquartile range."""

    median: float
    spread: float
    smallest: float

    @classmethod
    def of(cls, samples: list[float]) -> "Summary":
        low, high = np.percentile(samples, [25, 75])
        return cls(statistics.median(samples), float(high - low) / 2, min(samples))


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of our time by theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def agreeing(contenders: list[Contender], tolerance: Mapping[str, float]) -> tuple[list[Contender], dict[str, str]]:
    """Those whose value and gradients equal the first one's, and what the others gave instead.

    A comparison of times between codes that do not compute the same thing says nothing: who disagrees is not timed, nor
    who fails, for want of memory; and if the first one stands alone, nobody is.
    """
    first, *others = contenders
    assert first.results is not None
    expected = first.results()
    kept, failed, refused = [first], {}, {}
    for contender in others:
        assert contender.results is not None
        try:
            difference = _difference(contender.results(), expected, tolerance)
        except Exception as error:
            failed[contender.name] = failure(error)
            continue
        if difference is None:
            kept.append(contender)
        else:
            refused[contender.name] = f"disagrees: {difference}"
    if len(refused) >= len(kept) and refused:
        raise AssertionError(f"{first.name} disagrees with the others; no time was taken: {refused}")
    return kept, failed | refused


def failure(error: Exception) -> str:
    """Why something could not run, in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"


def _difference(got: list[np.ndarray], expected: list[np.ndarray], tolerance: Mapping[str, float]) -> str | None:
    """The first array whose relative error, in the norm, is too large."""
    if len(got) != len(expected):
        return f"{len(got)} arrays for {len(expected)}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        kind = "value" if b.ndim == 0 else "gradient"
        error = _relative_error(a, b)
        if not error <= tolerance[kind]:
            return f"relative error {error:.2e} in {kind} {i}, at most {tolerance[kind]:.0e} expected"
    return None


def _relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """In the norm; a slab at a time, since a kernel's gradient may take gigabytes."""
    error = size = 0.0
    for i in range(0, len(expected) if expected.ndim else 1, SLAB_ROWS):
        a, b = (x[i : i + SLAB_ROWS] if expected.ndim else x for x in (got, expected))
        difference = a - b
        error += float(np.vdot(difference, difference))
        size += float(np.vdot(b, b))
    return math.sqrt(error / size)
