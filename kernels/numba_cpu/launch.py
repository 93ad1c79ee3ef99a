"""Running kernels on all of torch's threads.

numba's ``prange`` would bring a second OpenMP runtime whose idle threads spin against torch's. Here every thread of the team
torch already keeps calls the same C function, and the threads share the work through an atomic counter.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from skvq.kernels.numba_cpu.compiled import Function
from skvq.kernels.numba_cpu.job import Job


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the job's memory, which the kernel writes to (counters), and a copy from before it ran."""

    function: Function
    job: Job
    image: Job
    threads: int


class Recorder(Protocol):
    """Observes launches, and lends them workspace (``tape.py``)."""

    def launch(self, team: Team, launch: Launch) -> None:
        """Called before the launch runs."""

    def workspace(self, nbytes: int) -> Tensor:
        """Memory for one launch, at least ``nbytes``; may be shared by all launches of this recording."""


class _Here(threading.local):
    """The recorder of the current thread."""

    tape: Recorder | None = None


here = _Here()


def workspace(nbytes: int) -> Tensor:
    """Scratch memory for one launch: uint8, at least ``nbytes``."""
    return torch.empty(nbytes, dtype=torch.uint8) if here.tape is None else here.tape.workspace(nbytes)


class Team:
    """Calls a C function ``void(int64)`` once on each of torch's threads and waits for all."""

    def __init__(self) -> None:
        self._parallel = _torch_openmp()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def parallel_address(self) -> int:
        """Address of ``GOMP_parallel``; 0 if torch has none."""
        return 0 if self._parallel is None else int(ctypes.cast(self._parallel, ctypes.c_void_p).value or 0)

    def run(self, function: Function, job: Job, threads: int) -> None:
        """Run ``function`` on the job on ``threads`` threads, and wait for all of them."""
        if here.tape is not None:
            here.tape.launch(self, Launch(function, job, job[:], threads))
        argument = job.buffer_info()[0]
        if threads == 1:
            function.call(argument)
        elif self._parallel is not None:
            self._parallel(function.address, argument, threads, 0)
        else:
            self._pool = self._pool or ThreadPoolExecutor(max(1, torch.get_num_threads()))
            list(self._pool.map(function.call, [argument] * threads))


def _torch_openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP runtime that torch is linked to (libgomp, or Intel's and LLVM's that speak it too)."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                function = ctypes.CDLL(str(folder / name)).GOMP_parallel
            except (OSError, AttributeError):
                return None
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None
            return function
    return None
