"""Whether this process may use the CPU's AMX. Linux has each ask for it: tiles are 8 KB more that it saves of a thread."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

from numba.core.registry import cpu_target

from skvq.kernels.notices import notice
from skvq.kernels.numba_cpu.amx import has_tiles

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
"""System call, operation and feature (Linux, Documentation/arch/x86/xstate.rst)."""


@functools.cache
def has_amx() -> bool:
    """Whether products of many vectors go by tiles (``amx.py``): the CPU that numba compiles for has them, the system lets this
    process use them, and the environment does not say ``SKVQ_AMX=0``.
    """
    if os.environ.get("SKVQ_AMX") == "0" or sys.platform != "linux" or not compiles_tiles():
        return False
    allowed = bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)
    if not allowed:
        notice("this CPU has AMX, but the system does not let this process use it: prompts are read at a third of the speed")
    return allowed


def compiles_tiles() -> bool:
    """Whether the CPU that numba compiles for has tiles."""
    return bool(has_tiles(cpu_target.target_context))  # type: ignore[no-untyped-call]
