"""Kernels compiled once per installation, in numba's cache on disk.

numba takes up to 20 seconds for a kernel. A kernel that will be needed next can be compiled by another process meanwhile, which
leaves it in that cache.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from numba import cfunc, types

from skvq.kernels.notices import notice

Build = Callable[[int], Callable[[int], None]]
NOTICE_SECONDS = 2.0
"""Loading from numba's cache is faster than this: after so long a kernel is being compiled, and a message says so."""
SIGNATURE = types.void(types.int64)
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class Function:
    """A compiled kernel, a C function of a job's address: its address for other threads, and a callable for this one."""

    address: int
    call: Callable[[int], None]


def source_stamp(module: str) -> int:
    """A hash of the source of a module and of all modules of this package, and of ``ggml``, that it imports.

    numba's disk cache watches only the file of the function itself; with the hash compiled in, a change in any of them compiles
    anew. Other modules are not watched: kernels copy the constants they need from there, and a test holds the copies equal.
    """
    kernels, _, package = (__package__ or "").rpartition(".")
    found, waiting = dict[str, bytes](), [module.removeprefix(f"{kernels}.")]
    while waiting:
        name = waiting.pop()
        path = Path(__file__).parents[1] / f"{name.replace('.', '/')}.py"
        if name not in found and path.exists():
            found[name] = path.read_bytes()
            text = found[name].decode()
            waiting += re.findall(rf"^from {re.escape(kernels)}\.((?:{package}|ggml)\.\w+) import", text, re.MULTILINE)
            for names in re.findall(rf"^from {re.escape(kernels)}\.{package} import (.+)$", text, re.MULTILINE):
                waiting += [f"{package}.{name}" for name in re.findall(r"\w+", names)]
    digest = hashlib.sha256(b"".join(found[name] for name in sorted(found)))
    return int.from_bytes(digest.digest()[:4], "little") + 1


def compile_kernel(build: Build, *, cache: bool = True) -> Any:
    """The kernel that ``build`` makes: with ``cache`` from numba's, or else into it; RuntimeError if that cannot be written."""
    return cfunc(SIGNATURE, cache=cache)(build(source_stamp(build.__module__)))


def compile_elsewhere(build: Build) -> Popen[bytes] | None:
    """Another process that compiles a kernel into numba's cache, and is stopped with this one; None if there can be none."""
    if not sys.executable or getattr(sys, "frozen", False):  # would be this very program
        return None
    module, name, here = build.__module__, build.__name__, __name__
    code = f"import sys; sys.path[:] = {sys.path}; from {here} import {compile_kernel.__name__}; "
    code += f"from {module} import {name}; {compile_kernel.__name__}({name})"
    try:
        process = Popen([sys.executable, "-c", code], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
    except OSError:
        return None
    atexit.register(process.terminate)
    return process


class Kernels:
    """Compiled kernels by the function that builds them; compiled or read from disk when first asked for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compiled: dict[Build, tuple[Any, Function]] = {}
        self._elsewhere: dict[Build, Popen[bytes] | None] = {}
        self._announced = False

    def function(self, build: Build, soon: Build | None = None) -> Function:
        """The compiled kernel that ``build`` makes. If it must be compiled, so is ``soon``, which is needed next, elsewhere."""
        found = self._compiled.get(build)
        if found is None:
            with self._lock:
                found = self._compiled.get(build)
                if found is None:
                    compiled = self._compile(build, soon)
                    found = compiled, Function(int(compiled.address), _FUNCTION(compiled.address))
                    self._compiled[build] = found
        return found[1]

    def _compile(self, build: Build, soon: Build | None) -> Any:
        timer = threading.Timer(NOTICE_SECONDS, self._takes_long, (soon,))
        timer.start()
        try:
            other = self._elsewhere.get(build)
            if other is not None:
                other.wait()
            try:
                return compile_kernel(build)
            except RuntimeError as error:  # no folder that can be written
                if "cannot cache" not in str(error):
                    raise
                return compile_kernel(build, cache=False)
        finally:
            timer.cancel()

    def _takes_long(self, soon: Build | None) -> None:
        if not self._announced:
            self._announced = True
            notice("compiling the CPU kernels that are new to this installation (a minute in all)")
        if soon is not None and soon not in self._compiled and soon not in self._elsewhere:
            self._elsewhere[soon] = compile_elsewhere(soon)
