"""What a linear loss holds in an accelerator's memory in addition to arguments and results."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxent._engine.devices import Device
from jaxent._engine.roofline import Work, recomputes_dz, writes_exponentials

LANES = 128  # of a TPU's tiles
# How compilers were found to decide: 45 MiB of a v5p's 64 go through its vector memory and 48 do not, 90 of a v6e's 128
# do and 96 do not; a TPU7x copies a kernel for 8 chunks, and not for 9.
VECTOR_SHARE = 0.72
MOST_CHUNKS_COPIED = 8


class Sizes(NamedTuple):
    """Of one device's `hidden (rows, features)` and `kernel (features, classes)`."""

    rows: int
    features: int
    classes: int
    dtype: np.dtype
    """Of the hidden states, and of the operands of all products."""
    kernel_dtype: np.dtype


def held_bytes(sizes: Sizes, chunk_rows: int, work: Work, device: Device | None, *, split_classes: bool = False) -> int:
    """The sum of what is held at once, less what is held where a result will be.

    A gradient that is added up in float32 and rounded at the end leaves the memory of its result free until then; XLA
    keeps the largest array there that fits, unless the result has another layout. A TPU's compiler also makes use of
    where the gradient of the hidden states will be, once its rows are in order again.
    """
    narrow, wide = sizes.dtype.itemsize, max(4, sizes.dtype.itemsize)
    chunk, kernel, rows = (
        n * m
        for n, m in (
            (chunk_rows, sizes.classes),
            (sizes.features, sizes.classes),
            (sizes.rows, sizes.features),
        )
    )
    held = {f"logits of head {i}": wide * chunk for i in range(work.heads)}
    if writes_exponentials(device, work):
        held |= {f"exponentials of head {i}": wide * chunk for i in range(work.heads)} | {"mask": chunk}
    tpu = device if device is not None and device.is_tpu else None
    other_layout = tpu is not None and tpu.has_other_layout and not _lies_transposed(sizes)
    recomputes = recomputes_dz(device, chunk_rows, sizes.features, sizes.classes, work.heads)
    in_chunks = chunk_rows < sizes.rows
    rooms = {"kernel": 0, "rows": 0}
    hidden_fits = False
    if sizes.kernel_dtype.itemsize > narrow:
        held["cast kernel"] = narrow * work.heads * kernel
    if work.backward:
        if narrow < wide and not recomputes:
            held["gradient of the logits"] = narrow * chunk
        if in_chunks:
            if sizes.kernel_dtype.itemsize < wide:  # else the sum is the result
                held["sum of the kernel's gradient"] = wide * kernel
                rooms["kernel"] = sizes.kernel_dtype.itemsize * kernel
            if tpu is None:
                held["gradient of the hidden states"] = wide * rows
            elif work.drops_rows and rooms["kernel"] and narrow * rows <= VECTOR_SHARE * tpu.vector_bytes:
                pass  # it is where the result will be, and leaves while the kernel's gradient is rounded
            elif work.drops_rows or tpu.has_other_layout:  # else it is where the result will be
                held["gradient of the hidden states"] = narrow * rows
                rooms["rows"] = narrow * rows if work.drops_rows else 0
            # The larger gradient is finished first, unless that of the logits is recomputed.
            hidden_fits = tpu is None or recomputes or rows >= kernel
        if split_classes:
            # That of a chunk, and its sum over devices.
            held["gradient of a chunk's hidden states"] = 2 * wide * chunk_rows * sizes.features
    if "cast kernel" not in held:
        if other_layout and _is_copied(sizes.rows, chunk_rows, work):  # else a cast writes it so from the start
            held["kernel in another layout"] = narrow * kernel
    elif tpu is not None and work.heads == 1 and "gradient of the logits" not in held:
        _keep(held, ("cast kernel",), int(tpu.keeps_cast * tpu.vector_bytes))
    if not other_layout:
        barred = set() if hidden_fits else {"gradient of the hidden states"}
        _keep(held, held.keys() - barred, rooms["kernel"])
    held.pop("mask", None)  # else it is where the gradient of the logits will be
    _keep(held, ("logits of head 0", "gradient of the logits", "cast kernel"), rooms["rows"])
    return sum(held.values())


def _lies_transposed(sizes: Sizes) -> bool:
    """Whether a TPU stores the kernel, and its gradient, by classes: where that needs no padding and the other does."""
    return sizes.classes % LANES != 0 and sizes.features % LANES == 0


def _is_copied(rows: int, chunk_rows: int, work: Work) -> bool:
    """Whether the compiler of a TPU with another layout of kernels copies one first: if it is in one product only, or
    in a loop of few chunks.
    """
    chunks = -(-rows // chunk_rows)
    return work.heads > 1 or not work.backward or 1 < chunks <= MOST_CHUNKS_COPIED


def _keep(held: dict[str, int], names: Iterable[str], room: int) -> None:
    """Takes out the largest of some arrays for which there is room."""
    fitting = [name for name in names if held.get(name, room + 1) <= room]
    if fitting:
        del held[max(fitting, key=held.__getitem__)]


def temporaries(memory: Any, on_tpu: bool) -> int:
    """Of XLA's analysis of a program: what it holds in addition to arguments and results.

    What libtpu calls so counts twice what a step of a loop holds. Its peak is what has to fit the device.
    """
    if not on_tpu:
        return memory.temp_size_in_bytes
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.peak_memory_in_bytes - given
