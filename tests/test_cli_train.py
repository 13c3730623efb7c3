"""`jaxent train`, `evaluate` and `tokens` from end to end, and every error in one line."""

import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_text import SMALL, fails

from jaxent.cli import main
from jaxent.cli.atomic_files import exclusive_directory, write_atomic
from jaxent.cli.train.checkpoint import NAME, Checkpoint
from jaxent.cli.train.evaluation import measure
from jaxent.cli.train.loop import Schedule
from jaxent.cli.train.mesh import DeviceMesh
from jaxent.cli.train.model import Batch, hidden_states
from jaxent.cli.train.ngrams import make_rows


def test_what_a_run_leaves(trained: Path):
    assert sorted(p.name for p in trained.iterdir()) == [NAME, "loss.png", "report.json"]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((trained / "report.json").read_text())
    held, unigram = report["held_out"], report["unigram"]
    assert held["bits_per_token"] < unigram["code"]["bits_per_token"]
    assert unigram["entropy"]["bits_per_token"] <= unigram["code"]["bits_per_token"]
    assert held["perplexity"] == pytest.approx(2 ** held["bits_per_token"], rel=1e-5)
    assert held["bits_per_byte"] * held["bytes"] == pytest.approx(held["bits_per_token"] * held["tokens"], rel=1e-5)
    assert set(report["compressors"]) == {"zlib -9", "bz2 -9", "lzma -9e"}
    assert report["loss"]["gradient_difference"] < 1e-5
    assert report["loss"]["dense_logits_bytes"] == 4 * 32 * 272
    history = Checkpoint.load(trained).history
    assert history["step"] == [5, 10]
    assert history["held_step"] == [0, 5, 10]
    assert history["held_byte"][-1] < history["held_byte"][0]


def test_output_in_a_pipe(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(text), *SMALL, "--out", str(tmp_path / "o")]) == 0
    out, err = capsys.readouterr()
    assert "H(P-hat, Q)" in out
    assert "SHA-256" in err
    assert "\r" not in err + out
    assert "\x1b" not in err + out


def test_bar_on_a_terminal(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["train", str(text), *SMALL, "--out", str(tmp_path / "o")]) == 0
    bar = capsys.readouterr().err
    for part in ("bits/token", "bits/byte", "tok/s", "100%", "<"):
        assert part in bar


