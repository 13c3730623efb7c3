"""What a linear loss holds in an accelerator's memory beside arguments and results."""

from typing import NamedTuple

import numpy as np

from jaxent._engine.roofline import Work


class Sizes(NamedTuple):
    """Of one device's `hidden (rows, features)` and `kernel (features, classes)`."""

    rows: int
    features: int
    classes: int
    dtype: np.dtype
    """Of the hidden states, and of the operands of all products."""
    kernel_dtype: np.dtype


def held_bytes(sizes: Sizes, chunk_rows: int, work: Work, recomputes_dz: bool) -> int:
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
    room = 0
    if sizes.kernel_dtype.itemsize > narrow:
        held["cast kernel"] = narrow * kernel
    if work.backward:
        if narrow < wide and not recomputes_dz:
            held["gradient of the logits"] = narrow * chunk
        if chunk_rows < sizes.rows:
            held["gradient of the hidden states"] = (narrow if recomputes_dz else wide) * rows
            if sizes.kernel_dtype.itemsize < wide:  # else the sum is the result
                held["sum of the kernel's gradient"] = wide * kernel
                room = sizes.kernel_dtype.itemsize * kernel
    return sum(held.values()) - max((n for n in held.values() if n <= room), default=0)
