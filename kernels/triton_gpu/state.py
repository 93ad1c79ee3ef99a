# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""What a lattice quantizer remembers of each token and group: ``state`` float32 [4, G, T], a row for each of the four below."""

from __future__ import annotations

import triton
import triton.language as tl

SCALE, MID, OLD_SCALE, OLD_MID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # rows of a group's state


@triton.jit
def keep(state, WHAT: tl.constexpr, group, x, t, inside, tokens, G: tl.constexpr):
    tl.store(state + (WHAT * G + group) * tokens + t, x, mask=inside)


@triton.jit
def kept(state, WHAT: tl.constexpr, group, t, inside, tokens, G: tl.constexpr):
    return tl.load(state + (WHAT * G + group) * tokens + t, mask=inside, other=1.0)
