"""`jaxent check`: every loss, option and dtype on this device, against its definition in NumPy."""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxent import linear_loss
from jaxent._check.autodiff import FlatArguments, autodiff_gradients
from jaxent._check.finite_differences import Float64Reference, evaluate
from jaxent._check.gradient import DIFFERENCES, Comparison, Reference, compare, table
from jaxent.cli.check import plot as gap_plot
from jaxent.cli.check import second_order
from jaxent.cli.check.case import EVERY_DTYPE, Case
from jaxent.cli.check.cases import cases, second_order_cases
from jaxent.cli.check.compiler import RowSums, measure_row_sums
from jaxent.cli.devices import available
from jaxent.cli.errors import CommandError, require
from jaxent.cli.output import print_json, say

# In ulp. The CPU back end stays below 2, and 0.65 for gradients in half precision, which are rounded at the end, and
# once before for a matrix product; the rest is room for the exponentials of other devices.
VALUE_ULP, GRADIENT_ULP, HALF_ULP = 8.0, 8.0, 1.0

# Cases in one program: together they compile faster than alone, and a program compiles on few cores.
TOGETHER = 10
# A reference is evaluated once: optimising its code takes longer than running it as it is.
HURRIED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Result(NamedTuple):
    """One comparison of one loss with one option in one dtype."""

    loss: str
    option: str
    dtype: str
    comparison: Comparison


def check(losses: Sequence[str], dtypes: Sequence[str], *, plot: Path | None, as_json: bool, quiet: bool) -> int:
    """Prints what was measured; 1 if something is out of bounds."""
    if plot is not None:
        require("matplotlib")
        available()
        gap_plot.draw(plot)
        if not quiet:
            say(f"{plot} written")
        return 0
    chosen, device = _chosen(losses), available()[0]
    dtypes = dtypes or EVERY_DTYPE
    if not any(dtype in case.dtypes for case in chosen for dtype in dtypes):
        raise CommandError(f"none of these losses is checked in {', '.join(dtypes)}; float32 is always there")
    products, row_sums = measure_products(), measure_row_sums()
    show = not (as_json or quiet)
    if show:
        print(f"{device.platform}: {device.device_kind}, jax {jax.__version__}")
        print(*products.sentences(), sep="\n", end="\n\n", flush=True)
    results = run(chosen, dtypes, products, _curved(chosen, dtypes))
    places = {(case.loss, dtype): i for i, (case, dtype) in enumerate(itertools.product(chosen, dtypes))}
    results.sort(key=lambda r: places[r.loss, r.dtype])
    bad = [r for r in results if not r.comparison.ok]
    ok = products.ok and row_sums.ok and not bad
    if as_json:
        comparisons = [_as_json(r) for r in results]
        found = {"device": f"{device.platform}: {device.device_kind}", "jax": jax.__version__, "ok": ok}
        found |= {"float32_product_bits": products._asdict(), "compiler": _compiler_as_json(row_sums)}
        print_json({**found, "comparisons": comparisons})
    if show:
        print(*_lines(results), sep="\n", end="\n\n")
        count = len({(r.loss, r.option, r.dtype) for r in results})
        print(f"{count} losses, options and dtypes: {f'{len(bad)} OUT OF BOUNDS' if bad else 'all in bounds'}")
        for r in bad:
            c = r.comparison
            print(f"{r.loss}, {r.option}, {r.dtype}: {c.way} at {c.place} is {c.got:.9g}, and {c.want:.9g} is right")
        print(*row_sums.sentences(), sep="\n", end="\n" if row_sums.sentences() else "")
    return 0 if ok else 1


def _chosen(losses: Sequence[str]) -> list[Case]:
    every = list(cases())
    names = list(dict.fromkeys(case.loss for case in every))
    for loss in losses:
        if loss not in names:
            raise CommandError(f"no loss is called {loss}; there are {', '.join(names)}")
    return [case for case in every if not losses or case.loss in losses]


