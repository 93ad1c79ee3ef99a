"""Long work done in pieces: a generator that yields between two of them, where other work may be done, and returns its result.

Closed early it is broken off, as by an error.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

R = TypeVar("R")
Pieces = Generator[None, None, R]


def finished(pieces: Pieces[R]) -> R:
    """All pieces one after another: the result."""
    try:
        while True:
            next(pieces)
    except StopIteration as end:
        result: R = end.value
        return result
    finally:
        pieces.close()


class Stopwatch:
    """Seconds that pass, but for what is done in pauses."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time stands still."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin
