"""Files that are whole or absent: written next to their place, then renamed into it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxent._command import undone
from jaxent.cli.errors import CommandError, reason

try:
    import fcntl
except ImportError:
    fcntl = None


SUFFIX = ".jaxent-partial"  # of a file that is being written, and of no other


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """`path` gets the content, or keeps what it had, whenever the process or the machine stops."""
    temporary = None

    def discard() -> None:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    with undone(discard):
        try:
            with tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX, delete=False
            ) as file:
                temporary = file.name
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
            _sync_folder(path.parent)
        except OSError as error:
            raise CommandError(f"cannot write {path}: {reason(error)}") from error
        finally:
            discard()


@contextlib.contextmanager
def exclusive_directory(path: Path) -> Iterator[None]:
    """The folder, for this process alone, without what a killed one left half written; gone again if nothing came."""
    made: list[Path] = []

    def remove() -> None:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    with contextlib.ExitStack() as held:
        held.callback(remove)
        held.enter_context(undone(remove))
        try:
            made += [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(path))
            for stale in path.glob(f".*{SUFFIX}"):
                stale.unlink()
        except OSError as error:
            raise CommandError(f"cannot write to {path}: {reason(error)}") from error
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock ends with the process, however that ends. Windows and some network file systems have none."""
    if fcntl is None:
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CommandError(f"another `jaxent train` is writing to {path}") from error
        yield
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(path: Path) -> None:
    """A rename survives a power cut once its folder is on disk; Windows has no such call."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
