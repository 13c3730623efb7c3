"""Compilers of accelerators that are not here: libtpu's and NVIDIA's run on any CPU.

Each is a Python package. Who has none of them is told how to install it, and nothing else changes.
"""

import dataclasses
import functools
import importlib.metadata
import os

import jax
from jax.experimental import topologies

from jaxent._engine.devices import DEVICES, Device

PACKAGES = {"cuda": "jax-cuda12-pjrt", "tpu": "libtpu"}
EXTRAS = {"cuda": "cuda12-local", "tpu": "tpu"}

# How libtpu learns on a machine without a TPU that it need not ask for one.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
}


@dataclasses.dataclass(frozen=True)
class Multiprocessors:
    """What NVIDIA's compiler asks of a card beyond its rates, from the same data sheets and from the CUDA C++
    Programming Guide's table of compute capabilities.
    """

    count: int
    compute_capability: tuple[int, int]
    l2_bytes: int
    clock_ghz: float
    shared_bytes: int
    shared_bytes_of_block: int


_GPUS = {
    "a100": Multiprocessors(108, (8, 0), 40 * 2**20, 1.41, 164 * 2**10, 163 * 2**10),
    "h100": Multiprocessors(132, (9, 0), 50 * 2**20, 1.98, 228 * 2**10, 227 * 2**10),
    "h200": Multiprocessors(132, (9, 0), 50 * 2**20, 1.98, 228 * 2**10, 227 * 2**10),
    "b200": Multiprocessors(148, (10, 0), 126 * 2**20, 1.965, 228 * 2**10, 227 * 2**10),
}
_TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
POD = {"v5p": "v5p:8x8x16"}  # 1,024 chips

DEFAULT_TARGETS = ("h100", "b200", "v5e", "v5p", "v6e", "tpu7x")
TARGETS = tuple(name for name in DEVICES if name in _GPUS or name in _TPUS)


def platform_of(target: str) -> str:
    return "cuda" if target in _GPUS else "tpu"


def absent(platform: str) -> str | None:
    """How to install a compiler; None if it is there."""
    try:
        importlib.metadata.version(PACKAGES[platform])
    except importlib.metadata.PackageNotFoundError:
        # Of the installed jax's own version; `cuda12-local` is without the CUDA libraries, which only run programs.
        return f'python -m pip install "jax[{EXTRAS[platform]}]=={jax.__version__}"'
    return None


def compiler(platform: str) -> str:
    """Name and version of an installed compiler."""
    package = PACKAGES[platform]
    return f"{package} {importlib.metadata.version(package)}"


@functools.cache
def topology(target: str, pod: bool = False, gpus: int = 1) -> topologies.TopologyDescription:
    """Devices to compile for; they cannot run anything. JAX must not have looked for devices like these before."""
    if platform_of(target) == "tpu":
        for name, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        return topologies.get_topology_desc(POD[target] if pod else _TPUS[target], "tpu")
    text = _configuration(DEVICES[target], _GPUS[target])
    return topologies.get_topology_desc("", "cuda", target_config=text, topology=f"1x1x{gpus}")


def _configuration(device: Device, gpu: Multiprocessors) -> str:
    """XLA's `GpuTargetConfigProto` in text form; what does not vary between these cards is written out."""
    major, minor = gpu.compute_capability
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared_bytes}
      shared_memory_per_block_optin: {gpu.shared_bytes_of_block}
      core_count: {gpu.count} fpus_per_core: {64 if major == 8 and minor == 0 else 128}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(device.bytes_per_second)}
      l2_cache_size: {gpu.l2_bytes}
      clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {device.memory_bytes}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    device_description_str: "{device.kinds[0]}"
    """
