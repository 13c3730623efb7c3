"""The least time that a loss and its gradient take on a device, and the rows at a time that suit it."""

from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxent._engine.devices import Device

DW_SHARE = 0.05  # heuristic: what reading and writing the kernel's gradient in every chunk may add to the products
MEMORY_SHARE = 1 / 16  # heuristic: of the device's memory, for a chunk of logits
# A TPU's compiler computes the gradient of the logits inside the products that need it if there are many features for
# the rows of a chunk, and no fewer than some number: 1024 are too few, 1536 enough. Else it writes it out: at Llama-3's
# head 2048 rows reach 97% of a v5p's products, 4096 rows 94%. With more than 2048 rows there logits no longer fit where
# the rounded gradient of the kernel will be, which adds as much to the temporaries. Registers hold 16 rows of bfloat16.
LEAST_FEATURES_RECOMPUTED = 1280
TPU_ROWS = 2048
EFFICIENCY = 0.8  # of a device's stated peak, that large products reach: an H200 measures 790 of 989 TFLOP/s
SPARE_ROWS = 9 / 8  # heuristic
ROWS_ALIGNED = 16


class Work(NamedTuple):
    """What a function does to each chunk's logits."""

    logits: int
    """Products that give logits."""
    backward: int
    """Products of the gradient: 2, or 0 without one."""
    sums: int = 1
    """Passes that read the logits for sums over classes."""
    spared_on_tpu: int = 0
    """Of these, those that its compiler makes part of a product."""
    heads: int = 1
    """Blocks of logits that are held at a time."""
    drops_rows: bool = True
    """Whether rows may not count, as by `ignore_index`, so that those that do are taken first and put back after."""

    @property
    def products(self) -> int:
        return self.logits + self.backward


LOSS = Work(1, 2)


def recomputes_dz(device: Device | None, chunk_rows: float, features: int, num_classes: float, heads: int = 1) -> bool:
    """Whether the gradient of the logits is computed in the products that need it, and never written.

    One that needs the logits of two heads is written.
    """
    if device is None or device.recomputes_dz is None or heads > 1:
        return False
    many = features >= max(LEAST_FEATURES_RECOMPUTED, device.recomputes_dz * chunk_rows)
    return many or (device.recomputes_odd and num_classes % 128 != 0)


def writes_exponentials(device: Device | None, work: Work) -> bool:
    return device is not None and device.writes_exponentials and work.heads > 1


class Milliseconds(float):
    """The least time of a call, and its terms; each kernel takes the larger of its work and its traffic."""

    products: float
    """The work of the matrix products."""
    passes: float
    """Passes over the logits, and what the products wait for them."""
    kernel_gradient: float
    """What adding up the kernel's gradient takes beyond the work of its product, with its rounding."""
    collectives: float
    """Sums over devices, if nothing hides them."""

    def __new__(cls, **terms: float) -> "Milliseconds":
        found = super().__new__(cls, sum(terms.values()))
        vars(found).update(terms)
        return found

    @property
    def terms(self) -> dict[str, float]:
        return dict(vars(self))

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, float]]:
        return (), self.terms


class Roofline(NamedTuple):
    """Time, None without a device's rates, and the bytes that cross its memory bus."""

    milliseconds: Milliseconds | None
    bytes_moved: int


def roofline(
    device: Device | None,
    num_rows: int,
    features: int,
    num_classes: int,
    chunk_rows: int,
    dtype: DTypeLike,
    *,
    work: Work = LOSS,
    mesh: tuple[int, int] = (1, 1),
    efficiency: float = 1.0,
) -> Roofline:
    """Of a function of `hidden (num_rows, features)` and `kernel (features, num_classes)`.

    Sizes are those of all devices of a `data x vocab` mesh, `chunk_rows` those of one. `efficiency` is the share of the
    stated rate that products reach.
    """
    data, vocab = mesh
    rows, classes, d = num_rows / data, num_classes / vocab, features
    chunks = max(1.0, rows / max(1, chunk_rows))
    own_rows = rows / chunks
    narrow = np.dtype(dtype).itemsize
    wide = max(4, narrow)
    logits, kernel, hidden = own_rows * classes, d * classes, own_rows * d
    on_tpu = device is not None and device.is_tpu
    recomputes = recomputes_dz(device, own_rows, d, classes, work.heads)
    dz = logits * (wide if recomputes else narrow)  # that each product of the gradient reads
    moved = {
        "logits": work.logits * (narrow * (hidden + kernel) + wide * logits),
        "sums": (work.sums - (work.spared_on_tpu if on_tpu else 0)) * wide * logits,
    }
    if writes_exponentials(device, work):
        # One block of each head and a mask are written, and read by most of the passes that follow.
        moved["sums"] += (9 * wide + 2) * logits
    around = spared = ordered = 0.0
    if work.backward:
        moved["dz"] = 0 if recomputes else (wide + narrow) * logits
        moved["hidden"] = dz + narrow * (kernel + hidden)
        moved["kernel"] = dz + narrow * hidden + (2 * wide if chunks > 1 else narrow) * kernel
        if chunks > 1:
            zeros = device is None or on_tpu  # else the first chunk writes what the others add to
            around = ((2 if zeros else 1) * wide + narrow) * kernel  # zeros before the loop, rounded after it
            spared = 0 if zeros else wide * kernel
            # Hidden states in the order in which they are taken, zeros for their gradient, and it in the rows' order.
            ordered = 5 * narrow * rows * d if work.drops_rows else 0
    bytes_moved = round(chunks * sum(moved.values()) + around - spared + ordered)
    if device is None:
        return Roofline(None, bytes_moved)
    one = 2 * logits * d / (efficiency * device.product_rate(dtype))
    takes = {name: n / device.bytes_per_second for name, n in moved.items()}
    waits = max(0.0, takes["logits"] - work.logits * one)
    waits += max(0.0, takes["hidden"] - one) if work.backward else 0
    adds = max(0.0, takes["kernel"] - one) if work.backward else 0
    over_vocab = 2 * (1 - 1 / vocab) * wide * rows * (d + 3)
    over_data = 2 * (1 - 1 / data) * wide * kernel
    time = Milliseconds(
        products=1e3 * work.products * chunks * one,
        passes=1e3 * (chunks * (takes["sums"] + takes.get("dz", 0.0) + waits) + ordered / device.bytes_per_second),
        kernel_gradient=1e3 * (chunks * adds + around / device.bytes_per_second),
        collectives=1e3 * (over_vocab + over_data) / device.link_bytes_per_second,
    )
    return Roofline(time, bytes_moved)


