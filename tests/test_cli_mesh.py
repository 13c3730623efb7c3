"""`jaxent train --mesh`: eight devices, or two processes, reach the losses of one device and lose nothing either."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_text import SMALL, fails

from jaxent.cli import main
from jaxent.cli.train.checkpoint import NAME, Checkpoint
from jaxent.cli.train.loop import Schedule, State, train
from jaxent.cli.train.mesh import DeviceMesh

MESH = ["--mesh", "data=4,vocab=2"]


@pytest.fixture(scope="module")
def command(text: Path) -> list[str]:
    return ["train", str(text), *SMALL, "--quiet"]


def same_losses(found: Path, expected: Path) -> None:
    """Float32 sums in another order differ by a few ulp, which ten steps of Adam spread."""
    a, b = Checkpoint.load(found), Checkpoint.load(expected)
    assert a.history.keys() == b.history.keys()
    for name, values in b.history.items():
        np.testing.assert_allclose(a.history[name], values, rtol=2e-6)
    for name, value in b.params.items():
        np.testing.assert_allclose(a.params[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "shard"),
    [
        ("data=4,vocab=2", 136),
        pytest.param("vocab=8", 34, marks=pytest.mark.slow),
        pytest.param("data=8", 272, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_reach_the_losses_of_one(
    mesh: str, shard: int, command: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def spy(state: State, *arguments: object, **options: object) -> None:
        train(state, *arguments, **options)  # pyright: ignore
        leaves = [state.params["output"], state.optimizer[1][0].mu["output"], state.optimizer[1][0].nu["output"]]
        assert [len(x.sharding.device_set) for x in leaves] == [8] * 3
        assert [x.addressable_shards[0].data.shape for x in leaves] == [(shard, 8)] * 3

    monkeypatch.setattr("jaxent.cli.train.run.train", spy)
    assert main([*command, "--mesh", mesh, "--out", str(tmp_path / "o")]) == 0
    same_losses(tmp_path / "o", trained)


@pytest.mark.grid
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_on_its_mesh(
    signum: signal.Signals,
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    assert main([*command, *MESH, "--out", str(tmp_path / "whole")]) == 0
    rows_of, out = Schedule.rows_of, tmp_path / "o"

    def stop(schedule: Schedule, step: int, count: int) -> np.ndarray:
        signal.raise_signal(signum)
        monkeypatch.setattr(Schedule, "rows_of", rows_of)
        return rows_of(schedule, step, count)

    monkeypatch.setattr(Schedule, "rows_of", stop)
    way = f"stopped at step 5 of 10; `jaxent train --resume --out {out}` goes on"
    fails([*command, *MESH, "--out", str(out)], way, capsys, code=128 + signum)
    assert Checkpoint.load(out).step == 5
    assert main(["train", "--resume", "--out", str(out), "--quiet"]) == 0
    assert (out / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    fails([*command, "--mesh", "data=8", "--out", str(out)], "mesh was data=4,vocab=2, is data=8,vocab=1", capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--mesh", "data=8,vocab=2"],
            "--mesh data=8,vocab=2 takes 16 devices, got 8; JAX_NUM_CPU_DEVICES=N splits a CPU",
        ),
        (["--mesh", "data=3"], "--batch-rows 32 is not a multiple of the 3 shards of 'data'"),
        (["--mesh", "vocab=3"], "--vocab-size 272 is not a multiple of the 3 shards of 'vocab'"),
        (["--coordinator", "host:1"], "--coordinator, --num-processes and --process-id go with --mesh"),
        ([*MESH, "--process-id", "0"], "--coordinator, --num-processes and --process-id belong together"),
        (
            [*MESH, "--coordinator", "127.0.0.1:1", "--num-processes", "1", "--process-id", "0"],
            "cannot join the other processes: jax.distributed.initialize() must be called before",
        ),
    ],
)
def test_impossible_meshes(
    options: list[str], message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fails([*command, *options, "--out", str(tmp_path / "o")], message, capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("mesh", ["", "data", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=x"])
def test_malformed_meshes(mesh: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "--mesh", mesh])
    assert f"argument --mesh: must be like data=4,vocab=2, got {mesh}" in capsys.readouterr().err


def test_an_odd_number_of_rows_is_measured_on_a_mesh():
    """Rows at a time are rounded up to the shards."""
    devices = DeviceMesh.of(data=3)
    assert devices.rows(np.arange(9)).sharding.shard_shape((9,)) == (3,)
    assert devices.every(7) == [7]


def two_processes(arguments: list[str]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    joined = ["--mesh", "data=2,vocab=2", "--coordinator", address, "--num-processes", "2"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "jaxent.cli", *arguments, *joined, "--process-id", str(i)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.mark.grid
def test_two_processes_reach_the_losses_of_one(command: list[str], trained: Path, tmp_path: Path):
    processes = two_processes([*command, "--out", str(tmp_path / "o")])
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    same_losses(tmp_path / "o", trained)
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [NAME, "loss.png", "report.json"]
