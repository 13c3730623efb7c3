"""Ctrl-C and SIGTERM wait until the work in hand is finished."""

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@dataclasses.dataclass
class Received:
    signum: int = 0


@contextmanager
def deferred_signals() -> Iterator[Received]:
    """Within the block the first SIGINT or SIGTERM is only noted; a second one interrupts at once."""
    received = Received()

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
