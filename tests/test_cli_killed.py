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

from jaxent.cli.checkpoint import NAME, Checkpoint

STEPS = 600
SETTINGS = [
    "--vocab-size",
    "262",
    "--width",
    "4",
    "--steps",
    str(STEPS),
    "--batch-rows",
    "4",
    "--checkpoint-every",
    "5",
]
PATIENCE = 120  # seconds


class Runner:
    def __init__(self, folder: Path):
        self.folder = folder
        self.text = write_text(folder / "src")
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, out: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jaxent.cli", "train", str(self.text), *SETTINGS, "--resume", "--quiet"]
        return subprocess.Popen(
            [*command, "--out", str(self.folder / out)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, out: str) -> None:
        process = self.start(out)
        _, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (0, "")

    def stop(self, out: str, signum: int, chance: random.Random) -> tuple[int, str]:
        """Starts a run and sends the signal some time after it has written a checkpoint."""
        path = self.folder / out / NAME
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = self.start(out)
        deadline = time.monotonic() + PATIENCE
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signum)
        _, err = process.communicate(timeout=PATIENCE)
        return process.returncode, err


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL elsewhere")
def test_killed_and_resumed(tmp_path: Path):
    runner, chance = Runner(tmp_path), random.Random(0)
    runner.finish("alone")
    steps = [0]
    for signum, code in (
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGINT, 130),
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, 143),
        (signal.SIGKILL, -signal.SIGKILL),
    ):
        returned, err = runner.stop("killed", signum, chance)
        stored = Checkpoint.load(tmp_path / "killed")
        steps.append(stored.step)
        assert returned == code, err
        if code > 0:
            assert err == f"jaxent: stopped at step {stored.step} of {STEPS}; --resume goes on\n"
    assert steps == sorted(steps)
    assert 0 < steps[-1] < STEPS
    runner.finish("killed")
    assert (tmp_path / "killed" / NAME).read_bytes() == (tmp_path / "alone" / NAME).read_bytes()
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == [NAME, "loss.png", "report.json"]
