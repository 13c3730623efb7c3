"""`jaxent` in rough hands, as processes of their own: odd environments, closed streams, full disks, odd corpora."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_text import environment, fails, run

from jaxent.cli import main
from jaxent.cli.errors import CommandError
from jaxent.cli.train.checkpoint import NAME, Checkpoint
from jaxent.cli.train.corpus import Source, find_sources, read_corpus

pytestmark = pytest.mark.skipif(os.name != "posix", reason="shells and /dev are POSIX's")

TINY = ["--width", "4", "--steps", "2", "--batch-rows", "8", "--vocab-size", "256"]


@pytest.fixture(scope="module")
def tiny(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "out"
    assert run("train", text, *TINY, "--out", out, "--quiet") == (0, "", "")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Environment


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JAX_PLATFORMS", "cuda", "JAX finds no device with JAX_PLATFORMS=cuda"),
        ("JAX_NUM_CPU_DEVICES", "abc", "abc"),
        ("JAX_ENABLE_X64", "perhaps", "jax does not take JAX_ENABLE_X64=perhaps"),
        ("MPLBACKEND", "garbage", "cannot import matplotlib: "),
    ],
)
def test_an_invalid_environment(variable: str, value: str, message: str, text: Path, tmp_path: Path):
    """At the start: nothing has been read or written."""
    code, out, err = run("train", text, *TINY, "--out", tmp_path / "o", env=environment(**{variable: value}))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("jaxent: ")
    assert message in err
    assert not (tmp_path / "o").exists()


@pytest.mark.grid
def test_check_and_python_m_report_it_too():
    for command in (["-m", "jaxent", "check"], ["-m", "jaxent.cli", "tokens", "x"]):
        found = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment(JAX_PLATFORMS="garbage")
        )
        if "check" in command:
            assert "JAX finds no device with JAX_PLATFORMS=garbage" in found.stderr
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)


@pytest.mark.grid
def test_the_environment_does_not_change_the_bits(text: Path, tiny: Path, tmp_path: Path):
    odd = environment(JAX_ENABLE_X64="1", JAX_DISABLE_JIT="1", JAX_DEBUG_NANS="1", JAX_NUMPY_RANK_PROMOTION="raise")
    assert run("train", text, *TINY, "--out", tmp_path / "o", "--quiet", env=odd) == (0, "", "")
    assert (tmp_path / "o" / NAME).read_bytes() == (tiny / NAME).read_bytes()
    recorded = json.loads((tiny / "report.json").read_text())["environment"]
    assert recorded.keys() >= {"jax", "device"}


# ----------------------------------------------------------------------------------------------------------------------
# Streams


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The line, with `jaxent` in it, in a shell."""
    found = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return subprocess.run(["sh", "-c", line], cwd=folder, env=found, capture_output=True, text=True, timeout=240)


@pytest.mark.grid
def test_closed_streams(text: Path, tiny: Path, tmp_path: Path):
    for closed in ("1>&-", "2>&-", "0<&- 1>&- 2>&-"):
        out = tmp_path / f"o{len(closed)}{closed[0]}"
        done = shell(f"jaxent train {text} {' '.join(TINY)} --out {out} {closed}", tmp_path)
        assert done.returncode == 0
        assert (out / NAME).read_bytes() == (tiny / NAME).read_bytes()
        if closed == "1>&-":
            assert done.stderr.startswith("corpus ")
            assert done.stderr.splitlines()[-1].startswith("step       2 of 2: ")
        else:
            assert done.stderr == ""
        if closed == "2>&-":
            assert done.stdout.startswith("\nheld-out text")  # and no progress in it
    done = shell(f"jaxent tokens - --checkpoint {tiny} <&-", tmp_path)
    assert (done.returncode, done.stderr) == (2, "jaxent: the text is empty\n")


