"""Ctrl-C, and SIGTERM where it is answered, while something is changed that must not be left half changed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Around short work that cannot be undone half way: Ctrl-C, which the main thread gets, comes after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    asked: list[tuple[int, FrameType | None]] = []
    for number in before:
        signal.signal(number, lambda number, frame: asked.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:  # also after an error
            before[signal.Signals(asked[0][0])](*asked[0])
