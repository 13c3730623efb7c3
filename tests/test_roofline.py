"""The predicted time of a loss on a device, against what was read from compiled programs, and the rows that suit it."""

import jax.numpy as jnp
import pytest

from jaxent._engine.devices import DEVICES
from jaxent._engine.roofline import chunk_rows_for, roofline

LLAMA = (32768, 4096, 128256)


# Milliseconds and GB, each kernel at the larger of its work at 0.8 of the peak and its traffic, as the suite `compiled`
# reads them from the programs at 2048 rows.
@pytest.mark.parametrize(
    ("name", "milliseconds", "gigabytes"),
    [("h100", 145.5, 186.3), ("v5e", 682.4, 174.5), ("v5p", 289.8, 174.5), ("v6e", 158.7, 174.5)],
)
def test_as_the_compiled_programs(name: str, milliseconds: float, gigabytes: float):
    found = roofline(DEVICES[name], *LLAMA, 2048, jnp.bfloat16, efficiency=0.8)
    assert found.milliseconds == pytest.approx(milliseconds, rel=0.02)
    assert found.bytes_moved == pytest.approx(gigabytes * 1e9, rel=0.03)
    assert found.products == pytest.approx(
        1e3 * 6 * 32768 * 4096 * 128256 / (0.8 * DEVICES[name].product_rate("bfloat16"))
    )


@pytest.mark.parametrize("name", DEVICES)
def test_the_kernels_gradient_is_a_small_share_unless_memory_forbids(name: str):
    device = DEVICES[name]
    rows = chunk_rows_for(device, 128256, jnp.bfloat16)
    traffic = 8 * 4096 * 128256 / device.bytes_per_second
    products = 6 * rows * 4096 * 128256 / device.product_rate(jnp.bfloat16)
    held = rows * 128256 * (4 if device.recomputes_dz else 6)
    assert held <= device.memory_bytes / 16
    assert traffic / products < 0.0501 or held > 0.99 * device.memory_bytes / 16


def test_collectives_are_the_formulas_of_the_benchmarks():
    device, mesh = DEVICES["v5p"], (128, 8)
    found = roofline(device, 2**22, 8192, 262144, 8192, jnp.bfloat16, mesh=mesh)
    assert found.collectives == pytest.approx(1e3 * (1.88e9 + 2.13e9) / device.link_bytes_per_second, rel=3e-3)
    assert roofline(device, 2**12, 8192, 262144, 4096, jnp.bfloat16).collectives == 0


def test_one_chunk_adds_nothing_up():
    one = roofline(DEVICES["h100"], 2048, 4096, 128256, 2048, jnp.bfloat16)
    two = roofline(DEVICES["h100"], 2048, 4096, 128256, 1024, jnp.bfloat16)
    assert one.kernel_gradient < two.kernel_gradient
    assert one.bytes_moved < two.bytes_moved
    assert one.products == pytest.approx(two.products)
