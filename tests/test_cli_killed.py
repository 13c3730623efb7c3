"""A run that is killed at random moments ends with the bits of a run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_text import write_text

from jaxent.cli.train.checkpoint import NAME, Checkpoint

# So many that no run reaches the end before its signal, however late a busy machine sends it.
STEPS = 1500
SETTINGS = ["--vocab-size", "262", "--width", "4", "--steps", str(STEPS), "--batch-rows", "4"]
MESH = ["--mesh", "data=2,vocab=2"]
PATIENCE = 240  # seconds


class Runner:
    def __init__(self, folder: Path, options: list[str]):
        self.folder = folder
        self.command = [sys.executable, "-m", "jaxent", "train", str(write_text(folder / "src")), *SETTINGS]
        self.command += ["--checkpoint-every", "10", "--quiet", *options]
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, out: str) -> subprocess.Popen[str]:
        command = [*self.command, "--out", str(self.folder / out)]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, out: str) -> None:
        process = self.start(out)
        _, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (0, "")

    def stop(self, out: str, signum: int, wait: float) -> tuple[int, str]:
        """Starts a run and sends the signal `wait` seconds after it has written a checkpoint."""
        path = self.folder / out / NAME
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = self.start(out)
        deadline = time.monotonic() + PATIENCE
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(signum)
        _, err = process.communicate(timeout=PATIENCE)
        return process.returncode, err

    def same(self, a: str, b: str) -> bool:
        return (self.folder / a / NAME).read_bytes() == (self.folder / b / NAME).read_bytes()


@pytest.mark.grid
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL elsewhere")
def test_killed_and_resumed(tmp_path: Path):
    runner, chance = Runner(tmp_path, []), random.Random(0)
    runner.finish("alone")
    steps = [0]
    for signum, code in (
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGKILL, -signal.SIGKILL),
    ):
        returned, err = runner.stop("killed", signum, chance.uniform(0, 0.15))
        stored = Checkpoint.load(tmp_path / "killed")
        steps.append(stored.step)
        assert returned == code, err
        if code > 0:
            command = f"jaxent train --resume --out {tmp_path / 'killed'}"
            assert err == f"jaxent: stopped at step {stored.step} of {STEPS}; `{command}` goes on\n"
    assert steps == sorted(steps)
    assert 0 < steps[-1] < STEPS
    runner.finish("killed")
    assert runner.same("killed", "alone")
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [NAME, "loss.png", "report.json"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL elsewhere")
@pytest.mark.parametrize("options", [[], MESH], ids=["one device", "mesh"])
def test_killed_at_any_moment(options: list[str], tmp_path: Path):
    """Before the first checkpoint, in a write, in a step, in the report: the last good one is always there."""
    runner, chance = Runner(tmp_path, options), random.Random(1)
    began = time.monotonic()
    runner.finish("alone")
    runner.finish("killed again")
    whole = (time.monotonic() - began) / 2
    for _ in range(12):
        process = runner.start("killed")
        time.sleep(chance.uniform(0.2, 1) * whole)
        process.kill()
        process.communicate(timeout=PATIENCE)
        if (tmp_path / "killed" / NAME).exists():
            assert Checkpoint.load(tmp_path / "killed").step <= STEPS
    runner.finish("killed")
    assert runner.same("killed", "alone")
    assert runner.same("killed again", "alone")
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [NAME, "loss.png", "report.json"]
