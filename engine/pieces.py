"""Long work done in pieces: a generator that yields between two of them, where other work may be done, and returns its result.

Closed early it is broken off, as by an error.
"""

from __future__ import annotations

import time
from collections.abc import Generator
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
    """Seconds that pieces take, without what is done between them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, pieces: Pieces[R]) -> Pieces[R]:
        """The same pieces, their seconds counted."""
        try:
            while True:
                start = time.perf_counter()
                try:
                    next(pieces)
                except StopIteration as end:
                    result: R = end.value
                    return result
                finally:
                    self.seconds += time.perf_counter() - start
                yield
        finally:
            pieces.close()
