"""What a linear loss holds in an accelerator's memory in addition to arguments and results."""

from typing import Any, NamedTuple

import numpy as np

from jaxent._engine.devices import Device
from jaxent._engine.roofline import Work, recomputes_dz


class Sizes(NamedTuple):
    """Of one device's `hidden (rows, features)` and `kernel (features, classes)`."""

    rows: int
    features: int
    classes: int
    dtype: np.dtype
    """Of the hidden states, and of the operands of all products."""
    kernel_dtype: np.dtype


def held_bytes(sizes: Sizes, chunk_rows: int, work: Work, device: Device | None) -> int:
    """The sum of what is held at once, less what is held where a result will be.

    A gradient that is added up in float32 and rounded at the end leaves the memory of its result free until then; XLA
    keeps the largest array there that fits. A TPU's compiler also keeps one of a chunk's arrays where the gradient of
    the hidden states will be, in the order of the rows; that of a TPU7x does neither.
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
    held = {"logits": wide * work.heads * chunk}
    on_tpu, recomputing = (False, False) if device is None else (device.is_tpu, device.recomputes_dz)
    rooms = {"kernel": 0, "rows": 0}
    if sizes.kernel_dtype.itemsize > narrow:
        held["cast kernel"] = narrow * work.heads * kernel
    if work.backward:
        if narrow < wide and not recomputes_dz(device, chunk_rows, sizes.features):
            held["gradient of the logits"] = narrow * chunk
        if chunk_rows < sizes.rows:
            held["gradient of the hidden states"] = (narrow if on_tpu else wide) * rows
            if sizes.kernel_dtype.itemsize < wide:  # else the sum is the result
                held["sum of the kernel's gradient"] = wide * kernel
                rooms["kernel"] = sizes.kernel_dtype.itemsize * kernel
            rooms["rows"] = narrow * rows if on_tpu else 0
    if not on_tpu or recomputing:
        _keep(held, tuple(held), rooms["kernel"])
        _keep(held, ("logits", "gradient of the logits"), rooms["rows"])
    return sum(held.values())


def _keep(held: dict[str, int], names: tuple[str, ...], room: int) -> None:
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
