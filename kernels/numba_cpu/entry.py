"""Kernels called with plain integers, as cheaply as a small torch operation: one array, one foreign call."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from threading import Lock

from skvq.kernels.numba_cpu.compiled import Build, Function, Kernels
from skvq.kernels.numba_cpu.launch import Team


def process_kernels() -> tuple[Kernels, Team]:
    """Compiled entry points, and threads to run them on, of this process."""
    with _MAKING:
        return _made()


@functools.cache
def _made() -> tuple[Kernels, Team]:
    return Kernels(), Team()


_MAKING = Lock()  # threads that load engines at once would each compile everything


class Entry:
    """``entry(threads, *fields)``: run the function that ``build`` makes on a job, on so many threads, and wait.

    ``fields`` are named as jitted code reads them (``simd.record_at``), all int64. Compiled when first called. May be called
    from several threads: every call has its own job.
    """

    def __init__(self, build: Build, fields: Sequence[str]) -> None:
        self._build, self._count = build, len(fields)
        self._function: Function | None = None
        self._team: Team | None = None

    def __call__(self, threads: int, *fields: int) -> None:
        if self._function is None or self._team is None:
            kernels, self._team = process_kernels()
            self._function = kernels.function(self._build)
        assert len(fields) == self._count, (len(fields), self._count)
        self._team.run(self._function, array("q", fields), max(1, threads))
