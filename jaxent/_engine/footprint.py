"""What a linear loss holds in an accelerator's memory in addition to arguments and results."""

from typing import Any, NamedTuple

import numpy as np

from jaxent._engine.devices import Device
from jaxent._engine.roofline import Work, recomputes_dz, writes_exponentials


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
    keeps the largest array there that fits. A TPU's compiler also keeps one of a chunk's arrays where the gradient of
    the hidden states will be, once its rows are in order again; that of a TPU7x does neither.
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
    on_tpu = device is not None and device.is_tpu
    is_tpu7x = device is not None and device.is_tpu and device.recomputes_dz is None
    rooms = {"kernel": 0, "rows": 0}
    if sizes.kernel_dtype.itemsize > narrow:
        held["cast kernel"] = narrow * work.heads * kernel
    if work.backward:
        if narrow < wide and not recomputes_dz(device, chunk_rows, sizes.features, sizes.classes, work.heads):
            held["gradient of the logits"] = narrow * chunk
        if chunk_rows < sizes.rows:
            if not on_tpu or is_tpu7x or work.drops_rows:  # else it is where the result will be
                held["gradient of the hidden states"] = (narrow if on_tpu else wide) * rows
            if sizes.kernel_dtype.itemsize < wide:  # else the sum is the result
                held["sum of the kernel's gradient"] = wide * kernel
                rooms["kernel"] = sizes.kernel_dtype.itemsize * kernel
            rooms["rows"] = narrow * rows if on_tpu and work.drops_rows else 0
        if split_classes:
            # That of a chunk, and its sum over devices.
            held["gradient of a chunk's hidden states"] = 2 * wide * chunk_rows * sizes.features
    # If the kernel is in no other product than that of the logits; a cast writes it so from the start.
    if is_tpu7x and (work.heads > 1 or not work.backward) and "cast kernel" not in held:
        held["kernel in another layout"] = narrow * kernel
    if not is_tpu7x:
        _keep(held, tuple(held), rooms["kernel"])
        held.pop("mask", None)  # else it is where the gradient of the logits will be
        _keep(held, ("logits of head 0", "gradient of the logits"), rooms["rows"])
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
