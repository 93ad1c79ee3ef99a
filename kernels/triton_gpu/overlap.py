# mypy: ignore-errors
# ruff: noqa: N803
"""Kernels of one chain that overlap: the next is started while the last still runs, and waits where it needs its results.

Programmatic dependent launch of Hopper and later. A kernel with PDL reads only what no kernel writes (weights, bases, tables)
before ``wait_for_inputs``, which waits for all that was launched before it and only then lets the next kernel start.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """After this, everything written by earlier kernels can be read, and what they have read be written over."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(ptr, count):
    """Bring ``count`` bytes from ``ptr``, both multiples of 16, to the L2 cache; nothing waits for them. Hopper and later."""
    tl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; "
        "@first cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [ptr.to(tl.int64), count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def overlaps(device: torch.device) -> bool:
    """Whether kernels of a device can overlap: compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(pdl: bool) -> dict[str, bool]:
    """Launch options of a kernel whose PDL is ``pdl``; Triton's interpreter knows none of them."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}
