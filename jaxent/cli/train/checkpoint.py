"""A run on disk: one .npz file of arrays, without pickles."""

import dataclasses
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxent.cli.atomic_files import write_atomic
from jaxent.cli.errors import CommandError, reason
from jaxent.cli.output import to_json
from jaxent.cli.pipes import open_without_waiting
from jaxent.cli.train import model
from jaxent.cli.train.ngrams import CORPUS_ORDERS, ContextTable
from jaxent.cli.train.tokenizer import Tokenizer

NAME = "checkpoint.npz"
FORMAT = "jaxent-train-2"
FIELDS = tuple(field.name for field in dataclasses.fields(ContextTable))
HISTORY = frozenset({"step", "token", "byte", "held_step", "held_byte"})
# The settings, with what `jaxent train` takes for them; the corpus is a digest, the mesh an option or none.
NUMBERS = {"vocab_size": int, "width": int, "steps": int, "batch_rows": int, "learning_rate": float, "seed": int}


class Damaged(Exception):
    """What is wrong with a file that calls itself a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, and `evaluate` needs to begin.

    `settings` decide the result to the last bit, the corpus hash included: only a run of equal settings may go on.
    `text` says where the corpus was read, and how much of it; `history` holds the losses so far.
    """

    settings: dict[str, Any]
    text: dict[str, Any]
    step: int
    tokenizer: Tokenizer
    tables: tuple[ContextTable, ...]
    params: dict[str, np.ndarray]
    optimizer: tuple[np.ndarray, ...]
    history: dict[str, list[float]]

    def save(self, folder: Path) -> None:
        pieces = self.tokenizer.pieces
        arrays = {
            "pieces": np.frombuffer(b"".join(pieces), np.uint8),
            "lengths": np.array([len(p) for p in pieces], np.int64),
        }
        for i, table in enumerate(self.tables):
            for field in FIELDS:
                arrays[f"table/{i}/{field}"] = getattr(table, field)
        arrays |= {f"params/{name}": value for name, value in self.params.items()}
        arrays |= {f"optimizer/{i}": value for i, value in enumerate(self.optimizer)}
        head = {"format": FORMAT, "step": self.step, "history": self.history, "settings": self.settings}
        head |= {"text": self.text, "arrays": {name: _kind(x) for name, x in arrays.items()}}
        content = io.BytesIO()
        np.savez(content, head=np.frombuffer(to_json(head).encode(), np.uint8), **arrays)
        write_atomic(folder / NAME, content.getbuffer())

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """From the file, or from the folder that holds it."""
        return _understood(path, _whole)

    @staticmethod
    def options(path: Path) -> dict[str, Any]:
        """The options of `jaxent train` that wrote the checkpoint; none where there is no checkpoint."""
        if not os.path.lexists(path / NAME):
            return {}
        return _understood(path, _options)


def _kind(x: np.ndarray) -> list[Any]:
    return [x.dtype.str, *x.shape]


def _understood(path: Path, read: Any) -> Any:
    """What `read` makes of the arrays; whatever is wrong with them is one clear error."""
    file = path / NAME if path.is_dir() else path
    try:
        return read(_arrays(file))
    except FileNotFoundError as error:
        raise CommandError(f"there is no checkpoint at {path}: run `jaxent train --out {path}` first") from error
    except OSError as error:
        raise CommandError(f"cannot read {file}: {reason(error)}") from error
    except Exception as error:  # what a damaged archive raises depends on which byte is wrong
        told = f": {error}" if isinstance(error, Damaged) else ""
        raise CommandError(f"{file} is not a checkpoint of `jaxent train`{told}") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file, none of which takes more memory than it takes on disk."""
    with open_without_waiting(path) as raw:
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise Damaged("it is not a regular file")
        with zipfile.ZipFile(raw) as archive:
            entries = archive.infolist()
            if len({entry.filename for entry in entries}) < len(entries):
                raise Damaged("two of its arrays have one name")
            if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
                raise Damaged("it is compressed")
            return {e.filename.removesuffix(".npy"): _array(archive.read(e)) for e in entries}


def _array(content: bytes) -> np.ndarray:
    """What `np.save` wrote; the header is checked before anything is allocated."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise Damaged(f"an array has version {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    rest = content[file.tell() :]
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(rest):
        raise Damaged("an array has another size than its header says")
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if fortran_order else "C").copy()


