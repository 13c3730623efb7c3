"""What holds in every test: eight CPU devices, no implicit promotion of dtype or rank, one seed per test, a grid."""

import gc
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import FAST
from cli_text import SMALL, write_text

from jaxent.cli import main

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects that stay; looking through all of them less often saves a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    # Heuristic: reading a program back costs about what compiling it does when that takes 0.1 s.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hurried",
        action="store_true",
        help="let XLA emit code without optimising it: most tests take half the time; not for those marked `compiled`",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before JAX starts a back end, which reads the flags once."""
    if config.getoption("--hurried"):
        flags = (f"--{name}={str(value).lower()}" for name, value in FAST.items())
        os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags))


# What readers and users run, as they run it.
AS_USERS_RUN = (
    *("test_accuracy", "test_cli_", "test_distributed", "test_docs", "test_docstrings", "test_examples"),
    *("test_fits_in", "test_readme"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `grid` what the README's command leaves out: most rows of each table, and the cases of `real_use`.

    Every row costs a compilation, so that a person who waits is shown the first one only, or as many as `rows` says; CI
    takes all of them.
    """
    tables: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path.name.startswith(AS_USERS_RUN):
            item.add_marker(pytest.mark.compiled)
        marks = {mark.name for mark in item.iter_markers()}
        if "real_use" in item.path.parts:
            item.add_marker(pytest.mark.grid)
        elif hasattr(item, "callspec") and not marks & {"slow", "grid"}:
            tables.setdefault(item.nodeid.split("[")[0], []).append(item)
    for table in tables.values():
        mark = table[0].get_closest_marker("rows")
        shown = 1 if mark is None else min([len(table), *mark.args])
        step = math.ceil(len(table) / shown)
        for i, item in enumerate(table):
            if i % step:
                item.add_marker(pytest.mark.grid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each file is one worker's, since its tests share fixtures and compiled programs."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


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


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six text files."""
    return write_text(tmp_path_factory.mktemp("text") / "src")


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `jaxent train` leaves after a small run; no test changes it."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(["train", str(text), *SMALL, "--out", str(out), "--quiet"]) == 0
    return out
