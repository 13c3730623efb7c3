"""The least time that a loss and its gradient take on a device, and the rows at a time that suit it."""

import dataclasses

import numpy as np
from jax.typing import DTypeLike

from jaxent._engine.devices import Device

DW_SHARE = 0.05  # heuristic: what reading and writing the kernel's gradient in every chunk may add to the products
MEMORY_SHARE = 1 / 16  # heuristic: of the device's memory, for a chunk of logits
# The TPU's compiler computes the gradient of the logits inside the products that need it up to some size, beyond which
# it writes it out: at Llama-3's head 2048 rows reach 97% of a v5p's products, 4096 rows 94%. Its registers hold 16 rows
# of bfloat16.
MOST_ROWS_RECOMPUTED = 2048
ROWS_ALIGNED = 16


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Milliseconds and bytes of one value and gradient; each kernel takes the larger of its work and its traffic."""

    products: float
    """The work of the matrix products."""
    passes: float
    """Passes over the logits, and what the products wait for them."""
    kernel_gradient: float
    """What adding up the kernel's gradient takes beyond the work of its product, with its zeros and its rounding."""
    collectives: float
    """Sums over devices, if nothing hides them."""
    bytes_moved: int
    """To and from one device's memory."""

    @property
    def milliseconds(self) -> float:
        return self.products + self.passes + self.kernel_gradient + self.collectives


def roofline(
    device: Device,
    num_rows: int,
    features: int,
    num_classes: int,
    chunk_rows: int,
    dtype: DTypeLike,
    *,
    mesh: tuple[int, int] = (1, 1),
    efficiency: float = 1.0,
) -> Roofline:
    """Of `linear_softmax_cross_entropy` with both gradients.

    Sizes are those of all devices of a `data x vocab` mesh, `chunk_rows` those of one. `efficiency` is the share of the
    stated rate that products reach.
    """
    data, vocab = mesh
    rows, classes, d = num_rows / data, num_classes / vocab, features
    chunks = max(1.0, rows / chunk_rows)
    narrow = np.dtype(dtype).itemsize
    wide = max(4, narrow)
    logits, kernel, hidden = chunk_rows * classes, d * classes, chunk_rows * d
    if chunks == 1:
        logits, hidden = rows * classes, rows * d
    work = 2 * logits * d / (efficiency * device.product_rate(dtype))
    dz = logits * (wide if device.recomputes_dz else narrow)  # that each product of the gradient reads
    moved = {
        "logits": narrow * (hidden + kernel) + wide * logits,
        "sums": wide * logits,
        "dz": 0 if device.recomputes_dz else (wide + narrow) * logits,
        "hidden": dz + narrow * (kernel + hidden),
        "kernel": dz + narrow * hidden + (2 * wide if chunks > 1 else narrow) * kernel,
    }
    takes = {name: bytes_moved / device.bytes_per_second for name, bytes_moved in moved.items()}
    around = (2 * wide + narrow) * kernel if chunks > 1 else 0  # zeros before the first chunk, rounded after the last
    waits = sum(max(0.0, takes[name] - work) for name in ("logits", "hidden"))
    over_vocab = 2 * (1 - 1 / vocab) * wide * rows * (d + 3)
    over_data = 2 * (1 - 1 / data) * wide * kernel
    return Roofline(
        products=1e3 * 3 * chunks * work,
        passes=1e3 * chunks * (takes["sums"] + takes["dz"] + waits),
        kernel_gradient=1e3 * (chunks * max(0.0, takes["kernel"] - work) + around / device.bytes_per_second),
        collectives=1e3 * (over_vocab + over_data) / device.link_bytes_per_second,
        bytes_moved=round(chunks * sum(moved.values()) + around),
    )


def chunk_rows_for(device: Device, num_classes: int, dtype: DTypeLike) -> int:
    """Rows at a time: as many as keep the kernel's gradient within `DW_SHARE`, or as `MEMORY_SHARE` has room for.

    Each chunk reads and writes the kernel's gradient, 8 bytes for 6 floating-point operations per row: that takes
    `(4/3) (FLOP/s / bytes/s) / rows` of the products' time. float32 counts as fast as any precision makes it.
    """
    narrow = np.dtype(dtype).itemsize
    wide = max(4, narrow)
    enough = wide / 3 * device.product_rate(dtype, exact=False) / device.bytes_per_second / DW_SHARE
    held = num_classes * (wide + (0 if device.recomputes_dz or narrow == wide else narrow))
    most = MOST_ROWS_RECOMPUTED if device.recomputes_dz else enough
    rows = int(min(enough, most, MEMORY_SHARE * device.memory_bytes / held))
    return max(ROWS_ALIGNED, rows // ROWS_ALIGNED * ROWS_ALIGNED)
