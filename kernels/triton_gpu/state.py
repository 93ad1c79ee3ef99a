# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""Scale and mid of every token and group, now and as they were before a fit: ``state`` float32 [4, G, T] of one head."""

from __future__ import annotations

import triton
import triton.language as tl

SCALE, MID, OLD_SCALE, OLD_MID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # rows of a group's state


@triton.jit
def keep(state, WHAT: tl.constexpr, group, x, t, inside, tokens, G: tl.constexpr):
    """Write ``x`` [T] as the SCALE, MID, OLD_SCALE or OLD_MID of a group."""
    tl.store(state + (WHAT * G + group) * tokens + t, x, mask=inside)


@triton.jit
def kept(state, WHAT: tl.constexpr, group, t, inside, tokens, G: tl.constexpr):
    """What ``keep`` wrote, [T]; 1 past the last token, so that it can be divided by."""
    return tl.load(state + (WHAT * G + group) * tokens + t, mask=inside, other=1.0)
