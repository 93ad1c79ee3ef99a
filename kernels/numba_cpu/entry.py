"""Calling a kernel costs what a torch operation of one element costs: a job of integers, one foreign call, no allocation."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.launch import Build, Function, Kernels, Team


@functools.cache
def _process() -> tuple[Kernels, Team]:
    """Compiled entry points, and threads to run them on, of this process."""
    return Kernels(), Team()


class Entry:
    """``entry(threads, *fields)``: run the function that ``build`` makes on a job, on so many threads, and wait.

    Compiled when first called. May be called from several threads: every call has its own job.
    """

    def __init__(self, build: Build, fields: Sequence[str]) -> None:
        self._build, self._count = build, len(fields)
        self._function: Function | None = None
        self._team: Team | None = None

    def __call__(self, threads: int, *fields: int) -> None:
        if self._function is None or self._team is None:
            kernels, self._team = _process()
            self._function = kernels.function(self._build)
        assert len(fields) == self._count, (len(fields), self._count)
        self._team.run(self._function, array("q", fields), max(1, threads))


def job_reader(fields: Sequence[str]) -> Any:
    """For jitted code: the job at an address as a record. The first field is a counter that threads take work from."""
    record = numba.from_dtype(np.dtype([(name, np.int64) for name in fields]))

    def job_at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    return intrinsic(job_at)