class DenseRoofline(NamedTuple):
    milliseconds: Milliseconds | None
    bytes_moved: int
    temp_bytes: int


def dense_roofline(
    device: Device | None, num_rows: int, features: int, num_classes: int, dtype: DTypeLike, *, efficiency: float = 1.0
) -> DenseRoofline:
    """Of `hidden @ kernel`, optax's loss of it and both gradients, as accelerators' compilers make them.

    Logits in the operands' dtype are written twice and read five times (a TPU's compiler reads four times), and float32
    ones, if these are others, written once and read once: see the suite `compiled`.
    """
    ours = roofline(device, num_rows, features, num_classes, num_rows, dtype, efficiency=efficiency)
    recomputed = recomputes_dz(device, num_rows, features, num_classes)
    narrow = np.dtype(dtype).itemsize
    wide, logits = max(4, narrow), num_rows * num_classes
    on_tpu = device is not None and device.is_tpu
    passed = (6 if on_tpu else 7) * narrow + (0 if narrow == wide else wide if on_tpu else 2 * wide)
    mine = 4 * wide if recomputed else 3 * wide + 3 * narrow  # what `roofline` counts
    more = logits * (passed - mine)
    moved, temp_bytes = ours.bytes_moved + more, logits * (wide + (narrow if narrow < wide else 0))
    if device is None or ours.milliseconds is None:
        return DenseRoofline(None, moved, temp_bytes)
    terms = ours.milliseconds.terms
    terms["passes"] = max(0.0, terms["passes"] + 1e3 * more / device.bytes_per_second)
    return DenseRoofline(Milliseconds(**terms), moved, temp_bytes)


def chunk_rows_for(device: Device, features: int, num_classes: int, dtype: DTypeLike) -> tuple[int, int]:
    """Rows at a time: as many as keep the kernel's gradient within `DW_SHARE`, or as `MEMORY_SHARE` has room for.

    Each chunk reads and writes the kernel's gradient, 8 bytes for 6 floating-point operations per row: that takes
    `(4/3) (FLOP/s / bytes/s) / rows` of the products' time. float32 counts as fast as any precision makes it. The
    second number is how many rows a chunk should not fall below, 0 if it does not matter.
    """
    narrow = np.dtype(dtype).itemsize
    wide = max(4, narrow)
    enough = wide / 3 * device.product_rate(dtype, exact=False) / device.bytes_per_second / DW_SHARE
    held = num_classes * (wide + (0 if device.recomputes_dz is not None or narrow == wide else narrow))
    hidden = _rows_hiding_dw(device, features, dtype)
    most = max(TPU_ROWS, hidden) if device.is_tpu else enough
    rows = int(min(enough, most, MEMORY_SHARE * device.memory_bytes / held))
    rows = max(ROWS_ALIGNED, rows // ROWS_ALIGNED * ROWS_ALIGNED)
    return rows, min(rows, int(hidden / SPARE_ROWS))


def _rows_hiding_dw(device: Device, features: int, dtype: DTypeLike) -> float:
    """On a TPU that recomputes the gradient of the logits, so many rows that what the kernel's gradient moves takes no
    longer than its product, with a few to spare for chunks of equal size; 0 if `TPU_ROWS` are enough.

    For each class that product reads `4 R` bytes of logits and reads and writes `8 D` of the gradient, for `2 R D`
    operations.
    """
    if device.recomputes_dz is None:
        return 0
    by_work = 2 * features / (EFFICIENCY * device.product_rate(dtype, exact=False))
    by_logits = 4 / device.bytes_per_second
    if by_work <= by_logits:
        return 0
    rows = 8 * features / device.bytes_per_second / (by_work - by_logits)
    return 0 if rows <= TPU_ROWS else min(SPARE_ROWS * rows, features / device.recomputes_dz)
