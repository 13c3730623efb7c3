"""The predicted time of a loss on a device, against what was read from compiled programs, and the rows that suit it."""

import contextlib
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent
from jaxent._engine.chunking import chunking_of, default_chunk_rows
from jaxent._engine.devices import DEVICES, Target, device_named, target_of
from jaxent._engine.roofline import Milliseconds, Roofline, chunk_rows_for, roofline

LLAMA = (32768, 4096, 128256)


def time(found: Roofline) -> Milliseconds:
    assert found.milliseconds is not None
    return found.milliseconds


# Milliseconds and GB, each kernel at the larger of its work at 0.8 of the peak and its traffic, as the suite `compiled`
# reads them from the programs at 2048 rows.
@pytest.mark.parametrize(
    ("name", "milliseconds", "gigabytes"),
    [("h100", 144.9, 181.8), ("v5e", 682.4, 174.5), ("v5p", 289.8, 174.5), ("v6e", 158.7, 174.5)],
)
def test_as_the_compiled_programs(name: str, milliseconds: float, gigabytes: float):
    found = roofline(DEVICES[name], *LLAMA, 2048, jnp.bfloat16, efficiency=0.8)
    assert time(found) == pytest.approx(milliseconds, rel=0.02)
    assert found.bytes_moved == pytest.approx(gigabytes * 1e9, rel=0.03)
    assert time(found).products == pytest.approx(
        1e3 * 6 * 32768 * 4096 * 128256 / (0.8 * DEVICES[name].product_rate("bfloat16"))
    )


@pytest.mark.parametrize("name", DEVICES)
def test_the_kernels_gradient_is_a_small_share_unless_memory_forbids(name: str):
    device = DEVICES[name]
    rows, _ = chunk_rows_for(device, 4096, 128256, jnp.bfloat16)
    traffic = 8 * 4096 * 128256 / device.bytes_per_second
    products = 6 * rows * 4096 * 128256 / device.product_rate(jnp.bfloat16)
    held = rows * 128256 * (4 if device.recomputes_dz is not None else 6)
    assert held <= device.memory_bytes / 16
    if device.is_tpu:  # or as many as its compiler does best with
        assert rows <= (2592 if name == "v6e" else 2048)
    else:
        assert traffic / products < 0.0502 or held > 0.99 * device.memory_bytes / 16
    assert rows % 16 == 0


def test_collectives_are_the_formulas_of_the_benchmarks():
    device, mesh = DEVICES["v5p"], (128, 8)
    found = roofline(device, 2**22, 8192, 262144, 8192, jnp.bfloat16, mesh=mesh)
    assert time(found).collectives == pytest.approx(1e3 * (1.88e9 + 2.13e9) / device.link_bytes_per_second, rel=3e-3)
    assert time(roofline(device, 2**12, 8192, 262144, 4096, jnp.bfloat16)).collectives == 0


def test_one_chunk_adds_nothing_up():
    one = roofline(DEVICES["h100"], 2048, 4096, 128256, 2048, jnp.bfloat16)
    two = roofline(DEVICES["h100"], 2048, 4096, 128256, 1024, jnp.bfloat16)
    assert time(one).kernel_gradient < time(two).kernel_gradient
    assert one.bytes_moved < two.bytes_moved
    assert time(one).products == pytest.approx(time(two).products)


@pytest.mark.parametrize(
    ("name", "rows"), [("h100", 6560), ("a100", 3648), ("h200", 5472), ("v5p", 2048), ("v6e", 2528)]
)
def test_chunks_are_those_of_the_device(name: str, rows: int):
    """Of equal size, aligned, and no larger than what suits the device."""
    default = default_chunk_rows(Target(False, DEVICES[name]), 4096, 128256, jnp.bfloat16)
    chunking = chunking_of(32768, None, default)
    assert chunking.chunk_rows <= default.rows
    assert chunking.chunk_rows % 16 == 0
    assert chunking.chunk_rows == rows


def test_devices_are_known_by_what_jax_calls_them():
    kinds = {
        "NVIDIA H100 80GB HBM3": "h100",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "tpu7x",
    }
    for kind, name in kinds.items():
        assert device_named(kind) is DEVICES[name]
    assert device_named("NVIDIA GeForce RTX 4090") is None


def test_chunks_of_a_cpu_and_of_an_unknown_device():
    assert default_chunk_rows(Target(True, None), 512, 32768, jnp.float32) == (1024, 1, False, 0)
    assert default_chunk_rows(Target(False, None), 512, 32768, jnp.float32) == (8192, 1, False, 0)
    assert target_of() == (True, None)


EXPORTED = {"TPU v5": ("tpu", "tpu", "v5p"), "NVIDIA A100-SXM4-80GB": ("gpu", "cuda", "a100")}


@pytest.mark.parametrize("given", ["shardings", "context"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_a_program_that_is_exported_has_the_chunks_of_its_mesh(kind: str, given: str):
    """Of its `platforms` nothing is known while it is traced: without a mesh the chunks are those of this device."""
    platform, exported_as, name = EXPORTED[kind]
    n, d, v = 16384, 512, 32768
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    like = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()) if given == "shardings" else None)
    head = like((n, d), jnp.bfloat16), like((d, v), jnp.bfloat16), like((n,), jnp.int32)

    def chunks(platform: str) -> set[int]:
        # A function of its own: a traced one is known again, whatever mesh is set.
        loss = jax.jit(lambda *head: jaxent.linear_softmax_cross_entropy(*head))
        text = jax.export.export(loss, platforms=[platform])(*head).mlir_module()
        return {int(rows) for rows in re.findall(rf"tensor<(\d+)x{v}xf32>", text)}

    with contextlib.nullcontext() if given == "shardings" else jax.sharding.use_abstract_mesh(mesh):
        rows = jaxent.plan(n, d, v, dtype="bfloat16", device=name).chunk_rows
        assert rows in chunks(exported_as)
    own = jaxent.plan(n, d, v, dtype="bfloat16").chunk_rows
    assert own != rows
    if given == "context":
        assert own in chunks(exported_as)
