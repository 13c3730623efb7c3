"""What holds in every test: eight CPU devices, no implicit promotion of dtype or rank, one seed per test, a grid."""

import os
import zlib
from collections import Counter
from collections.abc import Iterator

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    # Heuristic: reading a program back costs about what compiling it does when that takes 0.1 s.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# A person who waits is shown each n-th row of a table, since every row costs a compilation; CI takes all of them.
NTH_ROW = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `grid` what the README's command leaves out: most rows of each table, and the cases of `real_use`."""
    rows = Counter[str]()
    for item in items:
        table = item.nodeid.split("[")[0]
        if "real_use" in item.path.parts or (hasattr(item, "callspec") and rows[table] % NTH_ROW):
            item.add_marker(pytest.mark.grid)
        rows[table] += 1


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of its own for each test and each row of a parametrize table, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with one device, where no array is split without its type saying so."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types for the length of a test."""
    with jax.enable_x64(True):
        yield