FULL = "jaxent: cannot write the output: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["--help", "train --help"])
def test_help_on_a_full_device(command: str, tmp_path: Path):
    done = shell(f"jaxent {command} > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (2, FULL)


@pytest.mark.grid
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_full_streams(text: Path, tiny: Path, tmp_path: Path):
    done = shell(f"jaxent tokens x --checkpoint {tiny} > /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (2, FULL)
    done = shell(f"jaxent train {text} {' '.join(TINY)} --out o 2> /dev/full", tmp_path)
    assert done.returncode == 0
    assert "H(P-hat, Q)" in done.stdout


@pytest.mark.grid
def test_progress_off_a_terminal(text: Path, tmp_path: Path):
    """A line at each checkpoint."""
    command = ["train", text, "--width", "4", "--steps", "10", "--batch-rows", "8", "--checkpoint-every", "5"]
    code, _, err = run(*command, "--out", tmp_path / "o")
    assert code == 0
    assert [line[:19] for line in err.splitlines() if line.startswith("step")] == [
        "step       5 of 10:",
        "step       10 of 10",
    ]
    # The default vocabulary is larger than this text.
    assert "(the text has no more)" in err
    stored = Checkpoint.load(tmp_path / "o")
    assert 256 < stored.tokenizer.size < stored.settings["vocab_size"] == 32_768
    assert run("train", "--resume", "--out", tmp_path / "o", "--quiet") == (0, "", "")


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.grid
def test_outputs_of_a_run_are_not_input(text: Path, tmp_path: Path):
    """`jaxent train .` twice is one run, wherever it writes, its log included."""
    for file in text.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for out in ("jaxent-run", "."):
        first = shell(f"jaxent train . {' '.join(TINY)} --out {out} > log.txt 2>&1", tmp_path)
        assert first.returncode == 0
        again = shell(f"jaxent train . {' '.join(TINY)} --out {out} >> log.txt 2>&1", tmp_path)
        assert again.returncode == 0
        log = (tmp_path / "log.txt").read_text()
        assert "6 files" not in log
        assert "holds this run, finished" in log
        (tmp_path / "log.txt").unlink()
    assert (tmp_path / NAME).read_bytes() == (tmp_path / "jaxent-run" / NAME).read_bytes()


def test_a_corpus_is_the_same_wherever_it_lies(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sub = tmp_path / "a" / "sub"
    sub.mkdir(parents=True)
    for i, file in enumerate(sorted(text.iterdir())):
        (sub if i % 2 else tmp_path / "a").joinpath(file.name).write_bytes(file.read_bytes())
    here = read_corpus([str(tmp_path / "a")], 10**6)
    monkeypatch.chdir(tmp_path / "a")
    for path in (".", "../a", "./sub/.."):
        found = read_corpus([path], 10**6)
        assert (found.digest, found.held_out) == (here.digest, here.held_out)
    one = read_corpus(["f0.txt"], 10**6)
    for path in (str(tmp_path / "a" / "f0.txt"), "../a/f0.txt"):
        assert read_corpus([path], 10**6).digest == one.digest
        assert read_corpus(["f0.txt", path], 10**6).digest == one.digest  # one file, however it is spelt
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert read_corpus(["moved"], 10**6).digest == here.digest


def test_links_are_no_second_file(text: Path, tmp_path: Path):
    (tmp_path / "src").mkdir()
    for name in ("f0.txt", "f1.txt"):
        (tmp_path / "src" / name).write_bytes((text / name).read_bytes())
    alone = read_corpus([str(tmp_path / "src")], 10**6)
    (tmp_path / "src" / "g.txt").symlink_to("f0.txt")
    assert read_corpus([str(tmp_path / "src")], 10**6).digest == alone.digest


@pytest.mark.parametrize("command", [["train"], ["evaluate", "{tiny}"]])
def test_what_is_no_regular_file(command: list[str], request: pytest.FixtureRequest, tmp_path: Path):
    """None of these is waited for: a pipe that nothing writes to, a socket, a link that leads nowhere, a device."""
    given = [str(request.getfixturevalue("tiny")) if part == "{tiny}" else part for part in command]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket may have 100 characters
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
        for name, why in (
            ("pipe", "nothing writes to this pipe"),
            ("socket", "No such device or address"),
            ("link", "No such file or directory"),
            ("/dev/null", "no text in /dev/null"),
        ):
            code, out, err = run(*given, tmp_path / name, cwd=tmp_path)
            assert (code, out) == (2, "")
            assert err.splitlines()[-1].startswith("jaxent: ")
            assert err.endswith(f"{why}\n")
        (tmp_path / "text.txt").write_bytes(b"some text")
        assert [s.name for s in find_sources([str(tmp_path)])] == ["text.txt"]  # in a folder they are passed over


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o000)
    for path in (tmp_path, tmp_path / "closed"):
        with pytest.raises(CommandError, match=r"cannot read .*closed: Permission denied"):
            read_corpus([str(path)], 10**6)


def test_a_pipe_that_is_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its text is read whole, and a writer that takes its time is not waited for without a word."""
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"exec > {tmp_path / 'pipe'}; sleep 2; echo some text; sleep 1; echo more"])
    assert Source(tmp_path / "pipe", "pipe", named=True).read() == b"some text\nmore\n"
    assert writer.wait() == 0
    assert capsys.readouterr().err == f"waiting for text from {tmp_path / 'pipe'}\n"


@pytest.mark.grid
def test_names_with_escape_sequences(text: Path, tiny: Path, tmp_path: Path):
    folder = tmp_path / "\x1b[31mred\n"
    folder.mkdir()
    (folder / "\x1b]0;title\x07").write_bytes((text / "f0.txt").read_bytes())
    results = [
        run("train", folder, *TINY, "--out", folder / "\x1b[2J"),
        run("evaluate", tiny, folder),
        run("evaluate", tiny, folder, "--json"),
        run("evaluate", folder / "\x1b[2J" / "\x1b", folder),
        run("train", folder, "--steps", "\x1b[31m", "--out", folder / "o"),
        run("train", folder / "\x1b[31mnone"),
        run("\x1b[31m"),
    ]
    assert [code for code, _, _ in results] == [0, 0, 0, 2, 2, 2, 2]
    for _, out, err in results:
        assert "\x1b" not in out + err
        assert "\x07" not in out + err


def test_many_files(tmp_path: Path):
    for i in range(20_000):
        if i % 500 == 0:
            (tmp_path / f"{i // 500}").mkdir()
        (tmp_path / f"{i // 500}" / f"{i}.txt").write_bytes(b"word %d\n" % i)
    began = time.process_time()
    corpus = read_corpus([str(tmp_path)], 10**7)
    assert time.process_time() - began < 6
    assert len(corpus.train) + len(corpus.held_out) == 20_000


# ----------------------------------------------------------------------------------------------------------------------
# Limits


LARGE = "1" + 30 * "0"


@pytest.mark.parametrize(
    "option", ["steps", "batch-rows", "width", "vocab-size", "seed", "max-bytes", "checkpoint-every"]
)
@pytest.mark.parametrize("value", [LARGE, "10**30", "1e3", "-1", "", "9" * 6000, "٣x"])
def test_invalid_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["train", f"--{option}={value}"])
    out, err = capsys.readouterr()
    assert err.startswith(f"jaxent: argument --{option}: must be a whole number from ")
    assert (out, err.count("\n"), len(err) < 300) == ("", 1, True)
    assert "int" not in err.replace("--checkpoint-every", "")


@pytest.mark.parametrize("value", ["abc", "nan", "inf", "-1", "0", "1e999"])
def test_invalid_learning_rates(value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["train", f"--learning-rate={value}"])
    assert capsys.readouterr().err.startswith("jaxent: argument --learning-rate: must be a positive number, got ")


def test_more_rows_than_memory(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Linux would grant the memory and then kill the process. What is advised works, and nothing stands in its way."""
    command = ["train", str(text), *TINY, "--out", str(tmp_path / "o")]
    fails([*command, "--batch-rows", "1000000000"], "try at most ", capsys)
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------------------------------------------------
# A run that diverges


@pytest.mark.grid
def test_a_run_that_diverges(text: Path, tmp_path: Path):
    """It is told when it happens; what is no number is null; the advice can be followed."""
    command = ["train", text, *TINY, "--out", tmp_path / "o"]
    code, out, err = run(*command, "--learning-rate", "1", "--json")
    assert (code, err.count("jaxent: ")) == (0, 1)
    assert "jaxent: the run has diverged: held-out text costs " in err
    assert json.loads(out, parse_constant=pytest.fail) == json.loads((tmp_path / "o" / "report.json").read_text())
    code, out, err = run("evaluate", tmp_path / "o", text, "--json")
    assert code == 0
    json.loads(out, parse_constant=pytest.fail)
    code, _, err = run(*command, "--learning-rate", "1e30", "--out", tmp_path / "p", "--quiet")
    assert (code, err) == (2, "jaxent: the loss is no longer finite at step 2: try a lower --learning-rate\n")
    found = json.loads((tmp_path / "p" / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["held_out"]["bits_per_byte"] is None
    assert run(*command, "--learning-rate", "1e-3", "--out", tmp_path / "p", "--quiet") == (0, "", "")


# ----------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.mark.grid
def test_a_disk_that_fills_up(text: Path, tmp_path: Path):
    """A file system of 64 kB where one may be mounted, else a limit on the size of a file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = (
        f"jaxent train {text} --width 64 --steps 10 --batch-rows 8 --checkpoint-every 5 --out {disk / 'o'} --quiet"
    )
    mounted = f"mount -t tmpfs -o size=64k none {disk} && exec {command}"
    if shell(f"unshare -m sh -c 'mount -t tmpfs none {disk}'", tmp_path).returncode == 0:
        done = shell(f"unshare -m sh -c '{mounted}; ls -A {disk}/o'", tmp_path)
        why = "No space left on device"
    else:
        done = shell(f"trap '' XFSZ; ulimit -f 64; exec {command}", tmp_path)
        why = "File too large"
    assert (done.returncode, done.stderr) == (2, f"jaxent: cannot write {disk / 'o' / NAME}: {why}\n")
    assert not (disk / "o").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Help, and text that is not English


def test_help_names_what_each_command_is_for(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    for told in (
        "train train a small language model",
        "evaluate measure files",
        "tokens show what each token",
        "check compare values and gradients of every loss",
    ):
        assert told in out


def test_modules_are_the_command():
    for module in ("jaxent", "jaxent.cli"):
        command = [sys.executable, "-m", module, "--help"]
        found = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.startswith("usage: jaxent ")


def test_characters_are_whole(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    given = "Größe 日本 🙂é"
    command = ["tokens", given, "--checkpoint", str(trained)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "".join(t["token"] for t in found["per_token"]) == given
    assert sum(t["bits"] for t in found["per_token"]) == pytest.approx(found["bits_per_byte"] * len(given.encode()))
    assert main([*command, "--table"]) == 0
    table = capsys.readouterr().out
    assert "\\x" not in table
    assert all(f"'{c}'" in table for c in "öß日本🙂é")
    assert main([*command, "--line"]) == 0
    assert "\x1b[" in capsys.readouterr().out


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours(
    variable: str, value: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, value)
    assert main(["tokens", "one é", "--checkpoint", str(trained), "--line"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "é[" in out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["tokens", "one é", "--checkpoint", str(trained)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_start_is_as_cheap_as_jax():
    """`import jaxent` brings nothing along that only the command needs."""
    program = "import sys, jaxent; print(sorted({'matplotlib', 'tqdm', 'torch', 'argparse'} & set(sys.modules)))"
    found, plain = (
        subprocess.run([sys.executable, "-c", p], capture_output=True, text=True, env=environment(), check=True)
        for p in (program, program.replace("jaxent", "jax, optax"))
    )
    assert found.stdout == plain.stdout
