"""A run on disk: one .npz file of arrays, without pickles."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxent.cli.atomic_files import write_atomic
from jaxent.cli.errors import CommandError, reason
from jaxent.cli.train.ngrams import ContextTable
from jaxent.cli.train.tokenizer import Tokenizer

NAME = "checkpoint.npz"
FORMAT = "jaxent-train-1"


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
        head = {"format": FORMAT, "step": self.step, "history": self.history}
        head |= {"settings": self.settings, "text": self.text}
        pieces = self.tokenizer.pieces
        arrays = {
            "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
            "pieces": np.frombuffer(b"".join(pieces), np.uint8),
            "lengths": np.array([len(p) for p in pieces], np.int64),
        }
        for i, table in enumerate(self.tables):
            for field in dataclasses.fields(table):
                arrays[f"table/{i}/{field.name}"] = getattr(table, field.name)
        arrays |= {f"params/{name}": value for name, value in self.params.items()}
        arrays |= {f"optimizer/{i}": value for i, value in enumerate(self.optimizer)}
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_atomic(folder / NAME, content.getbuffer())

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """From the file, or from the folder that holds it."""
        with _stored(path) as arrays:
            head = _head(arrays)
            lengths = arrays["lengths"]
            text = arrays["pieces"].tobytes()
            pieces = tuple(text[end - n : end] for end, n in zip(np.cumsum(lengths), lengths, strict=True))
            fields = [field.name for field in dataclasses.fields(ContextTable)]
            count = len({name.split("/")[1] for name in arrays if name.startswith("table/")})
            return cls(
                head["settings"],
                head["text"],
                head["step"],
                Tokenizer(pieces),
                tuple(ContextTable(*(arrays[f"table/{i}/{name}"] for name in fields)) for i in range(count)),
                {name.removeprefix("params/"): arrays[name] for name in arrays if name.startswith("params/")},
                tuple(arrays[f"optimizer/{i}"] for i in range(sum(n.startswith("optimizer/") for n in arrays))),
                head["history"],
            )

    @staticmethod
    def options(path: Path) -> dict[str, Any]:
        """The options of `jaxent train` that wrote the checkpoint; none where there is no checkpoint."""
        if not (path / NAME).exists():
            return {}
        with _stored(path) as arrays:
            head = _head(arrays)
            return {name: value for name, value in (head["settings"] | head["text"]).items() if name != "corpus"}


def _head(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    head = json.loads(arrays["head"].tobytes())
    if head["format"] != FORMAT:
        raise CommandError(f"the checkpoint has format {head['format']!r}, this version reads {FORMAT!r}")
    return head


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of the file, or of the folder that holds it; whatever is wrong with them is one clear error."""
    file = path / NAME if path.is_dir() else path
    try:
        with open(file, "rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            yield arrays
    except CommandError:
        raise
    except FileNotFoundError as error:
        raise CommandError(f"there is no checkpoint at {path}: run `jaxent train --out {path}` first") from error
    except OSError as error:
        raise CommandError(f"cannot read {file}: {reason(error)}") from error
    except Exception as error:  # what a damaged archive raises depends on which byte is wrong
        raise CommandError(f"{file} is not a checkpoint of `jaxent train`") from error
