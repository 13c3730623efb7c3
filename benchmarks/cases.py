"""What is computed: shapes, data and the work that cannot be avoided."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Suite = Literal["dense", "linear", "curvature", "sharded", "chunks"]
Mode = Literal["value", "value and gradient", "Hessian product", "Gauss-Newton product", "gradient norms"]
Sweep = Literal["", "rows", "classes"]
SUITES: tuple[Suite, ...] = ("dense", "linear", "curvature", "sharded")  # that run if none is named
GRADIENT: Mode = "value and gradient"

# Matrix products of N x D x V multiply-adds that must be. All need the logits. A gradient needs one by hidden, one by
# kernel. A product with a tangent needs the logits' tangent (by hidden, by kernel); with the Hessian each of the two
# results then has two terms, with the Gauss-Newton matrix one. Norms by kernel are those of outer products.
PRODUCTS: dict[Mode, int] = {
    "value": 1,
    "value and gradient": 3,
    "Hessian product": 7,
    "Gauss-Newton product": 5,
    "gradient norms": 2,
}
TANGENT_MODES: tuple[Mode, ...] = ("Hessian product", "Gauss-Newton product")
# How often the inputs' bytes must move: read; gradients written; tangents read.
PASSES: dict[Mode, int] = {
    "value": 1,
    "value and gradient": 2,
    "Hessian product": 3,
    "Gauss-Newton product": 3,
    "gradient norms": 1,
}

DENSE = ((256, 10), (65536, 10), (8192, 1000), (1024, 32768), (512, 65536), (4096, 50257))
DENSE_QUICK = ((256, 10), (1024, 1000), (64, 40000))
DONATED = ((8192, 1000), (1024, 32768))
DONATED_QUICK = ((1024, 1000),)
# Rows, hidden size, classes.
LINEAR = ((4096, 512, 32768), (2048, 256, 128256), (512, 128, 1000))
LINEAR_QUICK = ((512, 128, 1000), (512, 64, 8192))
# The share of the rows that count where most are prompts, padding or words that are not asked for.
KEPT = {"masked language model": 0.15, "fine-tuning": 0.3, "RL": 0.5}
KEPT_SHAPE, KEPT_QUICK = (4096, 512, 32768), (512, 64, 8192)
CURVATURE = ((1024, 256, 32768), (512, 128, 1000))
CURVATURE_QUICK = ((256, 64, 4096),)
SHARDED = (("dense", 4096, 0, 32768), ("linear", 2048, 256, 16384))
SHARDED_QUICK = (("dense", 512, 0, 4096), ("linear", 512, 64, 4096))
# The output layers of published models: hidden size, vocabulary.
HEADS = {
    "GPT-2": (768, 50257),
    "Qwen2.5-0.5B": (896, 151936),
    "Gemma-2 2B": (2304, 256000),
    "Llama-3 8B": (4096, 128256),
}
ACCELERATOR_ROWS = (8192, 32768)
# Of the rows, next to the number that the library takes.
CHUNKS = (2, 4, 8, 16, 32)
# Rows, hidden size, classes; each of rows and of classes is doubled three times while the other stays.
SWEEPS = {"cpu": (2048, 128, 8192), "quick": (256, 32, 1024), "accelerator": (4096, 1024, 16384)}
DOUBLINGS = (1, 2, 4, 8)

CPU_FLOPS_PER_CORE = 3e10  # heuristic: about half a second of matrix products per call, so that a head takes a minute
IGNORED = -100  # the label of a row that does not count, everyone's default
LEAST_HEAD_ROWS, MOST_CPU_HEAD_ROWS = 32, 4096
# Heuristic: kernel, tangent or transposed copy for torch, gradients of ours and of the peer that is compared, on host
# and device.
KERNELS_HELD = 6


@dataclass(frozen=True)
class Resources:
    """What cases are scaled to."""

    platform: str
    devices: int
    cores: int
    memory_bytes: int

    @classmethod
    def here(cls) -> "Resources":
        device = jax.devices()[0]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(device.platform, jax.device_count(), cores, _memory_at_hand(device.memory_stats()))


def _memory_at_hand(statistics: dict[str, int] | None) -> int:
    """Of the device; for a CPU, which has no statistics, what the system could give without swapping."""
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    info = Path("/proc/meminfo")
    if info.exists():
        lines = (line.split() for line in info.read_text().splitlines())
        return next(1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass(frozen=True)
class Case:
    """The mean loss of `rows` rows and `classes` classes; from hidden states of size `hidden` if that is not 0."""

    suite: Suite
    rows: int
    classes: int
    mode: Mode
    hidden: int = 0
    dtype: str = "float32"
    head: str = ""
    sweep: Sweep = ""
    kept: float = 1.0
    """The share of the rows that count; the labels of the others are `IGNORED`."""
    use: str = ""
    """Where so many count."""
    donated: bool = False
    """The logits' memory is given up, so that the gradient can take it."""
    mesh: tuple[int, int] | None = None
    """Devices along the rows, devices along the classes."""

    @property
    def name(self) -> str:
        shape = f"N={self.rows} {f'D={self.hidden} ' if self.hidden else ''}V={self.classes} {self.dtype}"
        notes = [
            f"{self.suite} {self.mode}" + (f" of {self.head}" if self.head else ""),
            shape,
            *([f"{self.kept:.0%} of the rows kept ({self.use})"] if self.use else []),
            *(["logits donated"] if self.donated else []),
            *([f"sweep in {'N' if self.sweep == 'rows' else 'V'}"] if self.sweep else []),
            *([f"{self.mesh[0]}x{self.mesh[1]} devices"] if self.mesh else []),
        ]
        return ", ".join(notes)

    def data(self) -> tuple[np.ndarray, ...]:
        """`(logits, labels)` or `(hidden, kernel, labels)`; then, for products of curvature, a tangent of each float.

        Logits have standard deviation 3, as early in training.
        """
        random = np.random.default_rng(0)
        labels = random.integers(0, self.classes, self.rows, dtype=np.int32)
        if self.kept < 1:
            labels[random.permutation(self.rows)[self.rows_kept :]] = IGNORED

        def normal(*shape: int, scale: float) -> np.ndarray:
            values = random.standard_normal(shape, dtype=np.float32)
            values *= np.float32(scale)
            return values.astype(jnp.dtype(self.dtype), copy=False)

        def floats() -> tuple[np.ndarray, ...]:
            if not self.hidden:
                return (normal(self.rows, self.classes, scale=3.0),)
            kernel = normal(self.hidden, self.classes, scale=3.0 / self.hidden**0.5)
            return normal(self.rows, self.hidden, scale=1.0), kernel

        return *floats(), labels, *(floats() if self.mode in TANGENT_MODES else ())

    @property
    def rows_kept(self) -> int:
        return round(self.kept * self.rows)

    def bytes_moved(self) -> int:
        """What must cross the memory bus: inputs once, gradients once."""
        inputs = (self.rows + self.classes) * self.hidden if self.hidden else self.rows * self.classes
        return inputs * PASSES[self.mode] * jnp.dtype(self.dtype).itemsize

    def flops_of(self, products: int) -> int:
        return 2 * products * self.rows_kept * self.hidden * self.classes

    def flops(self) -> int:
        """Of the matrix products that must be: of the rows that count."""
        return self.flops_of(PRODUCTS[self.mode])

    def tolerance(self) -> dict[str, float]:
        """Relative; the products of a float32 linear loss may run in a narrower format on an accelerator."""
        if self.dtype != "float32":
            return {"value": 2.0**-8, "gradient": 2e-2}  # a value that is rounded to bfloat16 is as good as it gets
        return {"value": 1e-4, "gradient": 2e-3} if self.hidden else {"value": 1e-5, "gradient": 1e-4}


