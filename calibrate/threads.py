"""Sums in one order whatever the number of threads, so that a calibration has the same bytes on one core and on many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch


class _Alone:
    """Who computes on one thread now. One that begins meanwhile finds torch at one thread: it is given what the first had."""

    def __init__(self) -> None:
        self._lock, self._inside, self._threads = Lock(), 0, 1

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._threads = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._threads)


_ONE = _Alone()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread on the CPU. More of them split a product or a sum elsewhere, and its last bits differ."""
    _ONE.enter()
    try:
        yield
    finally:
        _ONE.leave()
