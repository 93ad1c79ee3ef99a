"""Calling a kernel costs what a torch operation of one element costs: a job of integers, one foreign call, no allocation."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from skvq.kernels.numba_cpu.launch import Build, Kernels, Team, _torch_openmp


@functools.cache
def _process() -> tuple[Kernels, Team, Any]:
    """Compiled entry points, and threads to run them on, of this process."""
    return Kernels(), Team(), _torch_openmp()


class Entry:
    """``entry(threads, *fields)``: run the function that ``build`` makes on a job, on so many threads, and wait.

    Compiled when first called. May be called from several threads: every call has its own job.
    """

    def __init__(self, build: Build, fields: Sequence[str]) -> None:
        self._build = build
        self._job = ctypes.c_int64 * len(fields)
        self._address = 0
        self._function: Any = None
        self._team: Any = None
        self._parallel: Any = None

    def __call__(self, threads: int, *fields: int) -> None:
        if self._function is None:
            kernels, self._team, self._parallel = _process()
            self._address = kernels.address(self._build)
            self._function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._address)
        assert len(fields) == self._job._length_, (len(fields), self._job._length_)
        job = self._job(*fields)
        if threads <= 1:
            self._function(ctypes.addressof(job))
        elif self._parallel is not None:
            self._parallel(self._address, ctypes.addressof(job), threads, 0)
        else:
            self._team.run(self._address, np.frombuffer(job, np.int64), threads)


def job_reader(fields: Sequence[str]) -> Any:
    """For jitted code: the job at an address as a record. The first field is a counter that threads take work from."""
    record = numba.from_dtype(np.dtype([(name, np.int64) for name in fields]))

    def job_at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    return intrinsic(job_at)