def test_json_and_quiet(text: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    again = ["train", str(text), *SMALL, "--out", str(trained), "--resume", "--quiet"]
    before = (trained / NAME).read_bytes()
    assert main([*again, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((trained / "report.json").read_text())
    assert err == ""
    assert main(again) == 0
    assert capsys.readouterr() == ("", "")
    assert (trained / NAME).read_bytes() == before


def test_resume_without_a_checkpoint_starts_afresh(text: Path, trained: Path, tmp_path: Path):
    assert main(["train", str(text), *SMALL, "--out", str(tmp_path / "o"), "--resume", "--quiet"]) == 0
    assert (tmp_path / "o" / NAME).read_bytes() == (trained / NAME).read_bytes()


def test_evaluate_agrees_with_dense_float64(text: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    files = [text / "f0.txt", text / "f3.txt"]
    assert main(["evaluate", str(trained), *map(str, files), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored = Checkpoint.load(trained)
    bits = []
    for file, line in zip(files, found["files"], strict=True):
        rows = make_rows(stored.tokenizer.encode([file.read_bytes()]), stored.tables)
        hidden = np.asarray(hidden_states(DeviceMesh.of().parameters(stored.params), Batch.of(rows)), np.float64)
        logits = hidden @ stored.params["output"].T.astype(np.float64) + stored.params["output_bias"]
        top = logits.max(1, keepdims=True)
        log_q = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        bits.append(-log_q[np.arange(len(rows)), rows.targets].sum() / np.log(2))
        assert line["bits_per_byte"] == pytest.approx(bits[-1] / file.stat().st_size, rel=1e-5)
        assert line["tokens"] == len(rows)
    size = sum(f.stat().st_size for f in files)
    assert found["total"]["bytes"] == size
    assert found["total"]["bits_per_byte"] == pytest.approx(sum(bits) / size, rel=1e-5)
    assert main(["evaluate", str(trained / NAME), str(text)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 8
    assert table[0].split() == ["file", "bytes", "tokens", "bits", "per", "token", "bits", "per", "byte", "perplexity"]
    assert table[-1].startswith("total")


def test_rows_measured_alone_or_together_cost_the_same(text: Path, trained: Path):
    """1500 rows take two calls, the second one padded."""
    stored = Checkpoint.load(trained)
    (ids,) = stored.tokenizer.encode([(text / "f1.txt").read_bytes() * 5])
    rows = make_rows([ids[:1500]], stored.tables)
    devices = DeviceMesh.of()
    params = devices.parameters(stored.params)
    risk, nats = measure(params, rows, devices)
    assert nats.shape == (1500,)
    assert float(risk.weight) == 1500
    assert float(risk.mean()) == pytest.approx(nats.astype(np.float64).mean(), rel=1e-6)
    _, part = measure(params, rows.take(slice(1000, 1010)), devices)
    np.testing.assert_allclose(part, nats[1000:1010], rtol=1e-5)


def test_tokens(trained: Path, capsys: pytest.CaptureFixture[str]):
    given = 'alpha = beta(x1)\n"é"'
    assert main(["tokens", given, "--checkpoint", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == len(given.encode())
    assert sum(t["bits"] for t in found["per_token"]) / found["bytes"] == pytest.approx(
        found["bits_per_byte"], rel=1e-5
    )
    assert main(["tokens", given, "--checkpoint", str(trained)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(found["per_token"]) + 1 == found["tokens"]  # the two bytes of a letter are one line
    assert main(["tokens", given, "--checkpoint", str(trained), "--line"]) == 0
    line = capsys.readouterr().out
    assert "\x1b[48;5;" in line
    assert "bits: " in line


def test_tokens_from_standard_input(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "in").write_bytes(b"\xff\x00 alpha")
    with open(tmp_path / "in") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["tokens", "-", "--checkpoint", str(trained)]) == 0
    assert "8 bytes" in capsys.readouterr().out


def test_a_second_time(text: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The same command shows the result again, `--resume` needs no other option, and other settings are refused."""
    before = (trained / NAME).read_bytes()
    command = ["train", str(text), *SMALL, "--out", str(trained)]
    other = [*command, "--seed", "1", "--steps", "20"]
    for again in (other, [*other, "--resume"]):
        fails(again, "from other settings: steps was 10, is 20; seed was 0, is 1; --out writes elsewhere", capsys)
    monkeypatch.setattr("jaxent.cli.train.run.train", None)  # nothing is trained
    for again in (command, ["train", "--resume", "--out", str(trained)]):
        assert main(again) == 0
        out, err = capsys.readouterr()
        assert "H(P-hat, Q)" in out
        assert "holds this run, finished" in err
    assert (trained / NAME).read_bytes() == before


def test_two_runs_in_one_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with exclusive_directory(tmp_path):
        fails(["train", str(text), *SMALL, "--out", str(tmp_path)], "another `jaxent train` is writing", capsys)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "the corpus is empty"),
        (b"\0\1", [], "is not text"),
        (b"one two three four", [], "--vocab-size 272 is larger than the corpus"),
        (b"ab", ["--vocab-size", "256"], "too small"),
    ],
)
def test_bad_text(content: bytes, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a").write_bytes(content)
    fails(["train", str(tmp_path / "a"), *SMALL, *options, "--out", str(tmp_path / "o")], message, capsys)
    assert not (tmp_path / "o").exists()


def test_unreadable_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path
):
    fails(["train", str(tmp_path / "none"), "--out", str(tmp_path / "o")], "No such file or directory", capsys)
    fails(["evaluate", str(trained), str(tmp_path / "none")], "No such file or directory", capsys)
    (tmp_path / "secret").write_bytes(b"x")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("jaxent.cli.train.corpus.open_without_waiting", refuse)
    fails(["train", str(tmp_path / "secret")], "secret: Permission denied", capsys)


def test_bad_checkpoints(text: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fails(["evaluate", str(tmp_path), str(text)], "there is no checkpoint", capsys)
    fails(["tokens", "x", "--checkpoint", str(tmp_path)], "there is no checkpoint", capsys)
    whole = (trained / NAME).read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / NAME).write_bytes(damaged)
        fails(["evaluate", str(tmp_path), str(text)], "is not a checkpoint", capsys)
        fails(["train", str(text), *SMALL, "--out", str(tmp_path), "--resume"], "is not a checkpoint", capsys)
    np.savez(tmp_path / NAME, x=np.ones(3))
    fails(["evaluate", str(tmp_path), str(text)], "is not a checkpoint", capsys)
    fails(["tokens", "", "--checkpoint", str(trained)], "the text is empty", capsys)


def test_out_that_cannot_be_made(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_bytes(b"")
    fails(["train", str(text), *SMALL, "--out", str(tmp_path / "file")], "cannot write to", capsys)


def test_full_disk(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "o"
    fails(["train", str(text), *SMALL, "--out", str(out)], f"cannot write {out / NAME}: No space left", capsys)
    assert not out.exists()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, small_files: None):
    path = tmp_path / "a"
    write_atomic(path, b"old")
    with pytest.raises(Exception, match=r"cannot write .*/a: File too large"):
        write_atomic(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["tqdm", "matplotlib"])
def test_missing_extra(
    package: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    fails(["train", str(text), "--out", str(tmp_path / "o")], "pip install 'jaxent[cli]'", capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train", "--steps", "0"],
        ["train", "--vocab-size", "255"],
        ["train", "--vocab-size", "200001"],
        ["train", "--learning-rate", "nan"],
        ["train", "--resume", "--overwrite"],
        ["evaluate", "x"],
    ],
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "tokens"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"examples:\n  jaxent {command}" in capsys.readouterr().out


def test_every_row_once_a_round():
    schedule = Schedule(steps=10, batch_rows=7, learning_rate=1e-3, seed=3)
    rows = np.concatenate([schedule.rows_of(step, 20) for step in range(10)])
    for r in range(3):
        assert sorted(rows[20 * r : 20 * r + 20].tolist()) == list(range(20))
    assert rows[:20].tolist() != rows[20:40].tolist()
    assert schedule.block == 5
    assert Schedule(7, 1, 1.0, 0).block == 1


@pytest.mark.grid
def test_a_loss_that_is_not_finite(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wild = ["train", str(text), *SMALL, "--learning-rate", "1e30", "--out", str(tmp_path / "o")]
    fails(wild, "the loss is no longer finite at step 5: try a lower --learning-rate", capsys)
    assert not (tmp_path / "o" / NAME).exists()
    found = json.loads((tmp_path / "o" / "report.json").read_text())
    assert found["held_out"]["bits_per_byte"] is None
    tame = ["train", str(text), *SMALL, "--out", str(tmp_path / "o"), "--quiet"]
    assert main(tame) == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["held_out"]["bits_per_byte"] > 0
    # Now a checkpoint stands there, and the advice says so.
    fails([*wild, "--overwrite"], "try a lower --learning-rate and --overwrite", capsys)


def test_a_device_without_memory(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def train(*arguments: object, **options: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 TiB")

    monkeypatch.setattr("jaxent.cli.train.run.train", train)
    command = ["train", str(text), *SMALL, "--out", str(tmp_path / "o")]
    fails(command, "JAX gave up: RESOURCE_EXHAUSTED: Out of memory; try smaller --batch-rows", capsys)


def test_checkpoints_round_trip(trained: Path, tmp_path: Path):
    stored = Checkpoint.load(trained)
    stored.save(tmp_path)
    assert (tmp_path / NAME).read_bytes() == (trained / NAME).read_bytes()
    assert jax.tree.all(jax.tree.map(lambda a: a.dtype == jnp.float32, stored.params))
