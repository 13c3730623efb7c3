"""A run on disk: one .npz file of arrays, without pickles."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxent.cli.errors import CommandError, reason
from jaxent.cli.model import Params
from jaxent.cli.proposals import ContextTable
from jaxent.cli.storage import write_whole
from jaxent.cli.tokens import Tokenizer

NAME = "checkpoint.npz"
FORMAT = "jaxent-train-1"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, and `evaluate` needs to begin.

    `settings` says what the run was asked to do, the corpus hash included: only a run of equal settings may go on.
    `state` holds the numbers of the training state, by name; `history` the losses so far.
    """

    settings: dict[str, Any]
    step: int
    tokenizer: Tokenizer
    tables: tuple[ContextTable, ...]
    params: dict[str, np.ndarray]
    optimizer: tuple[np.ndarray, ...]
    history: dict[str, list[float]]

    def save(self, folder: Path) -> None:
        head = {"format": FORMAT, "settings": self.settings, "step": self.step, "history": self.history}
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
        write_whole(folder / NAME, content.getbuffer())

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """From the file, or from the folder that holds it."""
        file = path / NAME if path.is_dir() else path
        try:
            with open(file, "rb") as raw, np.load(raw, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            head = json.loads(arrays["head"].tobytes())
            if head["format"] != FORMAT:
                raise CommandError(f"{file} has format {head['format']!r}, this version reads {FORMAT!r}")
            ends = np.cumsum(arrays["lengths"])
            text = arrays["pieces"].tobytes()
            pieces = tuple(text[end - n : end] for end, n in zip(ends, arrays["lengths"], strict=True))
            fields = [field.name for field in dataclasses.fields(ContextTable)]
            count = len({name.split("/")[1] for name in arrays if name.startswith("table/")})
            return cls(
                head["settings"],
                head["step"],
                Tokenizer(pieces),
                tuple(ContextTable(*(arrays[f"table/{i}/{name}"] for name in fields)) for i in range(count)),
                {name.removeprefix("params/"): a for name, a in arrays.items() if name.startswith("params/")},
                tuple(arrays[f"optimizer/{i}"] for i in range(sum(n.startswith("optimizer/") for n in arrays))),
                head["history"],
            )
        except FileNotFoundError as error:
            raise CommandError(f"there is no checkpoint at {path}: run `jaxent train --out {path}` first") from error
        except OSError as error:
            raise CommandError(f"cannot read {file}: {reason(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise CommandError(f"{file} is not a checkpoint of `jaxent train`") from error

    def jax_params(self) -> Params:
        return {name: jnp.asarray(value) for name, value in self.params.items()}
