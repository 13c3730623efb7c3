"""Ctrl-C and SIGTERM wait until the work in hand is finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxent import _command
from jaxent._command import Received


@contextmanager
def deferred_signals() -> Iterator[Received]:
    """Within the block the first SIGINT or SIGTERM is only noted; a second one interrupts at once."""
    if _command.is_installed():
        with _command.deferred() as received:
            yield received
        return
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals are the main thread's
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if received.signum:
            raise KeyboardInterrupt
        received.signum = signum

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
