"""The text: which files, in what order, and which of them are held out."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import select
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from jaxent.cli.errors import CommandError, reason
from jaxent.cli.output import say
from jaxent.cli.pipes import open_without_waiting

# Tests are left out because some systems do not ship them; the rest of the standard library is the same everywhere.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
HELD_OUT_SHARE = 0.1
HELD_OUT_BYTES = 200_000
HEAD_BYTES = 65_536  # of a file, in which a zero byte shows that it is not text
PIECE_BYTES = 2**20  # read at a time
PATIENCE = 1.0  # seconds to wait for a pipe or a terminal before saying so
# What `jaxent train` writes into the folder of a run.
RUN_FILES = frozenset({"checkpoint.npz", "report.json", "loss.png"})


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
    """A file that was found; `named` if the user named it and not a folder that holds it.

    `name` is its path below the folder that the user named, or its last part: wherever the corpus lies, and however the
    way to it is spelt, it is the same corpus.
    """

    path: Path
    name: str
    named: bool

    def read(self, limit: int | None = None) -> bytes | None:
        """The text; None for a file that is longer than `limit`."""
        try:
            if limit is not None and self.path.is_file() and self.path.stat().st_size > limit:
                return None
            with _opened(self.path) as file:
                read = bytearray(file.read(HEAD_BYTES))
                if b"\0" not in read:  # a device or a pipe may have no end
                    while (limit is None or len(read) <= limit) and (piece := file.read(PIECE_BYTES)):
                        read += piece
        except OSError as error:
            raise CommandError(f"cannot read {self.path}: {reason(error)}") from error
        text = bytes(read)
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


def read_corpus(paths: Sequence[str], max_bytes: int, out: Path | None = None) -> Corpus:
    """Text files and folders; without any, the running Python's standard library. Files beyond the cap are left out.

    Nor is anything read that a run has written, to `out` or elsewhere below the folders.
    """
    if paths:
        sources, source = find_sources(paths, out), " ".join(paths)
    else:
        root = Path(sysconfig.get_path("stdlib"))
        found = _files_below(root, SKIPPED_FOLDERS)
        sources = [Source(path, name, named=False) for path, name, _ in found if path.suffix == ".py"]
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


def find_sources(paths: Sequence[str], out: Path | None = None) -> list[Source]:
    """The given files, and the regular files below the given folders, each once, in the order of names in a folder."""
    found: dict[str, Source] = {}  # by the real path: one file, however the way to it is spelt
    for given in map(Path, paths):
        try:
            status = given.stat()
        except (OSError, ValueError) as error:
            raise CommandError(f"cannot read {given}: {_why(error)}") from error
        if stat.S_ISDIR(status.st_mode):
            for path, name, real in _files_below(given, out=out):
                found.setdefault(real, Source(path, name, named=False))
        else:
            found.setdefault(os.path.realpath(given), Source(given, given.name, named=True))
    return list(found.values())


def _opened(path: Path) -> BinaryIO:
    """The file for reading. A pipe that nothing writes to is an error, and any other wait is announced."""
    file = open_without_waiting(path)
    kind = os.fstat(file.fileno()).st_mode
    if os.name == "posix" and not stat.S_ISREG(kind):
        os.set_blocking(file.fileno(), True)
        if not select.select([file], [], [], PATIENCE)[0]:
            say(f"waiting for text from {path}")
        if stat.S_ISFIFO(kind) and not file.peek(1):
            file.close()
            raise CommandError(f"cannot read {path}: nothing writes to this pipe")
    return file


def _why(error: OSError | ValueError) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)


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
            yield Document(source.path.as_posix(), text)
    if not count:
        raise not_text or CommandError(f"there is no text in {' '.join(paths)}")


def _files_below(
    root: Path, skipped: frozenset[str] = frozenset({"__pycache__"}), out: Path | None = None
) -> Iterator[tuple[Path, str, str]]:
    """Each regular file, its path below `root` and its real path."""

    def fail(error: OSError) -> None:
        raise CommandError(f"cannot read {error.filename}: {reason(error)}")

    streams = _own_streams()
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        real = os.path.realpath(folder)
        is_run = "checkpoint.npz" in names or (out is not None and _same_folder(folder, out))
        for name in sorted(names):
            if name.startswith(".") or (is_run and name in RUN_FILES):
                continue
            path = Path(folder, name)
            status = _status(path)
            if status is None or not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) in streams:
                continue
            one = os.path.realpath(path) if path.is_symlink() else os.path.join(real, name)
            yield path, path.relative_to(root).as_posix(), one


def _own_streams() -> set[tuple[int, int]]:
    """The files that this command's own output goes to, as in `jaxent train . > log`."""
    found = set()
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            found.add((status.st_dev, status.st_ino))
    return found


def _same_folder(a: str, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _status(path: Path) -> os.stat_result | None:
    """None for a link that leads nowhere."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise CommandError(f"cannot read {path}: {reason(error)}") from error


def _split(source: str, documents: list[Document], left_out: int) -> Corpus:
    """Held out are the first files by rank that fit a tenth of the bytes; of one file alone, its last tenth."""
    budget = min(HELD_OUT_BYTES, HELD_OUT_SHARE * sum(len(d.text) for d in documents))
    held, size = set(), 0
    for i, document in enumerate(documents):
        if size + len(document.text) <= budget:
            held.add(i)
            size += len(document.text)
    if not held and len(documents) > 1:
        held = {min(range(len(documents)), key=lambda i: len(documents[i].text))}
    if held:
        train, held_out = (tuple(d for i, d in enumerate(documents) if (i in held) is out) for out in (False, True))
        return Corpus(source, train, held_out, left_out)
    whole = documents[0]
    cut = len(whole.text) - max(1, len(whole.text) // 10)
    if cut == 0:
        raise CommandError(f"the corpus is too small: one byte in {source}")
    ends = (Document(whole.name, whole.text[:cut]), Document(whole.name, whole.text[cut:]))
    return Corpus(source, (ends[0],), (ends[1],), left_out)
