"""What a linear loss holds in an accelerator's memory in addition to arguments and results."""

from typing import NamedTuple

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
    keeps the largest array there that fits.
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
    room = 0
    if sizes.kernel_dtype.itemsize > narrow:
        held["cast kernel"] = narrow * work.heads * kernel
    if work.backward:
        written = narrow < wide and not recomputes_dz(device, chunk_rows, sizes.features)
        if written:
            held["gradient of the logits"] = narrow * chunk
        if chunk_rows < sizes.rows:
            held["gradient of the hidden states"] = (narrow if on_tpu else wide) * rows
            if sizes.kernel_dtype.itemsize < wide:  # else the sum is the result
                held["sum of the kernel's gradient"] = wide * kernel
                room = sizes.kernel_dtype.itemsize * kernel
                if on_tpu and (written or held["logits"] > room):  # its compiler then holds the result apart
                    held["kernel's gradient, rounded"] = room
                    # That of a TPU7x, at its default rows, has the gradient of the logits there in the meantime.
                    room = 0 if recomputing else held.get("gradient of the logits", 0)
            elif on_tpu:
                held["gradient of the hidden states, as a result"] = narrow * rows
    return sum(held.values()) - max((n for n in held.values() if n <= room), default=0)