def run(
    chosen: Sequence[Case], dtypes: Sequence[str], products: "Products", curved: Sequence[Case] = ()
) -> list[Result]:
    """All comparisons, and those of the Hessian products of `curved`.

    One program holds several cases in a dtype, and compiles on a thread of its own.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # A thread takes these in order, so that none waits for a reference that has not begun.
        wides = [pool.submit(_wides, group) for group in _together(chosen)]
        jobs = [pool.submit(_second_order, case) for case in curved]
        for dtype in dtypes:
            kept = [(case, wides[i // TOGETHER], i % TOGETHER) for i, case in enumerate(chosen) if dtype in case.dtypes]
            jobs += [pool.submit(_compared, dtype, group, products) for group in _together(kept)]
        return [result for job in jobs for result in job.result()]


def _together(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[i : i + TOGETHER] for i in range(0, len(items), TOGETHER)]


def _curved(chosen: Sequence[Case], dtypes: Sequence[str]) -> list[Case]:
    """The cases of second order of the chosen losses, which are in float32."""
    names = {case.loss for case in chosen} if "float32" in dtypes else set()
    return [case for case in second_order_cases() if case.loss in names]


def _second_order(case: Case) -> list[Result]:
    return [Result(case.loss, f"Hessian, {case.option}", "float32", c) for c in second_order.compare(case)]


def _entries(case: Case, dtype: str) -> FlatArguments:
    return FlatArguments(case.function, tuple(jnp.asarray(x, dtype=dtype) for x in case.args), {})


def _wides(group: Sequence[Case]) -> list[Float64Reference]:
    with jax.enable_x64(True):
        options = HURRIED if jax.default_backend() == "cpu" else None
        return evaluate([_entries(case, "float64") for case in group], options)


def _compared(
    dtype: str, group: Sequence[tuple[Case, Future[list[Float64Reference]], int]], products: "Products"
) -> list[Result]:
    kept = [(case, wides.result()[i]) for case, wides, i in group]
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        problems = [(_entries(case, dtype), case.closed_form) for case, _ in kept]
        owns = autodiff_gradients(problems)
    results = []
    for (case, wide), (entries, _), own in zip(kept, problems, owns, strict=True):
        exact = case.exact()
        gradient, size = (entries.flat(list(x)) for x in (exact.gradients, exact.sizes))
        known, nothing = np.ones(entries.count, bool), np.zeros(entries.count)
        reference = Reference(float(exact.value), float(exact.value_size), gradient, known, size, nothing)
        # If the caller has asked for faster products, no more bits than theirs can be expected.
        loose = 2.0 ** (23 - products.linear_losses) if case.products and products.setting and dtype == "float32" else 1
        ulp = HALF_ULP if dtype in ("bfloat16", "float16") else GRADIENT_ULP * loose
        found = compare(entries, own, wide, reference, np.full(entries.count, ulp), VALUE_ULP * loose)
        results += [Result(case.loss, case.option, dtype, c) for c in found]
    return results


def _lines(results: Sequence[Result]) -> list[str]:
    """A line for each loss and dtype: the worst of all ways and options, by how much of its bound it takes."""
    lines = [("loss", "dtype", "options", "largest error in ulp", "allowed", "at", "differences", "")]
    for (loss, dtype), group in itertools.groupby(results, key=lambda r: (r.loss, r.dtype)):
        of = list(group)
        worst = max((r for r in of if r.comparison.way != DIFFERENCES), key=lambda r: r.comparison.share)
        c = worst.comparison
        differences = [r.comparison.ok for r in of if r.comparison.way == DIFFERENCES]
        agree = "-" if not differences else "agree" if all(differences) else "disagree"
        at = f"{worst.option}: {c.way if c.way == 'value' else f'{c.way} {c.place}'}"
        verdict = "" if all(r.comparison.ok for r in of) else "OUT OF BOUNDS"
        options = str(len({r.option for r in of}))
        lines.append((loss, dtype, options, f"{c.ulp:.2f}", f"{c.allowed:g}", at, agree, verdict))
    return table(lines)


def _compiler_as_json(row_sums: RowSums) -> dict[str, Any]:
    return {"row_sum_error": row_sums.error, "ok": row_sums.ok, "told": " ".join(row_sums.sentences())}


def _as_json(result: Result) -> dict[str, Any]:
    c = result.comparison
    numbers = {"got": c.got, "want": c.want, "ulp": c.ulp, "allowed": c.allowed}
    finite = {name: x if np.isfinite(x) else str(x) for name, x in numbers.items()}
    found = {"loss": result.loss, "option": result.option, "dtype": result.dtype, "way": c.way, "argument": c.argument}
    return {**found, "index": list(c.index), **finite, "ok": c.ok}


# ----------------------------------------------------------------------------------------------------------------------
# The precision of matrix products


class Products(NamedTuple):
    """How many of the 23 bits after a float32's first survive a matrix product."""

    setting: str | None
    """`jax.default_matmul_precision`."""
    plain: int
    """In `a @ b`."""
    linear_losses: int

    @property
    def ok(self) -> bool:
        """Whether the products have the bits that the setting promises; without one only the library promises."""
        asked_for_all = self.setting in ("highest", "float32")
        return (self.plain == 23 or not asked_for_all) and (self.linear_losses == 23 or bool(self.setting))

    def sentences(self) -> list[str]:
        setting = f"jax_default_matmul_precision is {self.setting or 'not set'}"
        lines = [
            f"float32 products run in {name_of(self.plain)} here: {self.plain} of 23 bits survive `a @ b` ({setting})",
            f"the products of the linear losses run in {name_of(self.linear_losses)}: {self.linear_losses} of 23 bits",
        ]
        return lines if self.ok else [*lines, "OUT OF BOUNDS: the products have fewer bits than were asked for"]


def name_of(bits: int) -> str:
    """The format with so many bits after the first; three bf16 passes keep about 16."""
    names = {23: "float32", 10: "TF32", 7: "bf16"}
    return names.get(bits, f"{'several bf16 passes' if 10 < bits < 23 else 'an unknown format'}")


def measure_products() -> Products:
    """Products of 1 + 2^-k and 1: exact in float32, and 1 where the operands are rounded to fewer bits."""
    config: Any = jax.config
    return Products(
        config.jax_default_matmul_precision, surviving_bits(jnp.matmul), surviving_bits(_through_linear_loss)
    )


def surviving_bits(product: Callable[[jax.Array, jax.Array], jax.Array]) -> int:
    """How many bits after the first come through, in both operands."""
    size = 128  # large enough for tensor cores
    powers = np.arange(1, 24)
    values = np.ones(size, np.float32)
    values[: len(powers)] += np.float32(2.0) ** -powers.astype(np.float32)
    numbers, ones = jnp.asarray(np.diag(values)), jnp.eye(size, dtype=jnp.float32)
    kept = len(powers)
    for a, b in ((numbers, ones), (ones, numbers)):
        exact = np.diagonal(np.asarray(jax.jit(product)(a, b)))[: len(powers)] == values[: len(powers)]
        kept = min(kept, len(powers) if exact.all() else int(np.argmin(exact)))
    return kept


def _through_linear_loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """The logits that the engine sees: the derivative of `sum c z` with respect to `c`."""

    def picked(c: jax.Array) -> jax.Array:
        return linear_loss(lambda logits, c: jnp.sum(c * logits, axis=-1), hidden, kernel, c, reduction="sum")

    return jax.grad(picked)(jnp.zeros((hidden.shape[0], kernel.shape[1])))
