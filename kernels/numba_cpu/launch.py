"""Compiling kernels, once per installation, and running them on all of torch's threads.

numba's ``prange`` would bring a second OpenMP runtime whose idle threads spin against torch's. Here every thread of the team
torch already keeps calls the same C function, and the threads share the work through an atomic counter.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from numba import cfunc, types
from torch import Tensor

from skvq.kernels.numba_cpu.job import Job

Build = Callable[[int], Callable[[int], None]]
NOTICE_SECONDS = 2.0
"""Loading from numba's cache is faster than this: after so long a kernel is being compiled, and a message says so."""
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class Function:
    """A compiled kernel, a C function of a job's address: its address for other threads, and a callable for this one."""

    address: int
    call: Callable[[int], None]


def source_stamp(module: str) -> int:
    """A hash of the source of a module and of all modules of this package that it imports.

    numba's disk cache watches only the file of the function itself; with the hash compiled in, a change in any of them compiles
    anew. Modules outside this package are not watched: kernels copy the constants they need from there, and a test holds
    the copies equal.
    """
    package, found, waiting = __package__ or "", dict[str, bytes](), [module.rpartition(".")[2]]
    while waiting:
        name = waiting.pop()
        path = Path(__file__).parent / f"{name}.py"
        if name not in found and path.exists():
            found[name] = path.read_bytes()
            text = found[name].decode()
            waiting += re.findall(rf"^from {re.escape(package)}\.(\w+) import", text, re.MULTILINE)
            for names in re.findall(rf"^from {re.escape(package)} import (.+)$", text, re.MULTILINE):
                waiting += re.findall(r"\w+", names)
    digest = hashlib.sha256(b"".join(found[name] for name in sorted(found)))
    return int.from_bytes(digest.digest()[:4], "little") + 1


class Kernels:
    """Compiled kernels by the function that builds them; compiled or read from disk when first asked for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiled: dict[Build, tuple[Any, Function]] = {}
        self._announced = False

    def function(self, build: Build) -> Function:
        """The compiled kernel that ``build`` makes."""
        found = self._compiled.get(build)
        if found is None:
            with self._lock:
                found = self._compiled.get(build)
                if found is None:
                    compiled = self._compile(build)
                    found = compiled, Function(int(compiled.address), _FUNCTION(compiled.address))
                    self._compiled[build] = found
        return found[1]

    def _compile(self, build: Build) -> Any:
        signature = types.void(types.int64)
        body = build(source_stamp(build.__module__))
        timer = threading.Timer(NOTICE_SECONDS, self._announce)
        timer.start()
        try:
            try:
                return cfunc(signature, cache=True)(body)
            except RuntimeError as error:  # no folder that can be written
                if "cannot cache" not in str(error):
                    raise
                return cfunc(signature)(body)
        finally:
            timer.cancel()

    def _announce(self) -> None:
        if not self._announced:
            self._announced = True
            told = "compiling the CPU kernels that are new to this installation (a minute or two in all)"
            print(f"skvq: {told}", file=sys.stderr, flush=True)


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
