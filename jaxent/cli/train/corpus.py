"""The text: which files, in what order, and which of them are held out."""

import dataclasses
import errno
import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxent.cli.errors import CommandError, reason

# Tests are left out because some systems do not ship them; the rest of the standard library is the same everywhere.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
HELD_OUT_SHARE = 0.1
HELD_OUT_BYTES = 200_000
HEAD_BYTES = 65_536  # of a file, in which a zero byte shows that it is not text


class NotText(CommandError):
    """A file that was named has a zero byte. A folder may hold such files; they are passed over."""


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: bytes

    @property
    def rank(self) -> bytes:
        return rank(self.name)


def rank(name: str) -> bytes:
    """Decides which files are held out: it depends on the name alone, so adding a file moves no other."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


@dataclasses.dataclass(frozen=True)
class Source:
    """A file that was found; `named` if the user named it and not a folder that holds it."""

    path: Path
    name: str
    named: bool

    def read(self, limit: int | None = None) -> bytes | None:
        """The text; None for a file that is longer than `limit`."""
        try:
            if limit is not None and self.path.is_file() and self.path.stat().st_size > limit:
                return None
            with open(self.path, "rb") as file:
                text = file.read(HEAD_BYTES)
                if b"\0" not in text:
                    text += file.read(-1 if limit is None else max(0, limit + 1 - len(text)))
        except OSError as error:
            raise CommandError(f"cannot read {self.path}: {reason(error)}") from error
        if b"\0" in text:
            raise NotText(f"{self.path} is not text: it has a zero byte at {text.index(0)}")
        return text if limit is None or len(text) <= limit else None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in the order of their rank, those to learn from and those held out."""

    source: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    left_out: int = 0  # files that are not text or do not fit the cap

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
        sources, source = find_sources(paths), " ".join(paths)
    else:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _files_below(root, SKIPPED_FOLDERS) if file.suffix == ".py"]
        sources = [Source(file, file.relative_to(root).as_posix(), named=False) for file in files]
        source = "the standard library of this Python"
    chosen: list[Document] = []
    size, not_text = 0, None
    for file in sorted(sources, key=lambda s: rank(s.name)):
        try:
            text = file.read(max_bytes - size)
        except NotText as error:
            if file.named:
                raise
            not_text = error
            continue
        if text is not None:
            chosen.append(Document(file.name, text))
            size += len(text)
    if not chosen and not_text is not None:
        raise not_text
    if sources and not chosen:
        raise CommandError(f"every file of {source} is longer than --max-bytes {max_bytes}")
    if not size:
        raise CommandError(f"the corpus is empty: no text in {source}")
    return _split(source, [d for d in chosen if d.text], len(sources) - len(chosen))


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The given files, and the regular files below the given folders, each once, in sorted order."""
    found: dict[Path, Source] = {}
    for given in map(Path, paths):
        try:
            given.stat()
        except OSError as error:
            raise CommandError(f"cannot read {given}: {reason(error)}") from error
        inside = _files_below(given) if given.is_dir() else None
        for file in [given] if inside is None else inside:
            found.setdefault(file, Source(file, file.as_posix(), named=inside is None))
    return list(found.values())


def read_documents(paths: Sequence[str]) -> Iterator[Document]:
    """The files that `find_sources` finds, one at a time, without those in folders that are not text."""
    not_text, count = None, 0
    for source in find_sources(paths):
        try:
            text = source.read()
        except NotText as error:
            if source.named:
                raise
            not_text = error
            continue
        if text:
            count += 1
            yield Document(source.name, text)
    if not count:
        raise not_text or CommandError(f"there is no text in {' '.join(paths)}")


def _files_below(root: Path, skipped: frozenset[str] = frozenset({"__pycache__"})) -> list[Path]:
    def fail(error: OSError) -> None:
        raise CommandError(f"cannot read {error.filename}: {reason(error)}")

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return [file for file in found if _is_regular(file)]


def _is_regular(path: Path) -> bool:
    """False for a pipe, a device, and a link that leads nowhere."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return False
        raise CommandError(f"cannot read {path}: {reason(error)}") from error


def _split(source: str, documents: list[Document], left_out: int) -> Corpus:
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
        return Corpus(source, tuple(d for d in documents if d not in held), tuple(held), left_out)
    whole = documents[0]
    cut = len(whole.text) - max(1, len(whole.text) // 10)
    if cut == 0:
        raise CommandError(f"the corpus is too small: one byte in {source}")
    ends = (Document(whole.name, whole.text[:cut]), Document(whole.name, whole.text[cut:]))
    return Corpus(source, (ends[0],), (ends[1],), left_out)
