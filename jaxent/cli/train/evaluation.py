"""What text costs under a trained model: `jaxent evaluate` and `jaxent tokens`."""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxent.cli.errors import CommandError
from jaxent.cli.output import has_colours, print_columns, print_json, say
from jaxent.cli.train import model, surprisal
from jaxent.cli.train.checkpoint import Checkpoint
from jaxent.cli.train.corpus import read_documents
from jaxent.cli.train.mesh import DeviceMesh
from jaxent.cli.train.model import Batch, Params
from jaxent.cli.train.ngrams import Rows, make_rows
from jaxent.cli.train.tokenizer import Tokenizer
from jaxent.risk import EmpiricalRisk

ROWS_AT_A_TIME = 1024
GROUP_ROWS = 2**16  # of files that are measured together; heuristic
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


def figures(nats: float, size: int, tokens: int) -> dict[str, float]:
    """From the sum over all tokens."""
    mean = nats / tokens
    return {
        "bytes": size,
        "tokens": tokens,
        "bits_per_token": mean / math.log(2),
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": perplexity(mean / math.log(2)),
    }


def perplexity(bits: float) -> float:
    """2^bits, infinite where that is no float."""
    return 2**bits if bits < 1024 else bits * math.inf


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
    names, sizes, counts, nats = [], [], [], []
    for group in _groups(_encoded(stored.tokenizer, paths, names, sizes)):
        rows = make_rows([ids for _, ids in group], stored.tables)
        ends = np.cumsum([len(ids) for _, ids in group])
        losses = measure(params, rows, devices)[1].astype(np.float64)
        for (i, ids), part in zip(group, np.split(losses, ends[:-1]), strict=True):
            if i == len(nats):
                nats.append(0.0)
                counts.append(0)
            nats[i] += part.sum()
            counts[i] += len(ids)
    files = [{"file": n, **figures(*f)} for n, *f in zip(names, nats, sizes, counts, strict=True)]
    total = {"file": "total", **figures(sum(nats), sum(sizes), sum(counts))}
    if as_json:
        print_json({"files": files, "total": total})
    elif not quiet:
        print_columns([*files, total])
    if not math.isfinite(sum(nats)):
        say("jaxent: the model has diverged: its cross-entropy is not finite")


def _encoded(
    tokenizer: Tokenizer, paths: Sequence[str], names: list[str], sizes: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of a file and the tokens of a part of it; its name and size are added to the lists."""
    ids = tokenizer.ids()
    for number, document in enumerate(read_documents(paths)):
        names.append(document.name)
        sizes.append(len(document.text))
        for part in parts(document.text):
            yield number, tokenizer.encode([part], ids)[0]


def _groups(encoded: Iterator[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Several at a time: thousands of small files would be thousands of batches with little in them."""
    group, rows = [], 0
    for item in encoded:
        if group and rows + len(item[1]) > GROUP_ROWS:
            yield group
            group, rows = [], 0
        group.append(item)
        rows += len(item[1])
    if group:
        yield group


def tokens(checkpoint: Path, text: str, *, style: str | None, as_json: bool) -> None:
    """The self-information of each token of a text; `-` reads standard input."""
    stored, devices = Checkpoint.load(checkpoint), DeviceMesh.of()
    content = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    if not content:
        raise CommandError("the text is empty")
    encoded = stored.tokenizer.encode([content])
    risk, nats = measure(devices.parameters(stored.params), make_rows(encoded, stored.tables), devices)
    texts = stored.tokenizer.texts()
    bits = (nats / np.log(2)).tolist()
    pairs = surprisal.by_character((texts[i], b) for i, b in zip(encoded[0].tolist(), bits, strict=True))
    found = figures(float(risk.mean()) * len(nats), len(content), len(nats))
    if as_json:
        shown = [{"token": surprisal.shown(t), "bits": b} for t, b in pairs]
        print_json({**found, "per_token": shown})
        return
    if style is None:
        style = "line" if sys.stdout.isatty() and has_colours() else "table"
    surprisal.print_line(pairs) if style == "line" else surprisal.print_table(pairs)
    print(f"{sum(bits):.2f} bits in {len(content)} bytes: {found['bits_per_byte']:.3f} a byte")