def cases(suite: Suite, quick: bool, at_hand: Resources) -> list[Case]:
    if suite == "dense":
        modes: tuple[Mode, ...] = ("value", GRADIENT)
        shapes, donated = (DENSE_QUICK, DONATED_QUICK) if quick else (DENSE, DONATED)
        plain = [Case("dense", n, v, mode, 0, t) for t in dtypes(at_hand) for mode in modes for n, v in shapes]
        return plain + [Case("dense", n, v, GRADIENT, 0, t, donated=True) for t in dtypes(at_hand) for n, v in donated]
    if suite == "linear":
        shapes = LINEAR_QUICK if quick else LINEAR
        plain = [Case("linear", n, v, GRADIENT, d, t) for t in dtypes(at_hand) for n, d, v in shapes]
        n, d, v = KEPT_QUICK if quick else KEPT_SHAPE
        kept = [Case("linear", n, v, GRADIENT, d, use=use, kept=share) for use, share in KEPT.items()]
        return [*plain, *kept, *([] if quick else _heads(at_hand)), *_sweeps(quick, at_hand)]
    if suite == "curvature":
        shapes = CURVATURE_QUICK if quick else CURVATURE
        modes = (*TANGENT_MODES, "gradient norms")
        return [Case("curvature", n, v, mode, d) for mode in modes for n, d, v in shapes]
    if suite == "chunks":
        shapes = LINEAR_QUICK[1:] if quick else tuple((rows, *HEADS["Llama-3 8B"]) for rows in ACCELERATOR_ROWS)
        return [Case("chunks", n, v, GRADIENT, d, dtypes(at_hand)[0]) for n, d, v in shapes]
    if at_hand.devices == 1:
        return []
    data = 2 if at_hand.devices % 2 == 0 and at_hand.devices > 2 else 1
    mesh = (data, at_hand.devices // data)
    return [Case("sharded", n, v, GRADIENT, d, mesh=mesh) for _, n, d, v in (SHARDED_QUICK if quick else SHARDED)]


def dtypes(at_hand: Resources) -> tuple[str, ...]:
    """Few CPUs multiply bfloat16 faster than float32, and none computes the rest of a loss in it."""
    return ("float32",) if at_hand.platform == "cpu" else ("bfloat16", "float32")


def _heads(at_hand: Resources) -> Iterator[Case]:
    for dtype in dtypes(at_hand):
        for name, (hidden, classes) in HEADS.items():
            left = at_hand.memory_bytes - KERNELS_HELD * hidden * classes * jnp.dtype(dtype).itemsize
            fitting = left // (4 * 4 * classes)  # four arrays of float32 logits, as dense code may hold
            if at_hand.platform == "cpu":
                sizes = (int(CPU_FLOPS_PER_CORE * at_hand.cores / (6 * hidden * classes)),)
                sizes = tuple(min(max(n, LEAST_HEAD_ROWS), MOST_CPU_HEAD_ROWS, max(fitting, 0)) for n in sizes)
            else:
                sizes = ACCELERATOR_ROWS if left > 0 else ()
            for rows in sizes:
                if rows > 0:
                    yield Case("linear", 1 << (rows.bit_length() - 1), classes, GRADIENT, hidden, dtype, name)


def _sweeps(quick: bool, at_hand: Resources) -> Iterator[Case]:
    rows, hidden, classes = SWEEPS["quick" if quick else "cpu" if at_hand.platform == "cpu" else "accelerator"]
    for k in DOUBLINGS:
        yield Case("linear", k * rows, classes, GRADIENT, hidden, sweep="rows")
    for k in DOUBLINGS:
        yield Case("linear", rows, k * classes, GRADIENT, hidden, sweep="classes")
