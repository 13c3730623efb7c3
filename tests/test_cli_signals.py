"""Ctrl-C and SIGTERM at any moment and however often: one line, the exit code of a shell, and nothing lost."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_text import PATIENCE, environment, run, start

from jaxent import _command
from jaxent.cli.train.checkpoint import NAME, Checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

STEPS = 4000  # so many that no run reaches the end before its signal
SETTINGS = ["--vocab-size", "262", "--width", "4", "--batch-rows", "4", "--checkpoint-every", "10"]
STAGES = ("corpus", "tokens", "model", "step", "    ")


def ended(process: subprocess.Popen[str], before: str = "") -> tuple[int, list[str]]:
    """The exit code, and what stderr holds in addition to the progress."""
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, [line for line in (before + err).splitlines() if not line.startswith(STAGES)]


def until(process: subprocess.Popen[str], stage: str) -> str:
    """What stderr says up to a line that begins with `stage`."""
    assert process.stderr is not None
    seen = ""
    while line := process.stderr.readline():
        seen += line
        if line.startswith(stage):
            return seen
    raise AssertionError(seen)


@pytest.mark.parametrize(
    ("signum", "module"), [(signal.SIGINT, None), (signal.SIGTERM, "jaxent"), (signal.SIGINT, "jaxent.cli")]
)
def test_while_jax_is_imported(signum: int, module: str | None):
    """However the command is started."""
    command = ["check", "nll_loss"]
    if module is None:
        process = start(*command)
    else:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
        process = subprocess.Popen([sys.executable, "-m", module, *command], **streams)
    time.sleep(0.4)
    process.send_signal(signum)
    assert ended(process) == (128 + signum, ["jaxent: interrupted"])


def test_before_the_first_step(text: Path, tmp_path: Path):
    """XLA compiles then. The folder that was made for the run goes."""
    process = start("train", text, *SETTINGS, "--steps", STEPS, "--out", tmp_path / "a" / "b")
    seen = until(process, "tokens")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
    assert ended(process, seen) == (130, ["jaxent: interrupted"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.grid
def test_twice_in_the_loop(text: Path, tmp_path: Path):
    """The same request twice stops the run in order; one that comes later, at once, and keeps the last checkpoint."""
    out = tmp_path / "o"
    command = ["train", text, *SETTINGS, "--steps", STEPS, "--out", out]
    process = start(*command)
    seen = until(process, "step")
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, lines = ended(process, seen)
    step = Checkpoint.load(out).step
    assert (code, lines) == (
        130,
        [f"jaxent: stopped at step {step} of {STEPS}; `jaxent train --resume --out {out}` goes on"],
    )
    process = start(*command)
    until(process, "step")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert step < Checkpoint.load(out).step < STEPS
    assert [p.name for p in out.iterdir() if not p.name.startswith(".")] == [NAME]


def start_program(body: str) -> subprocess.Popen[str]:
    """A program that has taken signals as the command does, once it has said that it is ready."""
    before = "import sys, time\nsys.argv[0] = 'jaxent'\nimport jaxent\nfrom jaxent import _command\n"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    process = subprocess.Popen([sys.executable, "-c", before + body], **streams)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_request_does_not_wait():
    """A loop that takes long, here by sleeping inside what defers signals."""
    process = start_program("with _command.deferred():\n    print('ready', flush=True)\n    time.sleep(600)\n")
    process.send_signal(signal.SIGINT)
    time.sleep(_command.SAME_REQUEST + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, ["jaxent: interrupted"])


def test_the_same_request_comes_while_the_run_ends_in_order():
    process = start_program(
        "try:\n"
        "    with _command.deferred() as received:\n"
        "        print('ready', flush=True)\n"
        "        while not received.signum:\n"
        "            time.sleep(0.01)\n"
        "        raise ValueError\n"
        "except ValueError:\n"
        "    print('ending', flush=True)\n"
        "    time.sleep(0.2)\n"
        "    sys.exit(7)\n"
    )
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (7, [])


@pytest.mark.grid
def test_while_a_model_is_measured(text: Path, tmp_path: Path):
    assert run("train", text, *SETTINGS, "--steps", 10, "--out", tmp_path / "o", "--quiet")[0] == 0
    (tmp_path / "long").write_bytes((text / "f0.txt").read_bytes() * 2000)
    process = start("evaluate", tmp_path / "o", tmp_path / "long")
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, ["jaxent: interrupted"])


def test_only_the_command_takes_signals():
    """A program that imports the library keeps its own."""
    # A process in the background starts with Ctrl-C ignored.
    before = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{before}; import jaxent; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    assert found.stdout == "True\n"


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/usr/bin/jaxent", "train"], ["python", "/usr/bin/jaxent", "train"], True),
        (["-m", "train"], ["python", "-m", "jaxent", "train"], True),
        (["-m"], ["python", "-Imjaxent.cli"], True),
        (["-m", "jaxent"], ["python", "-m", "pytest", "jaxent"], False),
        (["/usr/bin/pytest", "jaxent"], ["python", "/usr/bin/pytest", "jaxent"], False),
        (["-c"], ["python", "-c", "import jaxent"], False),
        ([""], ["python"], False),
    ],
)
def test_which_process_is_the_command(
    argv: list[str], original: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert _command.is_command() is expected


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["train", "evaluate", "tokens", "check"])
def test_at_any_moment(arguments: str, text: Path, tmp_path: Path):
    """From the first import to the last line; what Python does before it reads the package is its own."""
    chance, out = random.Random(2), tmp_path / "o"
    assert run("train", text, *SETTINGS, "--steps", 10, "--out", out, "--quiet")[0] == 0
    command = {
        "train": ["train", text, *SETTINGS, "--steps", 500, "--out", tmp_path / "p"],
        "evaluate": ["evaluate", out, text],
        "tokens": ["tokens", "some text", "--checkpoint", out],
        "check": ["check", "nll_loss", "--dtype", "float32"],
    }[arguments]
    began = time.monotonic()
    assert run(*command)[0] == 0
    whole = time.monotonic() - began
    for _ in range(16):
        if arguments == "train":
            command[-1] = tmp_path / f"{chance.random()}"
        process, signum = start(*command), chance.choice([signal.SIGINT, signal.SIGTERM])
        time.sleep(chance.uniform(0.15, whole))
        for _ in range(chance.choice([1, 2, 3])):
            process.send_signal(signum)
            time.sleep(chance.choice([0, 0.01, 0.3]))
        code, lines = ended(process)
        assert code in (0, 128 + signum)
        if code:
            assert len(lines) == 1
            assert lines[0].startswith(("jaxent: interrupted", "jaxent: stopped at step"))
        else:
            assert lines == []
