"""The text: which files, in what order, and which of them are held out."""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxent.cli.errors import CommandError, reason

# Tests are left out because some systems do not ship them; the rest of the standard library is the same everywhere.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
HELD_OUT_SHARE = 0.1
HELD_OUT_BYTES = 200_000


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: bytes

    @property
    def rank(self) -> bytes:
        """Decides which files are held out: it depends on the name alone, so adding a file moves no other."""
        return hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).digest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in the order of their rank, those to learn from and those held out."""

    source: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all names, lengths and texts."""
        total = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                total.update(document.rank + len(document.text).to_bytes(8, "big") + document.text)
            total.update(b"held out")
        return total.hexdigest()


def read_corpus(paths: Sequence[str], max_bytes: int) -> Corpus:
    """Text files and folders; without any, the running Python's standard library. Files beyond the cap are left out."""
    if paths:
        documents, source = read_documents(paths), " ".join(paths)
    else:
        root = Path(sysconfig.get_path("stdlib"))
        documents = [_read(file, file.relative_to(root).as_posix()) for file in _library_files(root)]
        source = "the standard library of this Python"
    chosen, size = [], 0
    for document in sorted(documents, key=lambda d: d.rank):
        if size + len(document.text) <= max_bytes:
            chosen.append(document)
            size += len(document.text)
    if documents and not chosen:
        raise CommandError(f"every file of {source} is longer than --max-bytes {max_bytes}")
    if not size:
        raise CommandError(f"the corpus is empty: no text in {source}")
    return _split(source, [d for d in chosen if d.text])


def read_documents(paths: Iterable[str]) -> list[Document]:
    """The given files, and the text files below the given folders, each once, in sorted order."""
    files: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files |= dict.fromkeys(_files_below(path))
        else:
            files[path] = None
    return [_read(file, file.as_posix()) for file in files]


def _library_files(root: Path) -> list[Path]:
    return [file for file in _files_below(root, SKIPPED_FOLDERS) if file.suffix == ".py"]


def _files_below(root: Path, skipped: frozenset[str] = frozenset({"__pycache__"})) -> list[Path]:
    def fail(error: OSError) -> None:
        raise CommandError(f"cannot read {error.filename}: {reason(error)}")

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return found


def _read(path: Path, name: str) -> Document:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {reason(error)}") from error
    if b"\0" in text:
        raise CommandError(f"{path} is not text: it has a zero byte at {text.index(0)}")
    return Document(name, text)


def _split(source: str, documents: list[Document]) -> Corpus:
    """Held out are the first files by rank that fit a tenth of the bytes; of one file alone, its last tenth."""
    budget = min(HELD_OUT_BYTES, HELD_OUT_SHARE * sum(len(d.text) for d in documents))
    held, size = [], 0
    for document in documents:
        if size + len(document.text) <= budget:
            held.append(document)
            size += len(document.text)
    if not held and len(documents) > 1:
        held = [min(documents, key=lambda d: len(d.text))]
    if held:
        return Corpus(source, tuple(d for d in documents if d not in held), tuple(held))
    whole = documents[0]
    cut = len(whole.text) - max(1, len(whole.text) // 10)
    if cut == 0:
        raise CommandError(f"the corpus is too small: one byte in {source}")
    return Corpus(source, (Document(whole.name, whole.text[:cut]),), (Document(whole.name, whole.text[cut:]),))
