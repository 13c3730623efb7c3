"""What text costs under a trained model: `jaxent evaluate` and `jaxent tokens`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxent.cli.errors import CommandError
from jaxent.cli.train import model, report
from jaxent.cli.train.checkpoint import Checkpoint
from jaxent.cli.train.corpus import read_documents
from jaxent.cli.train.mesh import DeviceMesh
from jaxent.cli.train.model import Batch, Params
from jaxent.cli.train.ngrams import Rows, make_rows
from jaxent.risk import EmpiricalRisk

ROWS_AT_A_TIME = 1024
PART_BYTES = 2**20  # of a file, for which all rows are made at once: a row takes about 1 kB, a token 1 byte or more

_token_losses = jax.jit(model.token_losses, static_argnums=2)


@jax.jit
def _update(risk: EmpiricalRisk, losses: jax.Array, counted: jax.Array) -> EmpiricalRisk:
    return risk.update(losses, counted)


def measure(params: Params, rows: Rows, devices: DeviceMesh) -> tuple[EmpiricalRisk, np.ndarray]:
    """The risk over all rows, and the self-information of each target in nats."""
    risk, losses = EmpiricalRisk(), []
    at_a_time = -(-ROWS_AT_A_TIME // devices.data) * devices.data
    for start in range(0, len(rows), at_a_time):
        # The last part is filled up with copies of its last row, which count for nothing.
        index = np.arange(start, start + at_a_time)
        counted = index < len(rows)
        batch = Batch.of(rows.take(np.minimum(index, len(rows) - 1)), devices.rows)
        part = devices.fetch(_token_losses(params, batch, devices.data))
        risk = _update(risk, part, counted)
        losses.append(part[counted])
    return risk, np.concatenate([np.zeros(0, np.float32), *losses])


def figures(risk: EmpiricalRisk, size: int, tokens: int) -> dict[str, float]:
    return {
        "bytes": size,
        "tokens": tokens,
        "bits_per_token": float(risk.mean(2)),
        "bits_per_byte": float(risk.bits_per(size)),
        "perplexity": float(risk.perplexity()),
    }


def parts(text: bytes, size: int = PART_BYTES) -> Iterator[bytes]:
    r"""A long text in parts of at most `size` bytes, which end with a line where they can; each is a file to the model.

    >>> list(parts(b"one\ntwo\nthree", 6))
    [b'one\n', b'two\n', b'three']
    """
    start = 0
    while len(text) - start > size:
        end = text.rfind(b"\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    yield text[start:]


def evaluate(checkpoint: Path, paths: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    """Bits per byte and perplexity of files, each and in total."""
    stored, devices = Checkpoint.load(checkpoint), DeviceMesh.of()
    params = devices.parameters(stored.params)
    files: list[dict[str, Any]] = []
    whole = EmpiricalRisk()
    for document in read_documents(paths):
        risk, count = EmpiricalRisk(), 0
        for part in parts(document.text):
            rows = make_rows(stored.tokenizer.encode([part]), stored.tables)
            risk, count = risk.merge(measure(params, rows, devices)[0]), count + len(rows)
        files.append({"file": document.name, **figures(risk, len(document.text), count)})
        whole = whole.merge(risk)
    size, count = (sum(file[name] for file in files) for name in ("bytes", "tokens"))
    total = {"file": "total", **figures(whole, size, count)}
    if as_json:
        report.print_json({"files": files, "total": total})
    elif not quiet:
        report.print_columns([*files, total])


def tokens(checkpoint: Path, text: str, *, style: str, as_json: bool) -> None:
    """The self-information of each token of a text; `-` reads standard input."""
    stored, devices = Checkpoint.load(checkpoint), DeviceMesh.of()
    content = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    if not content:
        raise CommandError("the text is empty")
    encoded = stored.tokenizer.encode([content])
    risk, nats = measure(devices.parameters(stored.params), make_rows(encoded, stored.tables), devices)
    texts = stored.tokenizer.texts()
    pairs = [(texts[i], float(bits)) for i, bits in zip(encoded[0], nats / np.log(2), strict=True)]
    if as_json:
        found = [{"token": t.decode("utf-8", "backslashreplace"), "bits": bits} for t, bits in pairs]
        report.print_json({**figures(risk, len(content), len(pairs)), "per_token": found})
        return
    if style == "line":
        report.print_coloured(pairs)
    else:
        report.print_surprisal(pairs)
    total, per_byte = sum(bits for _, bits in pairs), float(risk.bits_per(len(content)))
    print(f"{total:.2f} bits in {len(content)} bytes: {per_byte:.3f} a byte")
