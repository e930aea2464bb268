"""Ctrl-C, and Jupyter's interrupt button, between steps only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def finish_first() -> Iterator[None]:
    """Put off an interrupt until this block is complete, then raise KeyboardInterrupt.

    An optimiser step that is torn in the middle has updated some of the weights and not the others. Whoever cannot
    wait interrupts a second time: that is raised at once.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread is ever interrupted
        yield
        return
    received = []

    def remember(number, frame) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.default_int_handler)
    if received:
        raise KeyboardInterrupt
