"""What text costs under a trained model: `jaxent evaluate` and `jaxent tokens`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxent.cli import model, report
from jaxent.cli.checkpoint import Checkpoint
from jaxent.cli.corpus import read_documents
from jaxent.cli.errors import CommandError
from jaxent.cli.model import Batch, Params
from jaxent.cli.proposals import Rows, make_rows
from jaxent.risk import EmpiricalRisk

ROWS_AT_A_TIME = 1024

_token_losses = jax.jit(model.token_losses)


@jax.jit
def _update(risk: EmpiricalRisk, losses: jax.Array, counted: jax.Array) -> EmpiricalRisk:
    return risk.update(losses, counted)


def measure(params: Params, rows: Rows) -> tuple[EmpiricalRisk, np.ndarray]:
    """The risk over all rows, and the self-information of each target in nats."""
    risk, losses = EmpiricalRisk(), []
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        # The last part is filled up with copies of its last row, which count for nothing.
        index = np.arange(start, start + ROWS_AT_A_TIME)
        counted = index < len(rows)
        part = _token_losses(params, Batch.of(rows.take(np.minimum(index, len(rows) - 1))))
        risk = _update(risk, part, counted)
        losses.append(np.asarray(part)[counted])
    return risk, np.concatenate([np.zeros(0, np.float32), *losses])


def figures(risk: EmpiricalRisk, size: int) -> dict[str, float]:
    return {
        "bytes": size,
        "tokens": int(risk.weight),
        "bits_per_token": float(risk.mean(2)),
        "bits_per_byte": float(risk.bits_per(size)),
        "perplexity": float(risk.perplexity()),
    }


def evaluate(checkpoint: Path, paths: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    """Bits per byte and perplexity of files, each and in total."""
    stored = Checkpoint.load(checkpoint)
    documents = [d for d in read_documents(paths) if d.text]
    if not documents:
        raise CommandError(f"there is no text in {' '.join(paths)}")
    files: list[dict[str, Any]] = []
    whole = EmpiricalRisk()
    for document in documents:
        rows = make_rows(stored.tokenizer.encode([document.text]), stored.tables)
        risk, _ = measure(stored.jax_params(), rows)
        whole = whole.merge(risk)
        files.append({"file": document.name, **figures(risk, len(document.text))})
    total = {"file": "total", **figures(whole, sum(len(d.text) for d in documents))}
    if as_json:
        report.print_json({"files": files, "total": total})
    elif not quiet:
        report.print_columns([*files, total])


def tokens(checkpoint: Path, text: str, *, style: str, as_json: bool) -> None:
    """The self-information of each token of a text; `-` reads standard input."""
    stored = Checkpoint.load(checkpoint)
    content = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    if not content:
        raise CommandError("the text is empty")
    encoded = stored.tokenizer.encode([content])
    risk, nats = measure(stored.jax_params(), make_rows(encoded, stored.tables))
    texts = stored.tokenizer.texts()
    pairs = [(texts[i], float(bits)) for i, bits in zip(encoded[0], nats / np.log(2), strict=True)]
    if as_json:
        found = [{"token": t.decode("utf-8", "backslashreplace"), "bits": bits} for t, bits in pairs]
        report.print_json({**figures(risk, len(content)), "per_token": found})
        return
    if style == "line":
        report.print_coloured(pairs)
    else:
        report.print_surprisal(pairs)
    total, per_byte = sum(bits for _, bits in pairs), float(risk.bits_per(len(content)))
    print(f"{total:.2f} bits in {len(content)} bytes: {per_byte:.3f} a byte")
