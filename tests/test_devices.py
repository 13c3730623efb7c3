"""The table of devices: what JAX calls them, and rates that fit together."""

import numpy as np
import pytest

from jaxent._engine.devices import DEVICES, device_named


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("h100", "h100"),
        ("H100", "h100"),
    ],
)
def test_devices_by_the_names_that_jax_gives_them(kind: str, name: str):
    assert device_named(kind) is DEVICES[name]


@pytest.mark.parametrize(
    "kind", ["cpu", "", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "TPU v4", "AMD Instinct MI300X"]
)
def test_unknown_devices_are_not_guessed(kind: str):
    assert device_named(kind) is None


@pytest.mark.parametrize("name", DEVICES)
def test_rates(name: str):
    device = DEVICES[name]
    bf16, exact = (device.product_rate(dtype) for dtype in ("bfloat16", np.float32))
    assert exact < device.product_rate(np.float32, exact=False) <= bf16
    # A product of thousands of rows is limited by work, not by memory, on all of these.
    assert 100 < bf16 / device.bytes_per_second < 1000
    assert device.memory_bytes > 10 * 2**30
    assert device.source
