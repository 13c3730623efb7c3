"""Two processes with two devices each, on this machine: the value and the gradients of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from distributed_worker import arguments

import jaxent

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_both(port: int) -> str:
    """What process 0 prints; whatever happens, no process is left."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, str(HERE / "distributed_worker.py"), str(port)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(i)], **pipes) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return outputs[0][0]


@pytest.mark.grid
def test_two_processes_get_the_value_and_gradients_of_one():
    printed = run_both(free_port())
    found = json.loads(printed.strip().splitlines()[-1])
    hidden, kernel, labels = arguments()

    def loss(hidden: Any, kernel: Any) -> Any:
        return jaxent.linear_softmax_cross_entropy(hidden, kernel, labels)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
    for kind in ("automatic", "manual"):
        for got, want in zip(found[kind], (value, *gradients), strict=True):
            np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6, atol=1e-7)
