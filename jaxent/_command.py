"""Ctrl-C and SIGTERM in the command `jaxent`, from its first import to its end: one line and the exit code of a shell.

Importing jax takes a second, in which KeyboardInterrupt is a long traceback or gets lost in a callback; and Python must
not shut down while XLA's threads compute, which crashes. So no signal raises an exception here. A thread of its own
reads them, since the main thread may be inside XLA for seconds, and ends the process at once, unless the main thread
has asked for time to write a checkpoint. Files are written so that they survive this (`jaxent.cli.atomic_files`).

`jaxent/__init__.py` imports this module before everything else. In any other process it does nothing.
"""

# What is below the first handlers takes some milliseconds to import.
# ruff: noqa: E402
import os
import signal
import sys

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def is_command() -> bool:
    """Whether this process was started as `jaxent`, `python -m jaxent` or `python -m jaxent.cli`."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m":  # Python is still looking for the module, whose name stands before the arguments
        name = sys.orig_argv[-len(sys.argv)]
        name = name.partition("m")[2] if name.startswith("-") else name
        return name in ("jaxent", "jaxent.cli", "jaxent.__main__", "jaxent.cli.__main__")
    return name in ("jaxent", "jaxent.exe", "jaxent-script.py", "jaxent-script.pyw")


def leave(signum: int, frame: object = None) -> None:
    """Ends the process here and now, with one line."""
    try:  # noqa: SIM105
        os.write(2, b"jaxent: interrupted\n")
    except OSError:
        pass
    os._exit(128 + signum)


def take(handler: "Callable[[int, object], None]") -> None:
    """Calls `handler` for the signals that stop a process."""
    for signum in STOPPING:
        # nohup ignores SIGHUP, which stays so. A shell that starts a job in the background ignores SIGINT for it, but
        # a run that is asked to stop by name should keep its work.
        if signum == signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


if is_command():
    take(leave)

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

# A wrapper such as `uv run` passes Ctrl-C on to a child that has had it from the terminal already.
SAME_REQUEST = 1.0  # seconds; heuristic


class Received:
    """The signal that arrived while it was deferred; 0 for none."""

    def __init__(self) -> None:
        self.signum = 0
        self.at = 0.0


_installed = False
_deferred: Received | None = None
_cleanups: list[Callable[[], None]] = []
_ending = threading.Lock()  # held by whoever writes the last line; never released


def install() -> None:
    """From now on signals end this process as the module says; a second call takes them back from who took them."""
    global _installed
    if not _installed:
        _open_streams()
    take(_on_signal)
    if _installed:
        return
    _installed = True
    # XLA's errors are exceptions too, and told in one line. A process that imports jax hands a 1 down to its children.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if os.name == "posix":
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(read,), name="jaxent signals", daemon=True).start()


def _on_signal(signum: int, frame: object) -> None:
    """The thread acts; on Windows, where no pipe can wake it, the main thread does."""
    if os.name != "posix":
        _act(signum)


def _watch(read: int) -> None:
    while True:
        for signum in os.read(read, 64):
            if signum in STOPPING:
                _act(signum)


def _act(signum: int) -> None:
    received = _deferred
    if received is None:
        _end(signum)
    elif not received.signum:
        received.signum, received.at = signum, time.monotonic()
    elif time.monotonic() - received.at > SAME_REQUEST:
        _end(signum)


def _end(signum: int) -> None:
    """`leave`, after the clean-ups, unless the process is ending already."""
    if not _ending.acquire(blocking=False):
        return
    for cleanup in reversed(_cleanups):
        with contextlib.suppress(Exception):
            cleanup()
    leave(signum)


def finish() -> None:
    """Signals come too late from here on: what the command had to say has been said, or is about to be."""
    if _installed and not _ending.acquire(blocking=False):
        while True:  # the thread that holds it ends the process
            time.sleep(1)


@contextlib.contextmanager
def deferred() -> Iterator[Received]:
    """Within the block the first signal is only noted; the next one, a second later or more, ends the process."""
    global _deferred
    received = _deferred = Received()
    try:
        yield received
        if received.signum:  # too late for the main thread to have seen it
            _end(received.signum)
    finally:
        if not received.signum:  # else the process is ending in order, and may still get the same request
            _deferred = None


@contextlib.contextmanager
def undone(cleanup: Callable[[], None]) -> Iterator[None]:
    """A signal that ends the process within the block calls `cleanup` first."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


def is_installed() -> bool:
    return _installed


def _open_streams() -> None:
    """A stream that was closed (`>&-`) leads nowhere. Else the next file to be opened would get its number."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _import_jax() -> None:
    """A variable that jax does not take, or a jaxlib of another version, is one line, not a traceback."""
    try:
        import jax  # noqa: F401
    except Exception as error:
        finish()
        text = str(error)
        # "invalid literal for int() with base 10: 'abc'" does not tell whose.
        given = [f"{n}={v}" for n, v in os.environ.items() if n.startswith("JAX") and v and repr(v) in text]
        told = f"jax does not take {' or '.join(given)}" if given else f"cannot import jax: {' '.join(text.split())}"
        print(f"jaxent: {told.encode('unicode_escape').decode()}", file=sys.stderr, flush=True)
        os._exit(2)


if is_command():
    install()
    _import_jax()
