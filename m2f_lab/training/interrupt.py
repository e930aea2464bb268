"""Ctrl-C, and Jupyter's interrupt button, between steps only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Defer an interrupt until this block is complete, then raise KeyboardInterrupt.

    An optimiser step that stops in the middle has updated some of the weights and not the others. A second interrupt
    is raised at once.
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
