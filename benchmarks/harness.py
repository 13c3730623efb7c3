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
import numpy as np


@dataclass(frozen=True)
class Effort:
    """How long to look: rounds until `rounds` and `seconds` are both reached, or 5 rounds and `most_seconds`."""

    rounds: int
    seconds: float
    most_seconds: float
    sample_seconds: float  # a sample is repeated calls until this much has passed
    compiles: int


FULL = Effort(rounds=15, seconds=3.0, most_seconds=120.0, sample_seconds=0.01, compiles=3)
QUICK = Effort(rounds=3, seconds=0.0, most_seconds=10.0, sample_seconds=0.01, compiles=1)
LEAST_ROUNDS, MOST_ROUNDS = 5, 100
RELAX_BELOW_SECONDS = 0.1  # shorter calls get an untimed one first: threads of the previous contender may still spin


@dataclass(frozen=True)
class Contender:
    """Something that computes the case once, ready to be timed."""

    name: str
    call: Callable[[], Any]
    """Runs once and waits for the result."""
    results: Callable[[], list[np.ndarray]] | None = None
    """The value and then the gradients, to compare with the others; None for a bare limit."""
    compile_seconds: float | None = None
    temp_bytes: int | None = None


def compiled(name: str, function: Callable[..., Any], *args: jax.Array, effort: Effort) -> Contender:
    """`jit(function)` as a contender. Tracing, lowering and compiling count as compile time, from empty caches."""
    seconds, memory = [], None
    for _ in range(effort.compiles):
        jax.clear_caches()
        start = time.perf_counter()
        executable = jax.jit(lambda *a: function(*a)).lower(*args).compile()
        seconds.append(time.perf_counter() - start)
        memory = executable.memory_analysis()
    run = jax.jit(function)

    def results() -> list[np.ndarray]:
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(run(*args))]

    return Contender(
        name,
        lambda: jax.block_until_ready(run(*args)),
        results,
        statistics.median(seconds),
        None if memory is None else memory.temp_size_in_bytes,
    )


def seconds_of(call: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(contenders: list[Contender], effort: Effort) -> dict[str, list[float]]:
    """Milliseconds a call of each contender, one sample a round."""
    calls = {}
    for c in contenders:
        c.call()  # may still compile
        calls[c.name] = min(seconds_of(c.call) for _ in range(3))
    samples: dict[str, list[float]] = {c.name: [] for c in contenders}
    start = time.perf_counter()
    for i in range(MOST_ROUNDS):
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


def check_agreement(contenders: list[Contender], tolerance: Mapping[str, float]) -> None:
    """Value and gradients equal those of the first contender, in the norm of each array.

    A comparison of times between codes that do not compute the same thing says nothing.
    """
    reference: list[np.ndarray] | None = None
    for contender in contenders:
        if contender.results is None:
            continue
        results = contender.results()
        if reference is None:
            reference = results
            continue
        if len(results) != len(reference):
            raise AssertionError(f"{contender.name} gives {len(results)} arrays, {contenders[0].name} {len(reference)}")
        for i, (got, expected) in enumerate(zip(results, reference, strict=True)):
            kind = "gradient" if i else "value"
            error = np.linalg.norm((got - expected).ravel()) / np.linalg.norm(expected.ravel())
            if not error <= tolerance[kind]:
                raise AssertionError(
                    f"{contender.name} and {contenders[0].name} disagree: relative error {error:.2e} in {kind} {i}, "
                    f"at most {tolerance[kind]:.0e} expected; no time was taken"
                )
