"""What is read back is what was written, or one line: names, shapes, numbers, and no file that never ends."""

import dataclasses
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli_text import SMALL, fails

from jaxent.cli import main
from jaxent.cli.atomic_files import SUFFIX, exclusive_directory
from jaxent.cli.errors import CommandError
from jaxent.cli.train import model
from jaxent.cli.train.checkpoint import NAME, Checkpoint
from jaxent.cli.train.ngrams import Stream


def content(stored: Checkpoint) -> list[bytes]:
    """All of it, to the last bit."""
    arrays = [*stored.params.values(), *stored.optimizer]
    arrays += [getattr(table, field.name) for table in stored.tables for field in dataclasses.fields(table)]
    rest = [stored.settings, stored.text, stored.step, stored.history, list(stored.params), stored.tokenizer.size]
    return [*(x.tobytes() for x in arrays), *stored.tokenizer.pieces, json.dumps(rest).encode()]


def test_flipped_bits_are_reported_or_harmless(trained: Path, tmp_path: Path):
    """In the headers of the archive, where no check sum lies over them, as elsewhere."""
    whole, chance = (trained / NAME).read_bytes(), random.Random(0)
    expected = content(Checkpoint.load(trained))
    with zipfile.ZipFile(trained / NAME) as archive:
        near = [entry.header_offset + i for entry in archive.infolist() for i in range(190)]
        directory = list(range(archive.start_dir, len(whole)))
    spots = chance.sample(near, 250) + chance.sample(directory, 250) + chance.sample(range(len(whole)), 50)
    refused = 0
    for spot in spots:
        damaged = bytearray(whole)
        damaged[spot] ^= 1 << chance.randrange(8)
        (tmp_path / NAME).write_bytes(damaged)
        try:
            found = content(Checkpoint.load(tmp_path))
        except CommandError:
            refused += 1
        else:
            assert found == expected
    assert refused > 300


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], out: Path) -> None:
    """The file with its arrays changed, as NumPy would write them, and a head that tells of the new ones."""
    with np.load(path / NAME) as stored:
        arrays = dict(stored)
    change(arrays)
    head = json.loads(arrays.pop("head").tobytes())
    head["arrays"] = {name: [x.dtype.str, *x.shape] for name, x in arrays.items()}
    np.savez(out / NAME, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)


def head(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        found = json.loads(arrays["head"].tobytes())
        for path, value in changes.items():
            *groups, name = path.split("__")
            inner = found
            for group in groups:
                inner = inner[group]
            if value is None:
                del inner[name]
            else:
                inner[name] = value
        arrays["head"] = np.frombuffer(json.dumps(found).encode(), np.uint8)

    return change


def array(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({name: value(arrays[name])})


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("params/bias1"),
        lambda arrays: arrays.pop("optimizer/0"),
        lambda arrays: arrays.pop("table/2/keys"),
        lambda arrays: arrays.update({"params/more": np.ones(3, np.float32)}),
        array("params/bias1", lambda x: x[:-1]),
        array("params/scale", lambda x: x.astype(np.float64)),
        array("params/output", lambda x: np.where(x == x[0, 0], np.nan, x)),
        array("table/0/tokens", lambda x: x + 10**6),
        array("table/0/keys", lambda x: x[::-1]),
        array("lengths", lambda x: x + 1),
        head(history={}),
        head(history__byte=None),
        head(history__step=[]),
        head(history__token=["x", "y"]),
        head(step=10**6),
        head(step="5"),
        head(settings__width=9),
        head(settings__steps=None),
        head(settings__learning_rate="fast"),
        head(text=None),
        head(format="jaxent-train-99"),
    ],
)
def test_invalid_checkpoints(
    change: Callable[[dict[str, Any]], None], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rewritten(trained, change, tmp_path)
    fails(["tokens", "x", "--checkpoint", str(tmp_path)], "is not a checkpoint of `jaxent train`", capsys)


def test_an_optimizer_of_another_kind(text: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rewritten(trained, array("optimizer/1", lambda x: x[:-1]), tmp_path)
    command = ["train", str(text), *SMALL, "--out", str(tmp_path)]
    fails(command, "is from another version of optax: --overwrite starts again", capsys)


@pytest.mark.grid
def test_compressed_and_endless_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A bomb of 1 GB in 1 MB, a header that asks for 10^15 numbers, a pipe without a writer, a folder."""
    command = ["tokens", "x", "--checkpoint", str(tmp_path)]
    with zipfile.ZipFile(tmp_path / NAME, "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("head.npy", "w") as file:
        for _ in range(100):
            file.write(bytes(10**7))
    fails(command, "it is compressed", capsys)
    with np.load(trained / NAME) as stored:
        arrays = dict(stored)
    np.savez(tmp_path / NAME, **arrays)
    whole = (tmp_path / NAME).read_bytes()
    shape = f"({10**15},), }}".encode()
    at = whole.index(b"'shape': (") + len(b"'shape': ")
    (tmp_path / NAME).write_bytes(whole[:at] + shape + whole[at + len(shape) :])
    fails(command, "is not a checkpoint", capsys)
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    fails(command, "it is not a regular file", capsys)
    fails(["tokens", "x", "--checkpoint", str(tmp_path / NAME)], "it is not a regular file", capsys)
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    fails(command, "Is a directory" if os.name == "posix" else "cannot read", capsys)


@pytest.mark.parametrize("damage", ["settings", "not JSON", "list", "fifo", "no numbers"])
def test_a_damaged_report_is_rewritten(
    damage: str, text: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "o"
    out.mkdir()
    for file in trained.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    report = json.loads((out / "report.json").read_text())
    if damage == "fifo":
        (out / "report.json").unlink()
        os.mkfifo(out / "report.json")
    else:
        wrong = {"settings": {"settings": report["settings"]}, "not JSON": 0, "list": [1]}
        wrong["no numbers"] = report | {"loss": {"temporary_bytes": "many"}}
        found = "{" if damage == "not JSON" else json.dumps(wrong[damage])
        (out / "report.json").write_text(found)
    assert main(["train", str(text), *SMALL, "--out", str(out), "--quiet", "--json"]) == 0
    capsys.readouterr()
    again = json.loads((out / "report.json").read_text())
    assert {**again, "seconds": 0} == {**report, "seconds": 0}


def test_the_clean_up_takes_only_its_own(tmp_path: Path):
    foreign = [".report.json.swp", ".checkpoint.npz.bak", ".loss.png.~1~", "report.json~", f"x{SUFFIX}"]
    own = [f".{NAME}.abc{SUFFIX}", f".report.json.x{SUFFIX}"]
    for name in foreign + own:
        (tmp_path / name).write_bytes(b"")
    with exclusive_directory(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(foreign)


def test_unused_folders_are_removed(tmp_path: Path):
    with exclusive_directory(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_those_of_the_parameters():
    params = model.initial_params(Stream.of([np.arange(300, dtype=np.int32)]), 300, 4, 0)
    assert {name: x.shape for name, x in params.items()} == model.shapes(300, 4)
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == np.float32, params))
