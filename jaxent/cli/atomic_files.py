"""Files that are whole or absent: written beside their place, then renamed into it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxent.cli.errors import CommandError, reason

try:
    import fcntl
except ImportError:
    fcntl = None


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """`path` gets the content, or keeps what it had, whenever the process or the machine stops."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
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
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def exclusive_directory(path: Path) -> Iterator[None]:
    """The folder, for this process alone, without what a killed one left half written; gone again if nothing came."""
    is_new = not path.exists()
    with contextlib.ExitStack() as held:
        try:
            path.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(path))
            for name in ("checkpoint.npz", "report.json", "loss.png"):
                for stale in path.glob(f".{name}.*"):
                    stale.unlink()
        except OSError as error:
            raise CommandError(f"cannot write to {path}: {reason(error)}") from error
        try:
            yield
        finally:
            if is_new:
                with contextlib.suppress(OSError):
                    path.rmdir()


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
