"""What the device can do, measured in the same run as what is compared with it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from benchmarks import torch_peers
from benchmarks.cases import Case
from benchmarks.harness import FULL, Contender, Effort, compiled, measure
from benchmarks.inputs import Inputs

# Rows, contracted, columns: square, and a head's proportions. Large enough that starting them does not count.
COPY_BYTES = {"cpu": 2**28, "accelerator": 2**31}
PRODUCT_SIZES = {
    "cpu": ((2048, 2048, 2048), (1024, 512, 8192)),
    "accelerator": ((8192, 8192, 8192), (8192, 4096, 32768)),
}
PRODUCT_LOGITS_BYTES = 2**32  # where all logits take more, the products alone are timed on as many rows as take this


@dataclass(frozen=True)
class Bound:
    """The part of a case that cannot be avoided and nothing else, timed alongside the others.

    Each group has one contender or more that do the same thing: whoever is fastest on this device shows what it can do.
    """

    groups: tuple[tuple[Contender, ...], ...]
    flops: int = 0
    bytes: int = 0

    @property
    def contenders(self) -> list[Contender]:
        return [contender for group in self.groups for contender in group]

    def seconds(self, best: Mapping[str, float]) -> float:
        """Of all groups, from the least times by name."""
        return sum(min(best[contender.name] for contender in group) for group in self.groups)


def bound(case: Case, inputs: Inputs, effort: Effort) -> Bound:
    """The three matrix products of a head, with the logits as their own gradient; or reading or copying logits."""
    if not case.hidden:
        logits = inputs.arrays[0]
        if case.mode == "value":
            contender = compiled("read alone", lambda x: jnp.max(x, axis=-1), logits, effort=effort)
        else:
            contender = compiled("copy alone", lambda x: x + 1, logits, effort=effort, donate=case.donated)
        return Bound(((_unchecked(contender),),), bytes=case.bytes_moved())
    hidden, kernel = inputs.arrays[:2]
    rows = min(case.rows_kept, max(1, PRODUCT_LOGITS_BYTES // (case.classes * kernel.dtype.itemsize)))
    note = "" if rows == case.rows else f", {rows} rows"
    hidden = hidden[:rows]
    logits = jax.jit(lambda h, k: (h @ k).astype(k.dtype))(hidden, kernel)
    once, groups = dataclasses.replace(effort, compiles=1), []
    of_torch = {} if case.mesh else torch_peers.products(inputs, logits, rows)
    for product, forms in PRODUCTS_ALONE.items():
        group = [
            compiled(f"{product}, {form}{note}", function, hidden, kernel, logits, effort=once)
            for form, function in forms.items()
        ]
        if product in of_torch:
            group.append(Contender(f"{product}, torch{note}", of_torch[product]))
        groups.append(tuple(_unchecked(contender) for contender in group))
    return Bound(tuple(groups), flops=case.flops_of(3) * rows // case.rows_kept)


def _turned(x: jax.Array) -> jax.Array:
    """The transpose, as an array of its own; in two halves, or XLA would not multiply bf16 by it as bf16."""
    half = x.shape[1] // 2
    return jax.lax.optimization_barrier(jnp.concatenate([x[:, :half].T, x[:, half:].T]))


# Each product in the orientations among which a back end might choose another kernel.
PRODUCTS_ALONE: dict[str, dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]]] = {
    "logits": {
        "h k": lambda h, k, z: _wide(h, k, 1, 0),
        "h turned": lambda h, k, z: _wide(_turned(h), k, 0, 0),
    },
    "by hidden": {
        "z k'": lambda h, k, z: _wide(z, k, 1, 1),
        "(k z')'": lambda h, k, z: _turned(_wide(k, z, 1, 1)),
    },
    "by kernel": {
        "h' z": lambda h, k, z: _wide(h, z, 0, 0),
        "h turned": lambda h, k, z: _wide(_turned(h), z, 1, 0),
    },
}


def _wide(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The product contracted over these axes, accumulated in float32 as losses do."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _unchecked(contender: Contender) -> Contender:
    return dataclasses.replace(contender, results=None, peer="bound")


@dataclass(frozen=True)
class Limits:
    """The best rates of several rounds."""

    copy_bytes_per_second: float
    """Read plus written, into fresh memory, as a gradient is."""
    pass_bytes_per_second: float
    """Read plus written, where it was read from, as in a pass over logits."""
    product_flops_per_second: dict[str, float]
    """By dtype, float32 in float32 accuracy."""

    def at_own_shapes(self, dtype: str, alone: Bound, seconds: float) -> "Limits":
        """With the rates of a case's own shapes: of its products; of its bytes where they move faster, from a cache."""
        if alone.flops:
            products = self.product_flops_per_second | {dtype: alone.flops / seconds}
            return dataclasses.replace(self, product_flops_per_second=products)
        fastest = max(self.copy_bytes_per_second, alone.bytes / seconds)
        return dataclasses.replace(self, copy_bytes_per_second=fastest)

    def reached(self, case: Case, seconds: float) -> "Limits":
        """With the rates that a contender showed to be possible: what nobody beats is a limit."""
        rate = max(self.product_flops_per_second[case.dtype], case.flops() / seconds)
        return dataclasses.replace(
            self,
            copy_bytes_per_second=max(self.copy_bytes_per_second, case.bytes_moved() / seconds),
            product_flops_per_second=self.product_flops_per_second | {case.dtype: rate},
        )

    def seconds(self, case: Case) -> float:
        """The least time that the case can take: products or memory, whichever binds."""
        return max(self._by_memory(case), self._by_products(case))

    def binding(self, case: Case) -> str:
        return "bytes moved" if self._by_memory(case) > self._by_products(case) else "matrix products"

    def _by_memory(self, case: Case) -> float:
        return case.bytes_moved() / self.copy_bytes_per_second

    def _by_products(self, case: Case) -> float:
        return case.flops() / self.product_flops_per_second[case.dtype]


def _copy(size: int, effort: Effort, *, in_place: bool) -> Contender:
    x = jnp.zeros(size // 4, jnp.float32)
    return compiled("pass" if in_place else "copy", lambda x: x + 1, x, effort=effort, donate=in_place)


def _product(rows: int, contracted: int, columns: int, dtype: str, effort: Effort) -> Contender:
    a, b = jnp.ones((rows, contracted), dtype), jnp.ones((contracted, columns), dtype)
    return compiled(f"{rows}x{contracted}x{columns} {dtype}", lambda a, b: a @ b, a, b, effort=effort)


def measure_limits(dtypes: set[str], effort: Effort) -> Limits:
    scale = 1 if effort is FULL else 4
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    size, shapes = COPY_BYTES[kind] // scale, PRODUCT_SIZES[kind]
    copies = [_copy(size, effort, in_place=in_place) for in_place in (False, True)]
    with jax.default_matmul_precision("highest"):  # of float32; it says nothing about narrower types
        products = {
            dtype: {2 * n * d * v // scale: _product(n // scale, d, v, dtype, effort) for n, d, v in shapes}
            for dtype in dtypes
        }
    contenders = [*copies, *(c for by_flops in products.values() for c in by_flops.values())]
    best = {name: min(samples) / 1e3 for name, samples in measure(contenders, effort).items()}
    rates = {d: max(flops / best[c.name] for flops, c in by.items()) for d, by in products.items()}
    jax.clear_caches()
    return Limits(2 * size / best["copy"], 2 * size / best["pass"], rates)
