"""`jaxent plan`: what a loss from hidden states takes, next to dense code and to other numbers of rows at a time."""

import argparse
from typing import Any

from jaxent._engine.devices import device_named, with_rates
from jaxent._engine.roofline import Milliseconds, dense_roofline
from jaxent.cli.devices import available
from jaxent.cli.errors import CommandError
from jaxent.cli.output import print_columns, print_json, say
from jaxent.costs import Plan, plan

AROUND = (0.25, 0.5, 1, 2, 4)  # chunk sizes that are shown, in units of the chosen one


def show(options: argparse.Namespace) -> None:
    if (options.flops_per_second is None) != (options.bytes_per_second is None):
        raise CommandError("a time follows from --flops-per-second and --bytes-per-second together: give both")
    if options.device is None:
        available()
    chosen = _plan(options, options.chunk_rows)
    rows = {max(1, round(chosen.chunk_rows * share)) for share in AROUND}
    others = [_plan(options, n) for n in sorted(n for n in rows if n <= options.tokens and n != chosen.chunk_rows)]
    plans = sorted([chosen, *others], key=lambda found: found.chunk_rows)
    table = [_dense(options), *(_line(found) for found in plans)]
    if options.json:
        print_json(
            {
                "device": chosen.device,
                "note": chosen.note,
                "tokens": options.tokens,
                "features": options.features,
                "classes": options.classes,
                "dtype": options.dtype,
                "kernel_dtype": options.kernel_dtype or options.dtype,
                "matrix_products": chosen.matrix_products,
                "multiply_adds": chosen.multiply_adds,
                "chunk_rows": chosen.chunk_rows,
                "rows_at_a_time": table,
            }
        )
        return
    print(
        f"{options.tokens:,} tokens, {options.features:,} features, {options.classes:,} classes in {options.dtype} on "
        f"{chosen.device}: value and gradient, {chosen.matrix_products} matrix products"
    )
    print_columns([_shown(line, chosen) for line in table])
    if chosen.note:
        say(f"jaxent: {chosen.note}")


def _plan(options: argparse.Namespace, chunk_rows: int | None) -> Plan:
    return plan(
        options.tokens,
        options.features,
        options.classes,
        dtype=options.dtype,
        kernel_dtype=options.kernel_dtype,
        device=options.device,
        chunk_rows=chunk_rows,
        flops_per_second=options.flops_per_second,
        bytes_per_second=options.bytes_per_second,
    )


def _line(found: Plan) -> dict[str, Any]:
    return _cells(found.chunk_rows, found.num_chunks, found.temp_bytes, found.bytes_moved, found.milliseconds)


def _dense(options: argparse.Namespace) -> dict[str, Any]:
    """Code that holds all logits, as XLA compiles it."""
    device = device_named(options.device or available()[0].device_kind)
    if options.flops_per_second is not None:
        device = with_rates(device, options.dtype, options.flops_per_second, options.bytes_per_second)
    found = dense_roofline(device, options.tokens, options.features, options.classes, options.dtype)
    return _cells(None, 1, found.temp_bytes, found.bytes_moved, found.milliseconds)


def _cells(
    chunk_rows: int | None, chunks: int, temp_bytes: int, bytes_moved: int, time: Milliseconds | None
) -> dict[str, Any]:
    """`chunk_rows` is None for dense code; `dW`: what the sum of the kernel's gradient adds."""
    terms = {} if time is None else time.terms
    return {
        "chunk_rows": chunk_rows,
        "chunks": chunks,
        "temp_MiB": round(temp_bytes / 2**20),
        "moved_GB": bytes_moved / 1e9,
        "ms": None if time is None else float(time),
        "products": terms.get("products"),
        "passes": terms.get("passes"),
        "dW": terms.get("kernel_gradient"),
    }


def _shown(line: dict[str, Any], chosen: Plan) -> dict[str, Any]:
    rows = line["chunk_rows"]
    name = "dense code" if rows is None else f"{rows:,}" + " (chosen)" * (rows == chosen.chunk_rows)
    return {n: "-" if value is None else value for n, value in line.items()} | {"chunk_rows": name}
