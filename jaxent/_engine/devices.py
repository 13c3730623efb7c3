"""What devices can do, from their makers' data sheets, and which of them a computation is for."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jaxent._mesh.types import mesh_of
from jaxent._typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them, at the rates that its maker states."""

    name: str
    kinds: tuple[str, ...]
    """What JAX calls it: starts of `device_kind`, in lower case."""
    flops_per_second: dict[str, float]
    """Of dense matrix products with operands of a dtype; float32 at the precision "highest"."""
    default_float32_flops_per_second: float
    """Of float32 at JAX's default precision: TF32 on NVIDIA's devices, bfloat16 on a TPU."""
    bytes_per_second: float
    memory_bytes: int
    link_bytes_per_second: float
    """What it sends to its neighbours in all, in one direction."""
    source: str
    is_tpu: bool
    recomputes_dz: float | None = None
    """From how many features per row of a chunk on its compiler computes the gradient of the logits inside the products
    that need it, and does not write it: found by compiling for it. None for never.
    """
    recomputes_odd: bool = False
    """Whether it always does so if the classes are no multiple of 128, where it has no estimate of the time."""
    vector_bytes: int = 0
    """Of a TPU's vector memory, as JAX states it for Pallas."""
    keeps_cast: float = 0.0
    """Up to which share of that its compiler keeps the cast of one kernel there, if no gradient of the logits is
    written: found by compiling for it.
    """
    has_other_layout: bool = False
    """Whether products of a TPU want a kernel in another layout than programs are given it."""
    writes_exponentials: bool = False
    """Whether its compiler writes the exponentials of two heads' logits, and where the largest is, where others compute
    them again: found by compiling for it.
    """

    def product_rate(self, dtype: DTypeLike, *, exact: bool = True) -> float:
        """FLOP/s of matrix products; `exact` as for float32 at the precision "highest"."""
        name = np.dtype(dtype).name
        if name == "float32" and not exact:
            return self.default_float32_flops_per_second
        return self.flops_per_second.get(name, self.flops_per_second["float32"])


def _nvidia(
    name: str,
    kinds: tuple[str, ...],
    bf16: float,
    f32: float,
    gbytes: float,
    gib: int,
    link: float,
    source: str,
    writes_exponentials: bool = False,
) -> Device:
    rates = {"bfloat16": bf16 * 1e12, "float16": bf16 * 1e12, "float32": f32 * 1e12}
    figures = bf16 / 2 * 1e12, gbytes * 1e9, gib * 2**30, link * 1e9
    return Device(name, kinds, rates, *figures, f"NVIDIA, {source}", False, writes_exponentials=writes_exponentials)


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    bf16: float,
    gbytes: float,
    gib: int,
    link: float,
    source: str,
    vector_mib: int,
    recomputes_dz: float,
    keeps_cast: float,
    *,
    recomputes_odd: bool = False,
    has_other_layout: bool = False,
) -> Device:
    # A product of float32 is six of bfloat16; float16 is not a dtype of the matrix unit and counts as float32.
    rates = {"bfloat16": bf16 * 1e12, "float32": bf16 * 1e12 / 6}
    source = f"Google Cloud, page {source}"
    figures = bf16 * 1e12, gbytes * 1e9, gib * 2**30, link * 1e9
    found = recomputes_dz, recomputes_odd, vector_mib * 2**20, keeps_cast, has_other_layout
    return Device(name, kinds, rates, *figures, source, True, *found)


# TFLOP/s without sparsity, GB/s, GiB, GB/s of links in one direction: makers state links in both directions together.
# Of a TPU also the MiB of its vector memory, `recomputes_dz` and `keeps_cast`.
# JAX counts each half of a TPU7x chip, with half of the page's figures. For a v6e the pages "TPU v6e" and "TPU7x
# (Ironwood)" state 1638 GB/s, earlier versions of the first 1640 and 1600.
DEVICES = {
    device.name: device
    for device in (
        _nvidia("a100", ("nvidia a100-sxm4-80gb",), 312, 19.5, 2039, 80, 300, "A100 80GB data sheet (SXM)"),
        _nvidia("h100", ("nvidia h100 80gb",), 989.4, 66.9, 3352, 80, 450, "H100 data sheet (SXM)"),
        _nvidia("h200", ("nvidia h200",), 989.4, 66.9, 4800, 141, 450, "H200 data sheet (SXM)"),
        _nvidia("b200", ("nvidia b200",), 2250, 75, 7700, 180, 900, "HGX B200 data sheet; GB/s unverified", True),
        _tpu("v5e", ("tpu v5 lite", "tpu v5e"), 197, 819, 16, 200, "TPU v5e", 128, 0.9, 0.7, recomputes_odd=True),
        _tpu("v5p", ("tpu v5", "tpu v5p"), 459, 2765, 95, 600, "TPU v5p", 64, 1.9, 0.0),
        _tpu("v6e", ("tpu v6 lite", "tpu v6e"), 918, 1638, 32, 400, "TPU v6e", 128, 1.4, 0.54),
        _tpu("tpu7x", ("tpu7x",), 1153.5, 3690, 96, 300, "TPU7x (Ironwood)", 64, 2.75, 0.38, has_other_layout=True),
    )
}


@functools.cache
def device_named(name: str) -> Device | None:
    """By its name here or by JAX's `device_kind`; None for a device that is not in the table."""
    wanted = name.lower()
    matches = [(len(kind), d) for d in DEVICES.values() for kind in d.kinds if wanted.startswith(kind)]
    return DEVICES.get(wanted) or max(matches, key=lambda match: match[0], default=(0, None))[1]


def with_rates(device: Device | None, dtype: DTypeLike, flops_per_second: float, bytes_per_second: float) -> Device:
    """The device at rates that were measured for products of a dtype and for memory; None is any other one."""
    rates = {np.dtype(dtype).name: flops_per_second, "float32": flops_per_second}
    if device is not None:
        return dataclasses.replace(device, flops_per_second=rates, bytes_per_second=bytes_per_second)
    return Device(
        name="",
        kinds=(),
        flops_per_second=rates,
        default_float32_flops_per_second=flops_per_second,
        bytes_per_second=bytes_per_second,
        memory_bytes=0,
        link_bytes_per_second=bytes_per_second,
        source="measured",
        is_tpu=False,
    )


class Target(NamedTuple):
    """What a computation is for."""

    on_cpu: bool
    device: Device | None
    """None if it is not in the table."""


def target_of(*arrays: jax.Array) -> Target:
    """The devices of the mesh that arrays are typed with; see `target_on`."""
    return target_on(mesh_of(*arrays))


def target_on(mesh: AbstractMesh) -> Target:
    """The devices of a mesh or, without one, of the mesh that is set, which need not be here; else this process's own.

    A mesh also tells what a program is compiled or exported for ahead of time. The `platforms` of `jax.export` and a
    sharding that names one device do not: nothing says them while a program is traced.
    """
    device = mesh.abstract_device or jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return Target(device.platform == "cpu", device_named(device.device_kind))
