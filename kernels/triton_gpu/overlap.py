# mypy: ignore-errors
# ruff: noqa: N803
"""Programmatic dependent launch (PDL): a kernel may be started while the one before it still runs, and waits where it must.

A kernel with PDL may read what no kernel writes (weights, bases, tables) before it calls ``wait_for_inputs``, and nothing
else. ``wait_for_inputs`` waits for everything that was launched before; only then may the next kernel be started.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait for all earlier kernels. From here on what they wrote may be read, and what they read may be overwritten."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(ptr, count):
    """Ask for ``count`` bytes from ``ptr`` on, both multiples of 16, to be brought to the L2 cache, and go on. sm_90 and
    later.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; "
        "@first cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [ptr.to(tl.int64), count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@functools.cache
def driver_version() -> int:
    """The CUDA version that the driver serves, 12030 for 12.3; 0 where there is none."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def overlaps(device: torch.device) -> bool:
    """Whether launches on a device may overlap: on Hopper and on Blackwell's data-centre cards, from CUDA 12.3 on.

    Older drivers cannot hold such launches in a CUDA graph, and capturing them is reported to fail on compute capability 12.0.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    return driver_version() >= 12030


def overlapping(pdl: bool) -> dict[str, bool]:
    """The arguments of a launch that say whether it is PDL; Triton's interpreter knows no ``launch_pdl``."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