def _head(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    head = json.loads(arrays["head"].tobytes())
    if head["format"] != FORMAT:
        raise Damaged(f"it has format {head['format']!r}, and this version reads {FORMAT!r}")
    settings, text, step, history = (head[name] for name in ("settings", "text", "step", "history"))
    for name, kind in NUMBERS.items():
        if type(settings[name]) is not kind or not 0 <= settings[name] < math.inf:
            raise Damaged(f"the setting {name} is {settings[name]!r}")
    if not isinstance(settings["corpus"], str) or not isinstance(settings["mesh"], str | None):
        raise Damaged("the settings are not those of a run")
    if not (isinstance(text["max_bytes"], int) and all(isinstance(path, str) for path in text["paths"])):
        raise Damaged("it does not say what text was read")
    if type(step) is not int or not 0 < step <= settings["steps"]:
        raise Damaged(f"it is of step {step!r} of {settings['steps']}")
    if history.keys() != HISTORY:
        raise Damaged(f"the history has the fields {', '.join(sorted(history))}")
    for name, values in history.items():
        # A loss that was not finite is null.
        if not all(type(x) in (int, float) or (x is None and name == "held_byte") for x in values):
            raise Damaged(f"the history of {name} is not of numbers")
    if len({len(history[name]) for name in ("step", "token", "byte")}) > 1 or not history["step"]:
        raise Damaged("the history is not of one length")
    if len(history["held_step"]) != len(history["held_byte"]):
        raise Damaged("the history of the held-out sample is not of one length")
    return head


def _options(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    head = _head(arrays)
    return {name: value for name, value in (head["settings"] | head["text"]).items() if name != "corpus"}


def _whole(arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    head = _head(arrays)
    settings, history = head["settings"], head["history"]
    found = {name: _kind(x) for name, x in arrays.items() if name != "head"}
    if found != head["arrays"]:
        wrong = sorted({name for name, _ in found.items() ^ head["arrays"].items()})
        raise Damaged(f"it lacks {wrong[0]}, or has another one than it says")
    tokenizer = _tokenizer(arrays)
    if tokenizer.size > settings["vocab_size"]:
        raise Damaged(f"it has {tokenizer.size} tokens, more than {settings['vocab_size']}")
    params = {n.removeprefix("params/"): x for n, x in arrays.items() if n.startswith("params/")}
    shapes = model.shapes(tokenizer.size, settings["width"])
    if {name: (x.shape, x.dtype) for name, x in params.items()} != {n: (s, np.float32) for n, s in shapes.items()}:
        raise Damaged("its parameters have other names or shapes than its settings ask for")
    optimizer = tuple(arrays[f"optimizer/{i}"] for i in range(sum(n.startswith("optimizer/") for n in arrays)))
    if not all(np.isfinite(x).all() for x in (*params.values(), *optimizer)):
        raise Damaged("some of its numbers are not finite")
    tables = tuple(_table(arrays, i, tokenizer.size) for i in range(len(CORPUS_ORDERS)))
    history["held_byte"] = [math.nan if x is None else x for x in history["held_byte"]]
    return Checkpoint(settings, head["text"], head["step"], tokenizer, tables, params, optimizer, history)


def _tokenizer(arrays: Mapping[str, np.ndarray]) -> Tokenizer:
    text, lengths = arrays["pieces"].tobytes(), arrays["lengths"]
    if lengths.ndim != 1 or np.any(lengths < 2) or lengths.sum() != len(text):
        raise Damaged("the lengths of its tokens do not add up")
    pieces = tuple(text[end - n : end] for end, n in zip(np.cumsum(lengths), lengths, strict=True))
    if len(set(pieces)) < len(pieces):
        raise Damaged("two of its tokens are the same")
    return Tokenizer(pieces)


def _table(arrays: Mapping[str, np.ndarray], i: int, vocab_size: int) -> ContextTable:
    table = ContextTable(*(arrays[f"table/{i}/{field}"] for field in FIELDS))
    n = len(table.keys)
    if (table.keys.shape, table.tokens.shape, table.counts.shape, table.totals.shape) != ((n,), (n, 2), (n, 2), (n,)):
        raise Damaged(f"table {i} has columns of several lengths")
    if np.any(table.keys[1:] <= table.keys[:-1]) or np.any((table.tokens < 0) | (table.tokens >= vocab_size)):
        raise Damaged(f"table {i} is not in order")
    return table
